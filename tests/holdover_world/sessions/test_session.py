"""Sessions: what they own, what they share, what survives a restart."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from holdover_world.loop.config import HoldWindow, LoopConfig
from holdover_world.sessions.session import SessionChunk, SessionSnapshot, WorldSession, advance
from holdover_world.sessions.world import World
from tests.holdover_world.sessions.small import action, small_world
from tests.holdover_world.small import small_model


@pytest.fixture
def world() -> World:
    return small_world()


def begun(world: World, seed: int = 0, **options: str) -> WorldSession:
    session = WorldSession(world, **options)
    session.reset("town", seed)
    return session


def drive(session: WorldSession, count: int) -> list[SessionChunk]:
    return [session.step(action(session.chunk)) for _ in range(count)]


def same(a: list[SessionChunk], b: list[SessionChunk]) -> bool:
    return all(
        x.index == y.index and x.exact == y.exact and all(np.array_equal(x.frames[c], y.frames[c]) for c in x.frames)
        for x, y in zip(a, b, strict=True)
    )


def tensors(session: WorldSession) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in session.snapshot().tensors.items()}


def test_a_session_generates_video_and_starts_anew_on_reset(world: World) -> None:
    session = begun(world, 3)
    first = drive(session, 5)
    assert [made.index for made in first] == list(range(5))
    assert first[0].frames["rear"].shape == (4, 16, 16, 3)
    assert session.seconds == 5 * 4 / 12
    assert {d.reason for made in first for d in made.decisions} >= {"reuse", "kv cycle", "kv update"}
    session.reset("town", 3)
    assert same(drive(session, 5), first)
    session.reset("town", 4)
    assert not same(drive(session, 5), first)
    session.reset("coast", 3)
    assert not same(drive(session, 5), first)


def test_an_action_takes_effect_in_the_very_next_chunk(world: World) -> None:
    session = begun(world)
    drive(session, 3)  # in the middle of a cycle
    twin = session.fork()
    calm, abrupt = session.step(action(2)), twin.step([1.0, -1.0])
    assert not np.array_equal(calm.frames["front_wide"], abrupt.frames["front_wide"])
    assert (calm.exact, abrupt.exact) == (False, True)  # the reactive gate


def test_a_fork_is_independent_and_shares_memory_until_it_diverges(world: World) -> None:
    session = begun(world)
    drive(session, 3)
    before = tensors(session)
    twin = session.fork()
    own, shared = session.loop.state.tensors(), twin.loop.state.tensors()
    common = sum(own[name].nbytes for name in own if own[name].data_ptr() == shared[name].data_ptr())
    assert common > 0.9 * sum(tensor.nbytes for tensor in own.values())
    forked = drive(twin, 6)
    assert tensors(session) == before
    assert same(drive(session, 6), forked)
    twin.close()
    replay = begun(world)
    drive(replay, session.chunk)
    assert same(drive(session, 2), drive(replay, 2))


CONTINUE = """
import hashlib, sys
from holdover_world.sessions.session import SessionSnapshot, WorldSession
from tests.holdover_world.sessions.small import action, small_world
session = WorldSession(small_world())
session.restore(SessionSnapshot.load(sys.argv[1]))
for _ in range(4):
    made = session.step(action(session.chunk))
    print(made.index, made.exact, hashlib.sha256(b"".join(v.tobytes() for v in made.frames.values())).hexdigest())
"""


def test_a_snapshot_continues_bit_for_bit_in_another_process(world: World, tmp_path: Path) -> None:
    session = begun(world, 1)
    drive(session, 5)
    session.snapshot().save(tmp_path / "a.safetensors")
    expected = [
        f"{m.index} {m.exact} {hashlib.sha256(b''.join(v.tobytes() for v in m.frames.values())).hexdigest()}"
        for m in drive(session, 4)
    ]
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n" + CONTINUE
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == expected


def test_a_chunk_that_fails_leaves_the_session_unchanged(world: World) -> None:
    session, other = begun(world), begun(world, 7)
    drive(session, 3), drive(other, 3)
    before, block = tensors(session), world.attached(session.policy).model.blocks[0]
    replays = [begun(world, seed) for seed in (0, 7)]
    expected = [drive(replay, 4)[3] for replay in replays]
    inner = block.norm2.forward

    def fail(x: torch.Tensor) -> torch.Tensor:
        fail.calls += 1  # type: ignore[attr-defined]
        if fail.calls in fail.at:  # type: ignore[attr-defined]
            raise RuntimeError("out of memory")
        return inner(x)

    block.norm2.forward = fail
    for at in (3, 5):  # in a denoising pass, and in the KV update after the last
        fail.calls, fail.at = 0, {at}  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="out of memory"):
            session.step(action(3))
        assert tensors(session) == before
    # In a batch the forward pass fails first for both, then for the first session alone.
    fail.calls, fail.at = 0, {1, 2}  # type: ignore[attr-defined]
    results = advance([session, other], [action(3), action(3)])
    assert isinstance(results[0], RuntimeError)
    assert isinstance(results[1], SessionChunk)
    assert same([results[1]], [expected[1]])
    assert tensors(session) == before
    del block.norm2.forward
    assert same([session.step(action(3))], [expected[0]])


def test_the_policy_can_change_in_mid_cycle(world: World) -> None:
    session, full = begun(world), begun(world, policy="never")
    drive(session, 2)
    session.use("never")
    assert drive(session, 1)[0].exact
    assert not any(d.reason == "reuse" for made in drive(full, 4) for d in made.decisions)
    session.use("eager")
    assert "warm-up" in {d.reason for d in drive(session, 1)[0].decisions}  # no cache entries are left


#: A world whose sessions show what is right in the window in hand without a pass, of two latent frames.
HOLDING = LoopConfig(commit="last_full", hold_window=HoldWindow(action=(0.0, 0.01)))


def test_a_session_drives_by_plan(world: World) -> None:
    """As its loop does, whatever form the plan has; and the next chunk may bring another."""
    a, b = [0.5, 0.1], [0.9, -0.1]
    for plan in ([b], [tuple(b)], torch.tensor([b, a]), [torch.tensor(b)]):
        session, told = begun(world), list[torch.Tensor]()
        hook = session.loop.model.register_forward_pre_hook(
            lambda _m, _a, kwargs, told=told: told.append(kwargs["action_BFA"][0]), with_kwargs=True
        )
        session.step(a, plan)
        session.step(b, [])
        hook.remove()
        assert all(torch.equal(each, torch.tensor([a, b])) for each in told)
        assert len(told) == 4 + 4 + 1
        session.close()


def test_sessions_of_a_batch_have_plans_of_their_own(world: World) -> None:
    a, b = [0.5, 0.1], [0.9, -0.1]
    sessions = [begun(world) for _ in range(3)]
    together = advance(sessions, [a, a, a], [[b], None, [a]])
    alone = [begun(world).step(a, plan) for plan in ([b], None, [a])]
    frames = [each.frames["front_wide"].astype(int) for each in together if isinstance(each, SessionChunk)]
    for one, expected in zip(frames, alone, strict=True):
        assert np.abs(one - expected.frames["front_wide"]).mean() < 0.05
    assert np.array_equal(frames[1], frames[2])  # without a plan the newest is held
    assert not np.array_equal(frames[0], frames[1])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([[0.1]], r"plan\[0\]=\[0.1\]: give 2 finite numbers in \[-1, 1\]"),
        ([[0.1, 0.2], [0.1, float("nan")]], r"plan\[1\]=\[0.1, nan\]"),
        ([[0.1, 1.2]], r"plan\[0\]=\[0.1, 1.2\]"),
        (["ab"], r"plan\[0\]='ab' is not a list of numbers"),
        (7, "plan=7 is not a list of actions"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(world: World, plan: object, message: str) -> None:
    sessions = [begun(world), begun(world)]
    with pytest.raises(ValueError, match=message):
        advance(sessions, [[0.1, 0.1]] * 2, [None, plan])  # type: ignore[list-item]
    assert [session.chunk for session in sessions] == [0, 0]


def test_a_held_chunk_is_one_of_the_session(tmp_path: Path) -> None:
    a, b, near = [0.5, 0.1], [0.9, -0.1], [0.9, -0.105]
    world = small_world(HOLDING)
    session = begun(world)
    first = session.step(a, [b])
    # A snapshot, also as a file, and a fork go on in the middle of the window in hand.
    session.snapshot().save(tmp_path / "held.safetensors")
    twin = session.fork()
    resumed = WorldSession(small_world(HOLDING))
    resumed.restore(SessionSnapshot.load(tmp_path / "held.safetensors"))
    second = session.step(near)
    assert (first.held, second.held, first.exact, second.exact) == (False, True, True, True)
    assert {(d.role, d.reason) for d in second.decisions} == {("denoise", "window"), ("kv_update", "kv update")}
    assert same([twin.step(near), resumed.step(near)], [second, second])
    assert same([session.step(a), session.step(a)], [resumed.step(a), resumed.step(a)])
    assert session.world.attached(session.policy).cache.stats().held_chunks == 3
    # Under another policy the window in hand is not shown on: it is not that policy's.
    twin.step(a, [b])
    twin.use("never")
    assert not twin.step(b).held


def test_a_held_chunk_that_fails_leaves_the_session_unchanged() -> None:
    session = begun(small_world(HOLDING))
    session.step([0.5, 0.1])
    before, block = tensors(session), session.loop.model.blocks[0]
    inner, block.norm2.forward = block.norm2.forward, lambda _: [][0]
    with pytest.raises(IndexError):  # in the KV update
        session.step([0.5, 0.1])
    del block.norm2.forward
    assert inner == block.norm2.forward
    assert tensors(session) == before
    made = session.step([0.5, 0.1])
    assert made.held
    assert (made.index, session.chunk) == (1, 2)


def test_closing_frees_everything(world: World) -> None:
    cache = world.attached(world.default_policy).cache
    for _ in range(3):
        session = begun(world)
        drive(session, 3)
        assert session.nbytes > cache.nbytes > 0
        with session.fork() as twin:
            drive(twin, 1)
        session.close()
        session.close()
        assert (cache.nbytes, len(cache.trace)) == (0, 0)
    with pytest.raises(ValueError, match="closed"):
        session.reset("town")


def test_mistakes_are_named(world: World, tmp_path: Path) -> None:
    session = WorldSession(world)
    with pytest.raises(ValueError, match="no video"):
        session.step([0, 0])
    with pytest.raises(ValueError, match="'moon' is not one of town, coast"):
        session.reset("moon")
    with pytest.raises(ValueError, match="seed=-1"):
        session.reset("town", -1)
    session.reset("town")
    for wrong in ([0.0], [float("nan"), 0], [2.0, 0.0], "ab", None):
        with pytest.raises(ValueError, match="action="):
            session.step(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'turbo' is not one of eager, never"):
        WorldSession(world, policy="turbo")
    with pytest.raises(FileNotFoundError, match="no snapshot"):
        SessionSnapshot.load(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a snapshot of format 'session 3'"):
        SessionSnapshot.load(tmp_path / "junk")
    snapshot = session.snapshot()
    with pytest.raises(ValueError, match="another model"):
        session.restore(SessionSnapshot(plain={**snapshot.plain, "model": "x"}, tensors=snapshot.tensors))


def test_depth_is_decoded_on_request() -> None:
    world = small_world()
    deep = World(world.model, world.starts, policies=world.policies, depth=True)
    for each in (world, deep):
        with WorldSession(each) as session:
            session.reset("town", 1)
            before, made = session.loop.before, session.step(action(0))
            piece = session.loop.state.emitted[0]
        if each is world:
            assert made.depth == {}
            continue
        expected = world.model.codec.decode_depth(piece, before)
        assert list(made.depth) == list(expected)
        assert all((made.depth[name] == expected[name][0]).all() for name in expected)
    with pytest.raises(ValueError, match="has no depth"):
        World(small_model(depth_channels=0), world.starts, depth=True)
