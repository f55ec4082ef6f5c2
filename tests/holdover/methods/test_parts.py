"""Properties of the fingerprint, the gate, the predictor and the guards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import holdover
from holdover.method import Call, Entry, Guard, Signal, Span
from holdover.methods.fingerprint import Fingerprint, grid_counts, uniform
from holdover.methods.fixed_interval import OneSpan
from holdover.methods.never import Always
from holdover.methods.parts.guards import Anchors, AnyOf, Interval, WarmUp
from holdover.methods.parts.predictors import Residual
from holdover.methods.parts.spans import EachBlock
from holdover.methods.xcache import DualMetric, Stale, told_cosine, vector_cosine
from holdover.methods.xcache_reactive import NewAction
from tests.holdover.naive import xcache as naive

few = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

dims = st.integers(1, 12)
grids = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)


def call(**fields: Any) -> Call:
    """A call of block 2 of 6, as a part sees it."""
    held = fields.pop("held", {})
    given: dict[str, Any] = {"span": Span(2, 2), "blocks": 6, "chunk": 5, "full_action": None, "part": None}
    given["x"] = torch.zeros(1, 1, 1)
    given |= {name: fields.pop(name) for name in list(fields) if name in given}
    given |= {"pass_input": fields.pop("pass_input", given["x"]), "tap": lambda name: given["x"]}
    given |= {"peer": lambda block, branch=None: None, "kind": fields.pop("kind", "block")}
    kind: dict[str, Any] = {"shape": torch.Size([1, 1, 1]), "dtype": torch.float32, "device": torch.device("cpu")}
    kind |= {"out_dtype": torch.float32, "chunk": 4, "epoch": 0, "action": None}
    entry = None if held is None else Entry(**{**kind, **held})
    step = {"chunk": 5, "num_steps": 4, "commits": False}
    return Call(step=holdover.Step(**{**step, **fields}), entry=entry, **given)


# The fingerprint.


def compared(reading: Signal, now: Tensor, then: Tensor) -> list[float]:
    metrics = reading.metrics(reading.compare(now, then).tolist())
    assert list(metrics) == ["cosine", "deviation"]
    return list(metrics.values())


def test_fingerprints_are_in_float32_whatever_is_set_around_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 24, 64)
    moved = x + 0.02 * torch.randn_like(x)

    def gauged() -> list[float]:
        reading = Fingerprint().prepare(x.shape, x.device, ())
        return compared(reading, reading.read(call(x=moved)), reading.read(call(x=x)))

    plain = gauged()
    with torch.autocast("cpu", torch.bfloat16):
        assert gauged() == plain
    torch.set_default_dtype(torch.float64)
    try:
        assert gauged() == plain
    finally:
        torch.set_default_dtype(torch.float32)


@few
@given(dims, dims, dims, st.integers(1, 64))
def test_grid_counts_keep_the_budget_and_the_proportions(f: int, h: int, w: int, tokens: int) -> None:
    counts = grid_counts((f, h, w), tokens)
    assert math.prod(counts) <= max(tokens, 1)
    assert all(1 <= count <= dim for count, dim in zip(counts, (f, h, w), strict=True))
    assert list(counts) == naive.axis_counts((f, h, w), tokens)
    if f * h * w <= tokens:
        assert counts == (f, h, w)


@pytest.mark.parametrize(
    ("grid", "tokens", "counts"),
    [
        ((8, 8, 16), 32, (3, 3, 3)),  # 2.52, 2.52 and 5.04 round to 3·3·5 = 45: the largest falls to 3
        ((2, 6, 8), 32, (1, 4, 6)),  # 1.39, 4.16 and 5.55 round to 24
        ((4, 4, 6), 32, (3, 3, 3)),  # 2.77, 2.77 and 4.16 round to 36: the last falls to 3
        ((1, 100, 100), 32, (1, 5, 6)),  # 0.15, 14.7 and 14.7: rows fall first, for they are the first of equals
    ],
)
def test_grid_counts_by_hand(grid: tuple[int, int, int], tokens: int, counts: tuple[int, int, int]) -> None:
    assert grid_counts(grid, tokens) == counts


@few
@given(st.integers(1, 300), st.integers(1, 64))
def test_uniform_indices_span_the_axis(length: int, count: int) -> None:
    indices = uniform(length, count)
    assert len(indices) == len(set(indices)) == min(length, count)
    assert indices[0] == 0
    if len(indices) > 1:
        assert indices[-1] == length - 1
        gaps = np.diff(indices)
        assert gaps.max() - gaps.min() <= 1
    assert indices == naive.axis_indices(length, len(indices))


@few
@given(grids, st.integers(1, 4), st.integers(1, 40), st.integers(0, 10**6))
def test_fingerprint_and_metrics_are_the_twins(
    groups: list[tuple[int, int, int]], frames: int, tokens: int, seed: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    per_frame = sum(v * h * w for v, h, w in groups)
    now, then = torch.randn(2, 1, frames * per_frame, 5, generator=source)
    view_groups = tuple(holdover.ViewGroup(str(n), *group) for n, group in enumerate(groups))
    reading = Fingerprint(tokens).prepare(now.shape, now.device, view_groups)
    cosine, deviation = compared(reading, reading.read(call(x=now)), reading.read(call(x=then)))
    spatial = [naive.spatial_entries(x[0].double().numpy(), groups, tokens) for x in (now, then)]
    means = [naive.global_entries(x[0].double().numpy(), groups) for x in (now, then)]
    entries = [*zip(*spatial, strict=True), *zip(*means, strict=True)]
    assert cosine == pytest.approx(min(naive.cosine(a, b) for a, b in entries), abs=1e-5)
    assert deviation == pytest.approx(naive.deviation(*spatial), rel=1e-4)


@few
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 10**6))
def test_without_a_grid_tokens_are_spaced_along_the_axis(length: int, tokens: int, seed: int) -> None:
    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(seed))
    fingerprint = Fingerprint(tokens).prepare(x.shape, x.device, ()).read(call(x=x))
    places = np.linspace(0, length - 1, min(tokens, length))
    assume(np.all(np.abs(places % 1 - 0.5) > 1e-9))  # numpy's own rounding error decides these
    chosen = naive.axis_indices(length, min(tokens, length))
    assert torch.equal(fingerprint[:, :-1], x[:, chosen])
    torch.testing.assert_close(fingerprint[:, -1], x.mean(1))


@few
@given(st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_a_scaled_input_has_cosine_one_and_deviates_by_the_factor(factor: float, seed: int) -> None:
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(seed))
    reading = Fingerprint().prepare(x.shape, x.device, ())
    cosine, deviation = compared(reading, reading.read(call(x=x * factor)), reading.read(call(x=x)))
    assert cosine == pytest.approx(1, abs=1e-5)
    assert deviation == pytest.approx(float(abs(factor - 1) * x.abs().max() / x.abs().mean()), rel=1e-2, abs=1e-4)


def test_zero_inputs_are_alike_and_like_nothing_else() -> None:
    zero, one = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    reading = Fingerprint().prepare(zero.shape, zero.device, ())
    pairs = [(zero, zero), (one, zero), (zero, one)]
    metrics = [compared(reading, reading.read(call(x=a)), reading.read(call(x=b))) for a, b in pairs]
    assert metrics == [[1, 0], [0, pytest.approx(1e8)], [0, pytest.approx(1)]]


@pytest.mark.parametrize("where", [(0, 0), (0, 3), (0, 7)])
def test_an_outlier_in_one_group_is_measured_in_that_group(where: tuple[int, int]) -> None:
    """Cosine and deviation take the worst group: a small one is not averaged away by a large one."""
    x = torch.ones(1, 8, 2)
    x[:, :4] = 100.0  # group "a": 4 tokens, group "b": 4 tokens
    groups = (holdover.ViewGroup("a", 1, 2, 2), holdover.ViewGroup("b", 1, 2, 2))
    reading = Fingerprint().prepare(x.shape, x.device, groups)
    changed = x.clone()
    changed[where] = -changed[where]
    cosine, deviation = compared(reading, reading.read(call(x=changed)), reading.read(call(x=x)))
    assert (cosine, deviation) == (pytest.approx(0.5), pytest.approx(2))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_shows_in_both_metrics(bad: float, side: int) -> None:
    pair = [torch.ones(1, 100, 2), torch.ones(1, 100, 2)]
    pair[side][0, 51, 0] = bad  # not among the sampled tokens
    reading = Fingerprint(4).prepare(pair[0].shape, torch.device("cpu"), ())
    assert all(map(math.isnan, compared(reading, *(reading.read(call(x=x)) for x in pair))))


def test_statistics_are_float32_whatever_the_input() -> None:
    x = torch.full((1, 1000, 1), 1 + 2**-7, dtype=torch.bfloat16)
    reading = Fingerprint().prepare(x.shape, x.device, ())
    fingerprint = reading.read(call(x=x))
    assert fingerprint.dtype == torch.float32
    assert fingerprint[0, -1, 0] == pytest.approx(1 + 2**-7, abs=1e-6)


def test_tokens_that_are_no_whole_frames_are_refused() -> None:
    groups = (holdover.ViewGroup("front", 2, 3, 4),)
    with pytest.raises(ValueError, match="25 tokens is not whole frames of the 24"):
        Fingerprint().prepare(torch.Size([1, 25, 8]), torch.device("cpu"), groups)


def test_more_token_axes_are_one() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    flat = x.flatten(1, 3)
    read = [Fingerprint(7).prepare(t.shape, t.device, ()).read(call(x=t)) for t in (x, flat)]
    assert torch.equal(*read)
    single = Fingerprint(7).prepare(flat[0].shape, flat.device, ()).read(call(x=flat[0]))
    assert torch.equal(single, read[1][:1])


# The gate.

scores = st.floats(-1, 1)
gate_options = st.fixed_dictionaries(
    {
        "tau_floor": st.floats(-1, 1),
        "margin": st.floats(0, 0.5),
        "alpha": st.floats(0, 1),
        "tau_dev": st.floats(0, 10),
    }
)


@few
@given(gate_options, st.lists(st.tuples(scores, st.floats(0, 10)), min_size=1, max_size=8))
def test_the_threshold_follows_the_cosine(options: dict[str, float], series: list[tuple[float, float]]) -> None:
    gate, numbers, mean = DualMetric(**options), {}, None
    for s, d in series:
        verdict = gate.judge(call(held={"numbers": numbers}), {"cosine": s, "deviation": d})
        mean = s if mean is None else options["alpha"] * s + (1 - options["alpha"]) * mean
        threshold = max(options["tau_floor"], mean - options["margin"])
        assert verdict.scores == {"cosine": s, "threshold": pytest.approx(threshold, abs=1e-12), "deviation": d}
        assume(abs(s - threshold) > 1e-9)
        assert (verdict.reason is None) == (s >= threshold and d < options["tau_dev"])
        assert verdict.reason in (None, "cosine" if s < threshold else "deviation")
        numbers = verdict.numbers


@few
@given(gate_options, scores, st.floats(0, 10), st.floats(-0.5, 0))
def test_a_worse_cosine_never_opens_the_gate(options: dict[str, float], s: float, d: float, worse: float) -> None:
    gate, held = DualMetric(**options), {"numbers": {"mean_cosine": 0.9}}
    opens = gate.judge(call(held=held), {"cosine": s, "deviation": d}).reason is None
    opens_worse = gate.judge(call(held=held), {"cosine": s + worse, "deviation": d}).reason is None
    assert opens or not opens_worse


def test_the_relaxed_first_step_asks_for_more_there_only() -> None:
    gate = DualMetric(tau_floor=0.9, margin=0.02, alpha=0.3, tau_dev=2.0, strict_first_step=True)
    metrics = {"cosine": 0.998, "deviation": 0.1}
    assert gate.judge(call(index=0), metrics).reason == "cosine"
    assert gate.judge(call(index=0), metrics | {"cosine": 0.9991}).reason is None
    assert gate.judge(call(index=1), metrics).reason is None


vectors = st.lists(st.floats(-100, 100), min_size=1, max_size=4).map(tuple)


@few
@given(vectors, st.floats(0.01, 100))
def test_the_cosine_of_actions_ignores_their_size(a: tuple[float, ...], factor: float) -> None:
    assume(math.hypot(*a) > 1e-3)
    assert vector_cosine(a, tuple(factor * x for x in a)) == pytest.approx(1)
    assert vector_cosine(a, tuple(-x for x in a)) == pytest.approx(-1)


def test_the_cosine_of_actions_that_are_zero_or_absent() -> None:
    assert vector_cosine((0.0, 0.0), (0.0, 0.0)) == 1
    assert vector_cosine((0.0, 0.0), (1.0, 0.0)) == vector_cosine((1.0,), (0.0,)) == 0
    assert told_cosine(None, None) == 1
    assert told_cosine(None, ((1.0,),)) == told_cosine(((1.0,),), None) == told_cosine(((1.0,),), ((1.0, 0.0),)) == 0


def test_the_action_is_one_more_entry_unless_left_out() -> None:
    turned = call(action=[0.0, 1.0], held={"action": (1.0, 0.0)})
    options = {"tau_floor": 0.9, "margin": 0.02, "alpha": 0.3, "tau_dev": 2.0}
    metrics = {"cosine": 0.95, "deviation": 0.0}
    assert DualMetric(**options).judge(turned, metrics).scores["cosine"] == 0
    assert DualMetric(**options, action=False).judge(turned, metrics).scores["cosine"] == 0.95


# The predictor.


@few
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_residual_gives_back_what_it_saw_and_shifts_with_its_input(seed: int, dtype: torch.dtype) -> None:
    x, y, shift = torch.randint(-8, 9, (3, 1, 4, 2), generator=torch.Generator().manual_seed(seed)).to(dtype)
    residual = Residual()
    held = residual.remember(call(x=x), y, {})
    assert torch.equal(residual.predict(call(x=x, held={"tensors": held})), y)
    assert torch.equal(residual.predict(call(x=x + shift, held={"tensors": held})), y + shift)


def test_a_residual_is_written_into_the_buffer_of_before() -> None:
    residual, x = Residual(), torch.ones(1, 4, 2)
    first = residual.remember(call(x=x), x * 2, {})
    second = residual.remember(call(x=x), x * 5, first)
    assert second["residual"] is first["residual"]
    assert torch.equal(second["residual"], x * 4)
    for y in (x.double(), torch.ones(1, 3, 2)):
        other = residual.remember(call(x=y), y * 5, first)
        assert other["residual"] is not first["residual"]
        assert torch.equal(other["residual"], y * 4)


# Guards.


def test_guards_combine() -> None:
    a, b, silent = Always("a"), Always("b"), WarmUp(0)
    assert AnyOf((a, b))(call()) == "a"
    assert AnyOf((silent, b))(call()) == "b"
    assert AnyOf((silent, silent))(call()) is AnyOf(())(call()) is None
    assert (AnyOf((silent,)) | a | b)(call()) == "a"
    assert (AnyOf((a, b)) | silent).guards == (a, b, silent)
    both = AnyOf((WarmUp(2), Anchors(1, 0)))
    assert repr(both) == "AnyOf(guards=(WarmUp(warmup=2), Anchors(front_anchors=1, back_anchors=0)))"


@pytest.mark.parametrize(
    ("guard", "fields", "reason"),
    [
        (WarmUp(6), {}, "warm-up"),
        (WarmUp(5), {}, None),
        (Anchors(2, 0), {}, None),
        (Anchors(3, 0), {}, "anchor"),
        (Anchors(0, 3), {}, None),
        (Anchors(0, 4), {}, "anchor"),
        (Anchors(0, 2), {"span": Span(2, 4)}, "anchor"),
        (Stale(1), {"held": {"chunk": 4}}, None),
        (Stale(1), {"held": {"chunk": 3}}, "stale"),
        (Stale(1), {"held": None}, None),
        (Interval(2, "steps"), {"index": 2}, "interval"),
        (Interval(2, "steps"), {"index": 3}, None),
        (Interval(2, "chunks"), {"held": {"chunk": 4}}, None),
        (Interval(2, "chunks"), {"held": {"chunk": 3}}, "interval"),
    ],
    ids=str,
)
def test_guards_at_their_edges(guard: Guard, fields: dict[str, Any], reason: str | None) -> None:
    assert guard(call(**fields)) == reason


@few
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.01, 1)), min_size=1, max_size=3),
)
def test_an_action_is_new_when_any_dimension_moved_by_its_scale(series: list[tuple[float, float, float]]) -> None:
    action, known, scale = zip(*series, strict=True)
    moved = max(abs(a - b) / s for a, b, s in series)
    assume(abs(moved - 1) > 1e-9)
    fields = {"action": action, "full_action": (known,)}
    assert NewAction(scale)(call(**fields)) == ("action" if moved > 1 else None)


def test_an_action_without_anything_to_compare_with_is_new() -> None:
    guard = NewAction(0.05)
    assert guard(call(action=[0.1])) == "action"
    assert guard(call(action=[0.1], full_action=None)) == "action"
    assert guard(call(action=[0.1], full_action=((0.1, 0.0),))) == "action"
    assert guard(call(action=[0.1], full_action=((0.1,),))) is None
    with pytest.raises(ValueError, match=r"the step has none; pass step\(action="):
        guard(call())
    with pytest.raises(ValueError, match="scale has 2 dimensions, the action 1"):
        NewAction((0.1, 0.2))(call(action=[0.1], full_action=((0.1,),)))


def test_every_frame_is_compared_with_what_it_was_told() -> None:
    guard, known = NewAction((0.05, 0.1)), ((0.1, 0.0), (0.5, 0.3))
    for frames, reason in [
        ([[0.1, 0.0], [0.5, 0.3]], None),
        ([[0.14, 0.0], [0.46, 0.39]], None),
        ([[0.1, 0.0], [0.5, 0.45]], "action"),
        ([[0.2, 0.0], [0.5, 0.3]], "action"),
        ([[0.1, 0.0]], "action"),
    ]:
        # The newest action is of no account where frames are told apart.
        assert guard(call(action=[9.0, 9.0], frame_actions=frames, full_action=known)) == reason
    assert guard(call(action=[0.1, 0.0], full_action=known)) == "action"


def test_the_gate_takes_the_least_cosine_of_what_frames_are_told() -> None:
    gate = DualMetric(tau_floor=0.97, margin=0.02, alpha=0.3, tau_dev=2.0)
    held = {"action": ((1.0, 0.0), (0.6, 0.8))}

    def score(**fields: Any) -> float:
        return gate.judge(call(held=held, **fields), {"cosine": 0.99, "deviation": 0.0}).scores["cosine"]

    assert score(action=[0.0, 1.0], frame_actions=[[3.0, 0.0], [0.6, 0.8]]) == 0.99
    assert score(frame_actions=[[1.0, 0.0], [0.8, 0.6]]) == pytest.approx(0.96)
    assert score(frame_actions=[[0.28, 0.96], [0.8, 0.6]]) == pytest.approx(0.28)
    assert score(frame_actions=[[1.0, 0.0]]) == score(action=[1.0, 0.0]) == score() == 0.0


# Spans.


@few
@given(st.integers(1, 12), st.integers(0, 6), st.integers(0, 6))
def test_spans_cover_every_block_once(blocks: int, front: int, back: int) -> None:
    spans = OneSpan(front_anchors=front, back_anchors=back)(blocks)
    assert [b for span in spans for b in range(span.first, span.last + 1)] == list(range(blocks))
    assert sum(span.last > span.first for span in spans) == (blocks - front - back > 1)
    assert all(span.first == span.last for span in EachBlock()(blocks))
