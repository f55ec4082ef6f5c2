"""Sessions: what they own, what they share, what survives a restart."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

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
    with pytest.raises(ValueError, match="not a snapshot of format 'session 2'"):
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
