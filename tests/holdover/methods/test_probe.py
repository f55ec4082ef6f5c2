"""DiCache and WorldCache-PCD: drift, threshold, factor and warp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import holdover
from holdover.methods.dicache import Extrapolate
from holdover.methods.optical_flow import Warp, lucas_kanade, sample
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.worldcache_pcd import SalientChange, ScheduledAccumulate
from tests.holdover.engine.models import Scale, Stack
from tests.holdover.methods.test_parts import call, few
from tests.holdover.naive import worldcache_pcd as naive
from tests.holdover.toy import GROUPS, MANY, ToyLoop, ToyModel, cached, drive

seeds = st.integers(0, 10**6)


def play(policy: holdover.Policy) -> tuple[list[Tensor], list[Any], holdover.Cache]:
    model, loop = ToyModel(), ToyLoop(sigmas=MANY)
    with holdover.attach(model, policy) as cache:
        outputs = [loop.step(model, action, cached(cache)) for action in drive(6)]
    return outputs, [(d.block, d.computed, d.reason, d.scores) for d in cache.trace], cache


def metrics(signal: Any, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of pairs of probe output and input."""
    reading = signal.prepare(now[0].shape, now[0].device, ())
    read = [reading.read(call(x=z, pass_input=x)) for z, x in (now, then)]
    found: dict[str, float] = reading.metrics(reading.compare(*read).tolist())
    return found


@pytest.mark.parametrize("threshold", [0.08, 0.2])
def test_worldcache_pcd_without_its_modules_is_dicache(threshold: float) -> None:
    off = {"probe": 1, "swd": False, "cfc": False, "ats": False, "ofa": False}
    outputs, trace, _ = play(holdover.policy("worldcache_pcd", threshold=threshold, **off))
    expected, expected_trace, cache = play(holdover.policy("dicache", threshold=threshold))
    assert trace == expected_trace
    assert all(map(torch.equal, outputs, expected))
    assert cache.stats().reused > 20


@few
@given(seeds)
def test_without_salience_the_drift_is_plain(seed: int) -> None:
    z, x, z_prev, x_prev = torch.randn(4, 2, 12, 5, generator=torch.Generator().manual_seed(seed))
    found = metrics(SalientChange(0.0), (z, x), (z_prev, x_prev))
    plain = metrics(RelativeChange("input", follows=True), (z, x), (z_prev, x_prev))
    assert found["change"] == pytest.approx(plain["change"], rel=1e-5)
    assert found["motion"] == pytest.approx(float((x - x_prev).abs().sum() / x_prev.abs().sum()), rel=1e-5)


def test_drift_counts_more_where_the_picture_has_structure() -> None:
    """Two tokens of one frame: the first without structure, the second with the largest variance."""
    z_prev, x = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
    z = torch.tensor([[[2.0, 2.0], [1.0, 3.0]]])  # moved by 1 and by 1 on average; saliency 0 and 1
    assert metrics(SalientChange(0.5), (z, x), (z_prev, x))["change"] == pytest.approx((1 * 1 + 1 * 1.5) / 2)
    frames = (holdover.ViewGroup("front", 1, 1, 1),)  # two frames of one token: one place, and nothing stands out
    reading = SalientChange(0.5).prepare(z.shape, z.device, frames)
    pair = [reading.read(call(x=value, pass_input=x)) for value in (z, z_prev)]
    assert reading.metrics(reading.compare(*pair).tolist())["change"] == pytest.approx(1)
    with pytest.raises(ValueError, match="2 tokens is not whole frames of the 3"):
        SalientChange(0.5).prepare(z.shape, z.device, (holdover.ViewGroup("front", 1, 1, 3),))


def test_the_rows_of_a_batch_drift_by_themselves() -> None:
    inputs = torch.randn(6, 2, 8, 4, generator=torch.Generator().manual_seed(3))
    policy = holdover.policy("worldcache_pcd", threshold=1e9, probe=1, retain=1)
    scores = []
    for rows in (["a", "b"], ["a"], ["b"]):
        model = Stack(Scale(), Scale(1.5), Scale(1.1))
        with holdover.attach(model, policy) as cache:
            for index, x in enumerate(inputs):
                steps = [holdover.Step(chunk=0, index=index, num_steps=6, stream=row) for row in rows]
                with cache.step(rows=steps):
                    model(x[["ab".index(row) for row in rows]])
        scores.append({row: [d.scores for d in cache.trace if d.stream == row] for row in rows})
    assert scores[0] == {**scores[1], **scores[2]}
    assert scores[0]["a"] != scores[0]["b"]


def test_the_threshold_falls_with_motion_and_rises_with_the_step() -> None:
    def threshold(index: int, steps: int, **options: Any) -> float:
        gate = ScheduledAccumulate(metric="change", threshold=0.1, **{"alpha": None, "beta_d": None, **options})
        verdict = gate.judge(call(index=index, num_steps=steps), {"change": 0.01, "motion": 0.25})
        return verdict.scores["threshold"]

    assert threshold(7, 35) == 0.1
    assert threshold(7, 35, alpha=2.0) == pytest.approx(0.1 / 1.5)
    assert threshold(7, 35, beta_d=4.0) == pytest.approx(0.1 * 1.8)
    assert threshold(7, 35, beta_d="code") == pytest.approx(0.1 * 1.8)
    assert threshold(35, 70, beta_d="code") == pytest.approx(0.1 * 3.5)  # 4/6 + 1 + 10/3 = 5, at half of the steps
    assert threshold(0, 35, alpha=2.0, beta_d=4.0) == pytest.approx(0.1 / 1.5)


@few
@given(seeds, st.floats(1, 2))
def test_on_a_line_both_factors_agree(seed: int, along: float) -> None:
    P1, P2, R1, R2, x = torch.randn(5, 1, 12, 5, generator=torch.Generator().manual_seed(seed))
    z = x + P2 + along * (P1 - P2)
    told = call(x=z, pass_input=x, held={"tensors": {"P1": P1, "P2": P2, "R1": R1, "R2": R2}})
    ratio, projection = Extrapolate(gamma="ratio", clamp=(1, 2)), Extrapolate(gamma="projection", clamp=(0, 2))
    assert float(projection.factor(told)) == pytest.approx(float(ratio.factor(told)), abs=1e-5)
    torch.testing.assert_close(projection.predict(told), x + R2 + along * (R1 - R2), rtol=1e-4, atol=1e-4)


def test_the_factor_is_clamped() -> None:
    zero, one = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    held = {"tensors": {"P1": one, "P2": zero, "R1": one, "R2": zero}}
    factors = {}
    for gone in (-3, 0, 0.5, 3):
        told = call(x=one * gone, pass_input=zero, held=held)
        kinds = (("ratio", (1.0, 2.0)), ("projection", (0.0, 2.0)), ("projection", (0.2, 1.8)))
        factors[gone] = [float(Extrapolate(gamma=g, clamp=c).factor(told)) for g, c in kinds]  # type: ignore[arg-type]
    assert factors == {
        -3: [2, 0, pytest.approx(0.2)],
        0: [1, 0, pytest.approx(0.2)],
        0.5: [1, pytest.approx(0.5), pytest.approx(0.5)],
        3: [2, 2, pytest.approx(1.8)],
    }
    still = {"tensors": {"P1": one, "P2": one, "R1": one, "R2": zero}}  # the probe did not move, the tail did
    for gamma in ("ratio", "projection"):
        told = call(x=one, pass_input=zero, held=still)
        assert Extrapolate(gamma=gamma, clamp=(0, 2)).predict(told).isfinite().all()  # type: ignore[arg-type]


# The warp.


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 3)])
def test_the_flow_is_the_twins(size: tuple[int, int]) -> None:
    then, now = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    flow = lucas_kanade(then, now)
    for n in range(3):
        expected = naive.flow(then[n].double().numpy(), now[n].double().numpy())
        np.testing.assert_allclose(flow[n].numpy(), expected, rtol=1e-3, atol=1e-4)
    x = torch.rand(3, *size, 2, generator=torch.Generator().manual_seed(2))
    moved, rows, columns = sample(x, flow), range(size[0]), range(size[1])
    for n, i, j in ((n, i, j) for n in range(3) for i in rows for j in columns):
        row, column = i + float(flow[n, i, j, 0]), j + float(flow[n, i, j, 1])
        np.testing.assert_allclose(moved[n, i, j].numpy(), naive.bilinear(x[n].numpy(), row, column), atol=1e-5)


def test_a_picture_that_moved_is_found_again() -> None:
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(32.0), indexing="ij")
    then = (torch.sin(row / 4) + torch.cos(column / 5))[None]
    now = (torch.sin((row - 1) / 4) + torch.cos((column - 2) / 5))[None]  # a row further down, two columns to the right
    flow = lucas_kanade(then, now)[0, 6:-6, 6:-6].mean((0, 1))
    assert flow.tolist() == pytest.approx([-1, -2], abs=0.35)
    warped = sample(then[..., None], lucas_kanade(then, now))[..., 0]
    inner = (slice(None), slice(4, -4), slice(4, -4))
    assert (warped - now)[inner].abs().mean() < 0.3 * (then - now)[inner].abs().mean()


@few
@given(seeds)
def test_no_flow_changes_no_bit(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, 1, 96, 5, generator=source)
    warp = Warp(GROUPS)
    assert torch.equal(warp.along(warp.picture(x), x)(residual), residual)
    pictures = torch.randn(2, 4, 6, 3, generator=source)
    assert torch.equal(sample(pictures, torch.zeros(2, 4, 6, 2)), pictures)


def test_tokens_move_within_their_own_view() -> None:
    """One picture of two moves; the tokens of the other, and of the other frame, stay where they are."""
    groups = (holdover.ViewGroup("front", 1, 4, 6), holdover.ViewGroup("side", 1, 4, 4))
    then = torch.rand(1, 80, 1, generator=torch.Generator().manual_seed(0))
    now = then.clone()
    now[:, 64:80] = then[:, 64:80].roll(1, 1)  # the side view of the second frame
    residual = torch.rand(1, 80, 3, generator=torch.Generator().manual_seed(1))
    warp = Warp(groups)
    moved = warp.along(warp.picture(then), now)(residual)
    assert torch.equal(moved[:, :64], residual[:, :64])
    assert not torch.equal(moved[:, 64:], residual[:, 64:])
    with pytest.raises(ValueError, match="79 tokens are not whole frames of the 40"):
        warp.along(warp.picture(then[:, :79]), now[:, :79])


def test_the_warp_runs_within_the_method() -> None:
    warped, _, cache = play(holdover.policy("worldcache_pcd", warp=GROUPS, beta_d=1.0))
    plain, _, _ = play(holdover.policy("worldcache_pcd", beta_d=1.0))
    assert cache.stats().reused > 20
    assert not all(map(torch.equal, warped, plain))
    assert all(output.isfinite().all() for output in warped)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dicache", {"probe": 0}, "probe=0: give a whole number of blocks, 1 or more"),
        ("dicache", {"threshold": -1}, "threshold=-1 is negative"),
        ("dicache", {"retain": 1.5}, "retain=1.5: give"),
        ("dicache", {"protection": "off"}, "protection='off' is not one of"),
        ("worldcache_pcd", {"probe": 0}, "probe=0: give a whole number of blocks, 1 or more"),
        ("worldcache_pcd", {"beta_s": -1}, "beta_s=-1 is negative"),
        ("worldcache_pcd", {"alpha": -1}, "alpha=-1 is negative"),
        ("worldcache_pcd", {"beta_d": -1}, "beta_d=-1 is negative"),
        ("worldcache_pcd", {"beta_d": "paper"}, "beta_d='paper' is neither a number nor 'code'"),
        ("worldcache_pcd", {"warp": [(4, 6)]}, r"warp=\(\(4, 6\),\) holds what is no token grid"),
        ("worldcache_pcd", {"gamma": (2, 1)}, r"gamma=\(2, 1\) is not a range"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy(name, **options)


class InPlace(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(self.factor)


@pytest.mark.parametrize("probe", [Scale, InPlace])
def test_a_probe_may_overwrite_its_input(probe: type[Scale]) -> None:
    """Its residual is that of what entered: 1, 1.1, 2, so that it changes by 0, 0.1, 1."""
    model = Stack(probe(2.0), Scale(3.0), Scale(5.0))
    with holdover.attach(model, holdover.policy("fbcache", threshold=0.5)) as cache:
        for index, value in enumerate((1.0, 1.0, 1.1, 2.0)):
            with cache.step(chunk=0, index=index, num_steps=4, commits=False):
                out = model(torch.full((1, 3, 2), value))
    assert [d.reason for d in cache.trace if d.block == 1] == ["first", "reuse", "reuse", "change"]
    changes = [d.scores["change"] for d in cache.trace if d.block == 1 and d.scores]
    assert changes == pytest.approx([0.0, 0.1, 1.0], abs=1e-6)
    assert torch.equal(out, torch.full((1, 3, 2), 60.0))


def test_a_change_in_half_precision_is_that_of_single() -> None:
    """A bfloat16 signal is compared as it is; the mean is float32."""
    source = torch.Generator().manual_seed(0)
    now, drift = (torch.randn(1, 512, 64, generator=source) for _ in range(2))
    pair = [value.bfloat16() for value in (now + 0.05 * drift, now)]
    expected = float((pair[0].double() - pair[1].double()).abs().mean() / pair[1].double().abs().mean())
    reading = RelativeChange("input").prepare(now.shape, now.device, ())
    read = [reading.read(call(x=value)) for value in pair]
    assert all(signal.dtype == torch.bfloat16 for signal in read)
    assert reading.metrics(reading.compare(*read).tolist())["change"] == pytest.approx(expected, rel=1e-3)
