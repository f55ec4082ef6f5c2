"""WorldCache-HTC: curvature, groups, prediction and how often it computes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import holdover
from holdover.methods.worldcache_htc import CHAOTIC, LINEAR, PINNED, STABLE, TokenCurvature
from tests.holdover.methods.test_parts import call, few
from tests.holdover.toy import MANY, ToyLoop, ToyModel, cached, drive

OPTIONS: dict[str, Any] = {"stable": 0.3, "chaotic": 0.6, "n_max": 4, "drift_reduction": "chaotic"}
OPTIONS |= {"relative_epsilon": 0.0, "pinned": 0, "modalities": ()}
AETHER: dict[str, Any] = {}
VOYAGER: dict[str, Any] = {"chaotic": 0.70, "n_max": 6, "retain": 5}
NUMBERS = {"drift": 0.0, "shown": 4.0, "s0": 4.0, "s1": 2.0, "s2": 1.0}


class Curve(nn.Module):
    """Its output is a parabola of time, another for every token."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.terms = torch.randn(3, 1, 20, width, generator=torch.Generator().manual_seed(5))

    def forward(self, x: Tensor, t: float) -> Tensor:
        return self.terms[0] + self.terms[1] * t + self.terms[2] * t * t


def run(model: nn.Module, steps: int = 50, **options: Any) -> holdover.Cache:
    with holdover.attach(model, holdover.policy("worldcache_htc", **options)) as cache:
        for index in range(steps):
            with cache.step(chunk=0, index=index, num_steps=steps):
                model(torch.zeros(1, 20, 3), index / steps)
    return cache


def outputs(path: Any) -> dict[str, Tensor]:
    return {f"y{n}": path(NUMBERS[f"s{n}"]) for n in range(3)}


def held(part: TokenCurvature, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kappa, group = part.groups(tensors, (NUMBERS["s0"], NUMBERS["s1"], NUMBERS["s2"]))
    return {"tensors": {**tensors, "kappa": kappa, "group": group}, "numbers": dict(NUMBERS)}


@pytest.mark.parametrize(
    ("preset", "eta", "full"),
    [(VOYAGER, math.inf, 12), (VOYAGER, 1e-9, 28), (AETHER, math.inf, 24), (AETHER, 1e-9, 30)],
)
def test_golden_counts_of_full_steps(preset: dict[str, Any], eta: float, full: int) -> None:
    """If the drift never trips, and if every predicted step trips it."""
    assert run(Curve(), eta=eta, **preset).stats().computed == full


def test_the_defaults_of_eta_go_with_the_reduction() -> None:
    policy = holdover.policy
    assert policy("worldcache_htc") == policy("worldcache_htc", eta=0.5)
    assert policy("worldcache_htc", drift_reduction="all") == policy("worldcache_htc", drift_reduction="all", eta=0.2)


@few
@given(st.integers(0, 10**6))
def test_a_token_on_a_line_has_no_curvature_and_is_carried_on_exactly(seed: int) -> None:
    start, speed = torch.randint(-8, 9, (2, 1, 5, 3), generator=torch.Generator().manual_seed(seed)).float()
    part = TokenCurvature(**{**OPTIONS, "stable": 0.0, "chaotic": 1.0})
    kept = held(part, outputs(lambda t: start + t * speed))
    assert torch.equal(kept["tensors"]["kappa"], torch.zeros(1, 5))
    kept["tensors"]["group"].fill_(LINEAR)
    assert torch.equal(part.predict(call(index=7, num_steps=9, held=kept)), start + 7 * speed)


@few
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.sampled_from([0.0, 0.1]))
def test_the_scale_of_the_output_leaves_the_drift_alone(seed: int, scale: float, relative: float) -> None:
    terms = torch.randn(3, 1, 20, 3, generator=torch.Generator().manual_seed(seed))
    part, drifts = TokenCurvature(**{**OPTIONS, "relative_epsilon": relative}), []
    for factor in (1.0, scale):
        kept = held(part, outputs(lambda t, factor=factor: factor * (terms[0] + terms[1] * t + terms[2] * t * t)))
        told = call(index=5, num_steps=9, held=kept)
        drifts.append(part.reused(told, part.predict(told))["drift"])
    assert drifts[1] == pytest.approx(drifts[0], rel=2e-2)  # up to ε, which is absolute
    assert drifts[0] > 0


def test_each_group_goes_its_own_way() -> None:
    y0, y1, y2 = torch.randn(3, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    group = torch.tensor([[STABLE, LINEAR, CHAOTIC]], dtype=torch.int8)
    tensors = {"y0": y0, "y1": y1, "y2": y2, "group": group, "kappa": torch.ones(1, 3)}
    predicted = TokenCurvature(**OPTIONS).predict(
        call(index=6, num_steps=9, held={"tensors": tensors, "numbers": NUMBERS})
    )
    v0, v1 = (y0 - y1) / 2, y1 - y2
    damped = y0 + 2 * (0.5 * v0 + 0.5 * v1)  # two of four steps: x = ½, and so is α
    expected = torch.stack([y0[0, 0], (y0 + 2 * v0)[0, 1], damped[0, 2]])
    torch.testing.assert_close(predicted[0], expected)


def test_groups_are_quantiles_pooled_or_by_modality_without_the_pinned() -> None:
    curved = torch.arange(1.0, 11.0)[None, :, None]  # tokens of one speed at s0, the later the more curved

    def path(t: float) -> Tensor:
        return 20 * (t - 4) + curved * (t - 4) * (t - 2)

    def groups(**options: Any) -> list[int]:
        part = TokenCurvature(**{**OPTIONS, "stable": 0.5, "chaotic": 0.75, **options})
        found: list[int] = part.groups(outputs(path), (4.0, 2.0, 1.0))[1][0].tolist()
        return found

    S, L, C, P = STABLE, LINEAR, CHAOTIC, PINNED
    assert groups() == [S] * 5 + [L] * 2 + [C] * 3
    assert groups(modalities=(5, 5)) == [S, S, L, C, C] * 2
    assert groups(pinned=5) == [P] * 5 + [S, S, L, C, C]
    assert groups(pinned=(0, 9)) == [P, *[S] * 4, *[L] * 2, *[C] * 2, P]
    with pytest.raises(ValueError, match=r"modalities=\(5, 4\) are 9 tokens, the model has 10"):
        groups(modalities=(5, 4))
    with pytest.raises(ValueError, match="pinned names token 10, the model has 10"):
        groups(pinned=(10,))


def test_a_token_that_stands_still_no_longer_dominates() -> None:
    terms = torch.randn(3, 1, 20, 3, generator=torch.Generator().manual_seed(0))
    terms[1:, :, 0] *= 1e-4
    for relative, worst in ((0.0, True), (0.1, False)):
        kappa, _ = TokenCurvature(**{**OPTIONS, "relative_epsilon": relative}).groups(
            outputs(lambda t: terms[0] + terms[1] * t + terms[2] * t * t), (4.0, 2.0, 1.0)
        )
        assert bool(kappa.argmax() == 0) == worst


@pytest.mark.parametrize("reduction", ["chaotic", "all"])
@pytest.mark.parametrize("name", ["y0", "kappa"])
def test_a_drift_that_is_no_number_is_computed(reduction: str, name: str) -> None:
    model = Curve()
    policy = holdover.policy("worldcache_htc", drift_reduction=reduction, eta=1e9, retain=3, n_max=6)
    with holdover.attach(model, policy) as cache:
        for index in range(6):
            with cache.step(chunk=0, index=index, num_steps=20):
                model(torch.zeros(1, 20, 3), index / 20)
            if index == 2:
                (entry,) = cache._runtimes[0].streams["default"].entries.values()
                quiet = int((entry.tensors["group"] == STABLE).flatten().nonzero()[0])  # not one that is counted
                entry.tensors[name][0, quiet] = math.nan
    assert [d.reason for d in cache.trace] == ["retained"] * 3 + ["reuse", "nan", "reuse"]


def test_the_output_may_have_another_shape_than_the_input() -> None:
    cache = run(Curve(width=7), eta=math.inf)
    assert cache.stats().computed == 24


def test_a_branch_that_knows_too_little_is_computed() -> None:
    """Guidance that sets in late: the first branch predicts, the second has no history yet."""
    model = ToyModel()
    with holdover.attach(model, holdover.policy("worldcache_htc", retain=0, eta=math.inf, n_max=99)) as cache:
        for index in range(6):
            for branch in ("cond", "uncond")[: 1 if index < 2 else 2]:
                with cache.step(chunk=0, index=index, num_steps=9, branch=branch):
                    model(torch.randn(1, 192, 6), sigma=0.5, action=torch.zeros(1, 2))
    told = {branch: [d.reason for d in cache.trace if d.branch == branch] for branch in ("cond", "uncond")}
    assert told["cond"] == ["first", "history", "history", "reuse", "reuse", "reuse"]
    assert told["uncond"] == ["branch", "history", "history", "reuse"]


def test_what_the_caller_writes_into_the_output_does_no_harm() -> None:
    def rollout(spoil: bool) -> list[Tensor]:
        def runner(fields: dict[str, Any], run: Any) -> Tensor:
            output = cached(cache)(fields, run)
            kept = output.clone()
            if spoil:
                output.fill_(math.nan)
            return kept

        model, loop = ToyModel(), ToyLoop(sigmas=MANY)
        with holdover.attach(model, holdover.policy("worldcache_htc")) as cache:
            return [loop.step(model, action, runner) for action in drive(3)]

    assert all(map(torch.equal, rollout(True), rollout(False)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stable": 0.7}, "stable=0.7, chaotic=0.6: give shares"),
        ({"chaotic": 1.1}, "chaotic=1.1: give shares"),
        ({"n_max": 0}, "n_max=0: give a whole number of steps, 1 or more"),
        ({"eta": -1}, "eta=-1 is negative"),
        ({"drift_reduction": "mean"}, "drift_reduction='mean' is not one of 'chaotic', 'all'"),
        ({"relative_epsilon": -1}, "relative_epsilon=-1 is negative"),
        ({"retain": 1.5}, "retain=1.5: give"),
        ({"pinned": -1}, "pinned=-1 is negative"),
        ({"pinned": (3, -1)}, r"pinned=\(3, -1\) is negative"),
        ({"modalities": (0, 5)}, r"modalities=\(0, 5\): give how many tokens"),
        ({"protection": "off"}, "protection='off' is not one of"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy("worldcache_htc", **options)
