"""A chunk whose next frame is already right in the window in hand runs no pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import holdover
from holdover_world.loop.batch import advance
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import HoldWindow, LoopConfig
from holdover_world.loop.state import LoopState, Piece
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track
from tests.holdover_world.loop import test_protocol
from tests.holdover_world.small import latents, small_layout, small_model

EXACT = LoopConfig(hold_window=HoldWindow())
A, B, C = (torch.tensor(pair) for pair in ([0.3, 0.1], [0.3, -0.2], [0.1, 0.0]))
#: A window of four frames, and the passes of a cycle of which nothing is held.
PASSES = 4


class Counted:
    """Counts the denoising passes of a model."""

    def __init__(self, model: WorldModel) -> None:
        self.passes, self.updates, self.rows = 0, 0, 0
        model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: Any, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
        self.updates += bool(kwargs.get("write"))
        self.passes += not kwargs.get("write")
        self.rows += 0 if kwargs.get("write") else len(args[0])


def model_of(**changes: int) -> WorldModel:
    return small_model(**{"window": 4, **changes})


def loop(model: WorldModel, config: LoopConfig = EXACT, **more: Any) -> ClosedLoop[WorldModel]:
    start = latents(model, 4), A.expand(1, 4, -1)
    return ClosedLoop(model, *start, config=config, seed=3, **more)


def drive(run: ClosedLoop[Any], told: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> list[Piece]:
    """Pairs of an action and a plan."""
    return [run.step(action, torch.stack(list(plan)) if plan else None) for action, plan in told]


def held(pieces: Sequence[Piece]) -> str:
    return "".join("h" if piece.held else "." for piece in pieces)


#: Actions and plans of two cycles, and which chunks are held.
KEPT = [(A, [B, C, A]), (B, [C, A]), (C, [A]), (A, [])]
CASES = {
    "kept": (KEPT * 2, ".hhh.hhh"),
    "steady": ([(A, [])] * 8, ".hhh.hhh"),
    "newest held, and another each time": ([(A, []), (B, []), (C, []), (A, [])], "...."),
    "newest held, changed once": ([(A, []), (A, []), (B, []), (B, [])], ".h.h"),
    # The frame that is shown is right whatever is now planned for those after it.
    "revised for later": ([(A, [B, C, A]), (B, [A, A]), (A, []), (A, [])], ".h.h"),
    "revised, and then kept": ([(A, [B, B, B]), (C, [B, B]), (B, [B]), (B, [])], "..hh"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_frame_is_held_if_it_was_drawn_with_all_that_led_to_it(case: str) -> None:
    told, expected = CASES[case]
    model = model_of()
    counted, run = Counted(model), loop(model)
    pieces = drive(run, told)
    assert held(pieces) == expected
    assert counted.passes == PASSES * expected.count(".")
    assert counted.updates == 1 + len(told) // 4


def test_what_is_held_is_the_window_frame_by_frame() -> None:
    model = model_of()
    windows: list[Tensor] = []
    model.register_forward_hook(lambda *seen: windows.append(seen[-1].clone()))
    pieces = drive(loop(model), KEPT)
    for n, piece in enumerate(pieces):
        assert torch.equal(piece.latents, windows[PASSES][:, n : n + 1])
        assert torch.equal(piece.before, latents(model, 4)[:, -1] if n == 0 else pieces[n - 1].latents[:, 0])
    assert [piece.exact for piece in pieces] == [True] * 4


def test_a_held_chunk_takes_no_time_but_that_of_the_kv_update() -> None:
    pieces = drive(loop(model_of()), KEPT)
    assert [piece.dit_seconds > 0 for piece in pieces] == [True, False, False, True]
    assert pieces[3].dit_seconds < pieces[0].dit_seconds


def test_holding_is_off_by_default() -> None:
    model = model_of()
    counted, run = Counted(model), loop(model, LoopConfig())
    assert held(drive(run, KEPT)) == "...."
    assert counted.passes == 16
    assert run.state.window is None


# With a cache.


OPEN = {"tau_floor": -1.0, "margin": 2.0, "tau_dev": float("inf")}


def cached(
    config: LoopConfig, told: Sequence[tuple[Tensor, Sequence[Tensor]]], **options: Any
) -> tuple[list[Piece], holdover.Cache, list[Tensor]]:
    """The pieces, the cache, and what was written into the KV cache after the start."""
    model = model_of()
    written: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: written.append(args[0].clone()) if kwargs.get("write") else None, with_kwargs=True
    )
    with holdover.attach(model, holdover.xcache(**{**OPEN, **options})) as cache:
        pieces = drive(loop(model, config, cache=cache), told)
    return pieces, cache, written[1:]


def chunks_of(cache: holdover.Cache) -> dict[int, Counter[str]]:
    found: dict[int, Counter[str]] = {}
    for decision in cache.trace:
        if decision.role == "denoise":
            found.setdefault(decision.chunk, Counter())[decision.reason] += 1
    return found


#: The second chunk is not as planned, and made from cache; the third and the fourth are held.
REVISED = [(A, [B, B, B]), (C, [C, C]), (C, [C]), (C, [])]


def test_a_held_chunk_is_noted_as_what_it_is_and_counted_apart() -> None:
    pieces, cache, _ = cached(EXACT, REVISED)
    assert held(pieces) == "..hh"
    calls = PASSES * 4
    assert chunks_of(cache) == {
        0: {"warm-up": calls},
        1: {"anchor": PASSES, "reuse": calls - PASSES},
        2: {"window": calls},
        3: {"window": calls},
    }
    window = [decision for decision in cache.trace if decision.reason == "window"]
    assert not any(decision.computed or decision.reused for decision in window)
    stats = cache.stats()
    assert (stats.held_chunks, stats.reused, stats.computed) == (2, calls - PASSES, calls + PASSES + 8)
    assert stats.skip == (calls - PASSES) / calls
    assert "window" not in stats.reasons
    assert "window    2 chunks without a pass" in str(stats)


def test_a_window_from_cache_is_not_exact_and_what_is_held_of_it_neither() -> None:
    pieces, _, _ = cached(EXACT, REVISED)
    assert [piece.exact for piece in pieces] == [True, False, False, False]


@pytest.mark.parametrize("commit", ["first", "last_full", "emitted"])
def test_the_commit_rules(commit: Any) -> None:
    """What is held is neither a first chunk nor one computed in full; as emitted, it counts like any other."""
    for told, full in ((REVISED, [0]), ([(A, [B, B, B]), (C, [C, C]), (C, [C]), (B, [])], [0])):
        pieces, _, written = cached(replace(EXACT, commit=commit), told)
        assert "h" in held(pieces)
        emitted = torch.cat([piece.latents for piece in pieces], 1)
        if commit == "emitted":
            assert torch.equal(written[0], emitted)
        else:
            assert torch.equal(written[0][:, full[-1]], emitted[:, 0])
            assert not torch.equal(written[0], emitted)


def test_last_full_commits_the_window_that_was_computed_in_full_in_mid_cycle() -> None:
    """Not the first's, though the chunks after it are held."""
    model = model_of()
    made: list[Tensor] = []
    model.register_forward_hook(lambda *seen: made.append(seen[-1].clone()))
    written: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: written.append(args[0].clone()) if kwargs.get("write") else None, with_kwargs=True
    )
    with holdover.attach(model, holdover.xcache_reactive(**OPEN)) as cache:
        pieces = drive(loop(model, replace(EXACT, commit="last_full"), cache=cache), REVISED)
    assert held(pieces) == "..hh"
    assert [piece.exact for piece in pieces] == [True] * 4
    assert torch.equal(written[1][:, 1:], made[1 + 2 * PASSES - 1][:, 1:])
    assert torch.equal(written[1], torch.cat([piece.latents for piece in pieces], 1))


def test_an_announced_chunk_is_held_only_if_its_window_was_computed_in_full() -> None:
    """Else a window from cache would be committed with none computed in full."""
    config = replace(EXACT, commit="last_full", protected="last")
    pieces, cache, written = cached(config, KEPT)
    assert held(pieces) == ".hhh"  # computed in full, as it was the stream's first
    pieces, cache, written = cached(config, KEPT + REVISED)
    assert held(pieces[4:]) == "..h."
    assert not pieces[4].exact
    assert pieces[7].exact
    assert chunks_of(cache)[7] == {"kv cycle": PASSES * 4}
    assert torch.equal(written[1], torch.cat([piece.latents for piece in pieces[4:]], 1))


def test_warm_up_and_staleness_count_chunks_that_ran() -> None:
    _, cache, _ = cached(EXACT, [*KEPT, (A, []), (B, []), (C, []), (B, [])], warmup=2, protection="pass")
    reasons = chunks_of(cache)
    assert set(reasons[4]) == {"warm-up"}  # the second that ran
    assert reasons[5]["reuse"] > 0
    _, cache, _ = cached(EXACT, [(A, [B, C, C]), (B, [C, C]), (C, [C]), (A, [])], max_staleness=1)
    assert chunks_of(cache)[3]["stale"] == 0  # one chunk has come between, and two held ones
    assert chunks_of(cache)[3]["reuse"] > 0


@pytest.mark.filterwarnings("error")
def test_a_loop_of_which_every_other_chunk_is_held_is_not_told_that_nothing_can_be_reused() -> None:
    _, cache, _ = cached(EXACT, KEPT * 4)
    assert cache.stats().held_chunks == 12


def test_both_guidance_branches_are_held() -> None:
    model = model_of()
    counted = Counted(model)
    with holdover.attach(model, holdover.xcache()) as cache:
        pieces = drive(loop(model, replace(EXACT, guidance=2.0), cache=cache), KEPT)
    assert (held(pieces), counted.passes) == (".hhh", 2 * PASSES)
    noted = Counter((d.branch, d.chunk) for d in cache.trace if d.reason == "window")
    assert noted == dict.fromkeys(product(("", "uncond"), (1, 2, 3)), PASSES * 4)
    assert cache.stats().held_chunks == 3


def test_the_cache_is_told_a_chunk_once() -> None:
    model = model_of()
    with holdover.attach(model, holdover.never()) as cache:
        with pytest.raises(ValueError, match="no stream 'default'"):
            cache.hold(chunk=0)
        run = loop(model, cache=cache)
        drive(run, [(A, [])] * 2)
        with pytest.raises(ValueError, match="chunk 0 of stream 'default' ran passes, so it is not held"):
            cache.hold(chunk=0)
        with pytest.raises(ValueError, match="chunk 1 of stream 'default' was held, without a pass"):
            cache.hold(chunk=1)
        with pytest.raises(ValueError, match="was held, without a pass"), cache.step(chunk=1):
            model(latents(model, 4), sigma=1.0, action_BFA=torch.zeros(1, 4, 2))


# Drafts.


class Drafting:
    """A cache whose policy leaves some frames of every window after the first as drafts."""

    by_frame = False

    def __init__(self, cache: holdover.Cache, drafts: tuple[int, ...]) -> None:
        self.cache, self._drafts, self.chunks = cache, drafts, 0

    def step(self, *args: Any, **fields: Any) -> AbstractContextManager[Any]:
        return self.cache.step(*args, **fields)

    def exact(self, stream: str) -> bool:
        return self.cache.exact(stream)

    def hold(self, **fields: Any) -> None:
        self.cache.hold(**fields)

    def drafts(self, stream: str) -> Sequence[int]:
        self.chunks += 1
        return self._drafts if self.chunks > 1 else ()


def test_a_draft_is_not_shown_without_a_pass() -> None:
    for drafts, expected in (((), "..hh"), ((2,), "..." + "h"), ((0, 2, 3), "...."), ((3,), "..h.")):
        model = model_of()
        with holdover.attach(model, holdover.never()) as cache:
            run = loop(model, cache=Drafting(cache, drafts))
            pieces = drive(run, REVISED[:2])
            assert run.state.window is not None
            assert run.state.window.drafts == drafts
            if drafts == (2,):  # once it has run, no frame is a draft any more
                run.cache._drafts = ()  # type: ignore[union-attr]
            assert held([*pieces, *drive(run, REVISED[2:])]) == expected


@pytest.mark.parametrize(("later", "expected"), [("never", "...."), ("always", "..hh")])
def test_the_drafts_of_a_frontier_are_drawn_when_they_are_due(later: Any, expected: str) -> None:
    """With a plan that is kept there are none; once it is revised, the frames ahead are drawn or left."""
    model = model_of()
    with holdover.attach(model, holdover.policy("frontier", later=later)) as cache:
        run = loop(model, cache=cache)
        assert held(drive(run, KEPT)) == ".hhh"
        pieces = drive(run, REVISED)
        assert held(pieces) == expected
        assert [piece.exact for piece in pieces] == [True, False, False, False]


# Tolerance.


def test_a_tolerance_is_always_against_what_was_drawn() -> None:
    """Small steps in one direction do not add up."""
    config = replace(EXACT, hold_window=HoldWindow(action=0.05))
    steps = [(A + torch.tensor([0.02 * n, 0.0]), []) for n in range(4)]
    assert held(drive(loop(model_of(), config), steps)) == ".hh."
    assert held(drive(loop(model_of()), steps)) == "...."


def test_dimensions_may_have_tolerances_of_their_own() -> None:
    config = replace(EXACT, hold_window=HoldWindow(action=(0.05, 0.0)))
    assert held(drive(loop(model_of(), config), [(A, []), (A + torch.tensor([0.04, 0.0]), [])])) == ".h"
    assert held(drive(loop(model_of(), config), [(A, []), (A + torch.tensor([0.0, 0.01]), [])])) == ".."
    with pytest.raises(ValueError, match="has 3 dimensions, the action 2"):
        drive(loop(model_of(), replace(EXACT, hold_window=HoldWindow(action=(0.1, 0.1, 0.1)))), [(A, [])] * 2)


def test_poses_are_compared_where_the_history_knows_them() -> None:
    """A frame is seen from somewhere else if its action, or one before it, moved the car there."""
    faster = A + torch.tensor([0.02, 0.0])
    told = [(A, []), (faster, []), (faster, []), (faster, [])]
    model = model_of()
    probe = loop(model)
    probe.step(A)
    history: Any = probe.history
    drawn, driven = (history.poses(torch.stack([A, *[a] * 3])[None]) for a in (A, faster))
    off = (drawn - driven)[0, ..., :2].norm(dim=-1).amax(1).tolist()
    assert 0 == off[0] < off[1] < off[2] < off[3]
    for limit, expected in ((0.0, "..hh"), ((off[1] + off[2]) / 2, ".h.h"), (off[3] + 0.01, ".hhh")):
        config = replace(EXACT, hold_window=HoldWindow(metres=limit, degrees=1.0))
        assert held(drive(loop(model_of(), config), told)) == expected  # after a pass the rest is as told
    turned = A + torch.tensor([0.0, 0.1])
    wide = replace(EXACT, hold_window=HoldWindow(metres=100.0, degrees=0.01))
    assert held(drive(loop(model_of(), wide), [(A, []), (turned, [])])) == ".."


def test_a_history_without_poses_is_compared_by_actions() -> None:
    config = replace(EXACT, hold_window=HoldWindow(metres=0.1, degrees=1.0))
    with pytest.raises(ValueError, match=r"a Sum knows no poses; give HoldWindow\(action="):
        ClosedLoop(test_protocol.Counter(), test_protocol.START, test_protocol.TOLD, config=config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HoldWindow(action=-0.1), r"action=-0.1: give how far it may be off, 0 or more"),
        (lambda: HoldWindow(action=(0.1, float("nan"))), "action=nan"),
        (lambda: HoldWindow(metres=1.0), "metres=1.0, degrees=None: give both, or neither"),
        (lambda: HoldWindow(metres=1.0, degrees=-1.0), "degrees=-1.0"),
        (lambda: HoldWindow(action=0.1, metres=1.0, degrees=1.0), "compare actions or poses"),
        (lambda: replace(EXACT, cadence="plain"), "hold_window holds the window of a cycle"),
        (lambda: replace(EXACT, fresh_noise=True), "hold_window holds the window of a cycle"),
    ],
)
def test_options_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Conditions.


def test_a_window_is_not_held_where_the_conditions_changed() -> None:
    model, track = model_of(), Track(small_layout(), torch.zeros(32, 3, dtype=torch.float64), torch.zeros(32, 2))
    run = loop(model, track=track)
    assert held(drive(run, [(A, [])] * 2)) == ".h"
    run.history.follow(track)  # type: ignore[attr-defined]
    assert run.state.window is None
    assert held(drive(run, [(A, [])] * 2)) == ".h"


# State.


def same(a: Sequence[Piece], b: Sequence[Piece]) -> bool:
    return held(a) == held(b) and all(torch.equal(x.latents, y.latents) for x, y in zip(a, b, strict=True))


#: The rest of the cycle is held, or only half of it, or nothing; then comes another cycle.
REST = [[*KEPT[2:], *KEPT], [(C, []), (B, []), *KEPT], [(B, []), (A, []), *KEPT]]


@pytest.mark.parametrize(("rest", "policy"), [*product(range(3), [None, holdover.xcache(**OPEN)])])
def test_it_goes_on_bit_by_bit_from_the_middle_of_a_held_window(rest: int, policy: holdover.Policy | None) -> None:
    def begun() -> tuple[ClosedLoop[WorldModel], holdover.Cache | None]:
        model = model_of()
        cache = holdover.attach(model, policy) if policy else None
        run = loop(model, cache=cache)
        assert held(drive(run, KEPT[:2])) == ".h"
        return run, cache

    whole, _ = begun()
    expected = drive(whole, REST[rest])
    assert held(expected)[:2] == ["hh", "h.", ".."][rest]
    # In another process: tensors and the cache's snapshot.
    run, cache = begun()
    file = save({name: tensor.clone().contiguous() for name, tensor in run.state.tensors().items()})
    model = model_of()
    other = holdover.attach(model, policy) if policy else None
    if cache is not None and other is not None:
        other.restore("default", cache.snapshot())
    resumed = ClosedLoop.resume(model, LoopState.from_tensors(load(file), model), config=EXACT, cache=other)
    assert same(drive(resumed, REST[rest]), expected)
    # A fork, which goes first and elsewhere.
    if cache is not None:
        cache.fork("default", "twin")
    twin = run.fork("twin")
    away = drive(twin, [(B, []), (B, [])])
    state = run.state
    assert same(drive(run, REST[rest]), expected)
    assert not same(away, expected[:2])
    # And back in place.
    if cache is None:
        run.state = state
        assert same(drive(run, REST[rest]), expected)


def test_a_state_without_a_window_in_hand_runs_its_passes() -> None:
    run = loop(model_of())
    drive(run, KEPT[:2])
    run.state = replace(run.state, window=None)
    assert held(drive(run, KEPT[2:])) == ".h"


# In a batch.


def test_loops_with_a_held_window_leave_the_batch() -> None:
    model = model_of()
    counted = Counted(model)
    with holdover.attach(model, holdover.xcache()) as cache:
        loops = [
            ClosedLoop(model, latents(model, 4, seed=n), torch.zeros(1, 4, 2), config=EXACT, cache=cache, stream=str(n))
            for n in range(3)
        ]
        made: list[list[Piece]] = []
        # The first holds all it can, the second nothing; the third begins later.
        script = [(A, A, None), (A, B, None), (A, C, A), (A, A, A), (A, A, A), (A, B, B)]
        batched = []
        for actions in script:
            going = [n for n in range(3) if actions[n] is not None]
            before = counted.passes, counted.rows
            made.append(advance([loops[n] for n in going], [actions[n] for n in going if actions[n] is not None]))
            batched.append(((counted.passes - before[0]) // PASSES, (counted.rows - before[1]) // PASSES))
        assert batched == [(1, 2), (1, 1), (1, 2), (1, 1), (1, 2), (1, 2)]
        assert [held(each) for each in made] == ["..", "h.", "h..", "h.h", "..h", "h.."]
        for n in range(3):
            chunks = {d.chunk for d in cache.trace if d.stream == str(n)}
            assert chunks == set(range(loops[n].chunk))
    for n in range(3):
        alone = ClosedLoop(model, latents(model, 4, seed=n), torch.zeros(1, 4, 2), config=EXACT)
        expected = [alone.step(actions[n]) for actions in script if actions[n] is not None]
        begun = [actions[n] is not None for actions in script].index(True)
        got = [each[n if begun == 0 else -1] for each in made[begun:]]
        assert held(got) == held(expected)
        for piece, whole in zip(got[:1], expected[:1], strict=True):
            torch.testing.assert_close(piece.latents, whole.latents, atol=1e-3, rtol=1e-3)


def test_a_batch_of_held_windows_runs_no_pass_and_one_kv_update() -> None:
    model = model_of()
    loops = [ClosedLoop(model, latents(model, 4, seed=n), torch.zeros(1, 4, 2), config=EXACT) for n in range(2)]
    counted = Counted(model)
    for _ in range(4):
        pieces = advance(loops, [A, B])
    assert (counted.passes, counted.updates) == (PASSES, 1)
    assert [piece.held for piece in pieces] == [True, True]
