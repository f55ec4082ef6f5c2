"""Methods that look from step to step: closed forms, calibration, and what sets each apart."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.method import Policy
from holdover.methods.magcache import magnitude_ratios, measure_magnitudes
from tests.holdover.engine.models import Scale, Stack, ones, reasons
from tests.holdover.naive.magcache import measured
from tests.holdover.toy import BLOCKS, MANY, ToyLoop, ToyModel, cached


class Track(nn.Module):
    """Gives ``path(step)`` wherever it is asked, whatever enters."""

    def __init__(self, path: Callable[[float], float]) -> None:
        super().__init__()
        self.path, self.step = path, 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.path(self.step))


def generate(
    policy: Policy, model: Stack, steps: int, enters: Callable[[int], float] = lambda step: 1.0
) -> tuple[list[float], list[str]]:
    """What leaves the model at every step of one chunk, and block 0's reasons."""
    outputs = []
    with holdover.attach(model, policy) as cache:
        for index in range(steps):
            for block in model.blocks:
                if isinstance(block, Track):
                    block.step = index
            with cache.step(chunk=0, index=index, num_steps=steps, commits=False):
                outputs.append(float(model(ones(enters(index)))[0, 0, 0]))
    return outputs, reasons(cache)[:: len(model.blocks)]


def test_easycache_by_hand() -> None:
    """The block doubles what grows by 1 from 100 on, so K is 2 and a step changes the output by 2 of about 210."""
    outputs, told = generate(holdover.policy("easycache"), Stack(Scale(2.0)), 12, lambda step: 100.0 + step)
    # 2/208 + 2/209 is 0.0192, and with 2/210 it is 0.0287; held over, the output grows as the input does.
    assert told == ["retained"] * 5 + ["reuse", "reuse", "drift"] * 2 + ["last step"]
    assert outputs == [200, 202, 204, 206, 208, 209, 210, 214, 215, 216, 220, 222]


def test_easycache_needs_two_steps_that_differ() -> None:
    policy = holdover.policy("easycache", retain=0)
    _, told = generate(policy, Stack(Scale(2.0)), 6, lambda step: 100.0 + max(step - 2, 0))
    assert told == ["first", "history", "history", "history", "reuse", "last step"]


def test_magcache_by_hand() -> None:
    """Errors of k steps at a ratio of 0.98: 0.02, 0.0396, 0.0588; the sum of two is 0.0596, of three 0.118."""
    told = {}
    for ratio in (0.98, 1.0):
        policy = holdover.policy("magcache", ratios=[ratio] * 10)
        outputs, told[ratio] = generate(policy, Stack(Scale(2.0)), 10, lambda step: 100.0 + step)
        if ratio == 0.98:
            assert outputs == [200, 202, 203, 204, 208, 209, 210, 214, 215, 216]
    assert told[0.98] == ["retained"] * 2 + ["reuse", "reuse", "drift"] * 2 + ["reuse"] * 2
    assert told[1.0] == ["retained"] * 2 + ["reuse"] * 3 + ["stale"] + ["reuse"] * 3 + ["stale"]


def test_magcache_wants_a_ratio_for_every_step() -> None:
    with pytest.raises(ValueError, match="has 10 ratios and the chunk 12 steps; measure the ratios with"):
        generate(holdover.policy("magcache", ratios=[1.0] * 10), Stack(Scale()), 12)


def test_magnitudes_are_measured_over_a_loop() -> None:
    """Per guidance branch, of the latest chunk; and they are of a kind that MagCache takes."""
    model, loop = ToyModel(), ToyLoop(sigmas=MANY, branches=("cond", "uncond"))
    residuals: dict[str, list[Tensor]] = {}
    entered: list[Tensor] = []
    action = (0.8, 0.1)

    def record(fields: dict[str, Any], run: Any) -> Tensor:
        def apply(block: int, x: Tensor, compute: Any) -> Tensor:
            y: Tensor = compute(x)
            if block == 0:
                entered.append(x.clone())
            if block == BLOCKS - 1 and "role" not in fields:
                residuals.setdefault(fields["branch"], []).append(y - entered[-1])
            return y

        return run(apply=apply)

    with holdover.attach(model, measure_magnitudes()) as cache:
        loop.step(model, action, cached(cache))
        again = deepcopy(loop)
        loop.step(model, action, cached(cache))
        snapshot = cache.snapshot()
        assert cache.stats().reused == 0
    again.step(model, action, record)
    assert list(residuals) == ["cond", "uncond"]
    for branch, recorded in residuals.items():
        ratios = magnitude_ratios(snapshot, branch)
        assert ratios == pytest.approx(measured(recorded), rel=1e-5)
        assert ratios[0] == 1
        assert len(ratios) == len(set(ratios)) == len(MANY)
        holdover.policy("magcache", ratios=ratios)
    with pytest.raises(ValueError, match="no ratios of branch '', measured are: 'cond', 'uncond'"):
        magnitude_ratios(snapshot)


def test_magnitudes_of_half_a_chunk_are_refused() -> None:
    with holdover.attach(model := Stack(Scale()), measure_magnitudes()) as cache:
        with cache.step(chunk=0, index=0, num_steps=4):
            model(ones())
        with pytest.raises(ValueError, match="1 of 4 passes have run; take the snapshot after a whole chunk"):
            magnitude_ratios(cache.snapshot())


def test_bwcache_decides_once_by_the_average() -> None:
    """One block grows by a fifth at every step, the other stands still: 0.1 on average."""
    still, grows = Track(lambda t: 50.0), Track(lambda t: 1.2**t)
    outputs, told = generate(holdover.policy("bwcache"), Stack(still, grows), 20)
    assert told == ["first", "history", *["reuse", "reuse", "stale", "change"] * 4, "reuse", "reuse"]
    expected = [1.2 ** (t - (t - 1) % 4 if t > 1 and t % 4 in (2, 3) else t) for t in range(20)]
    assert outputs == pytest.approx(expected)


@pytest.mark.parametrize(("run", "repeats"), [(3, 3), (0.5, 5), (0.01, 1)])
def test_bwcache_repeats_for_its_run(run: float, repeats: int) -> None:
    _, told = generate(holdover.policy("bwcache", run=run), Stack(Track(lambda t: 1.0)), 10)
    assert told == ["first", "history", *(["reuse"] * repeats + ["stale"]) * 8][:10]


@pytest.mark.parametrize("span", ["all", "block"])
@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_is_exact_on_lines(span: str, order: int) -> None:
    policy = holdover.policy("taylorseer", every=4, order=order, span=span)
    outputs, told = generate(policy, Stack(Track(lambda t: -t), Track(lambda t: 3 - 0.25 * t)), 12)
    assert told == (["interval"] + ["reuse"] * 3) * 3
    assert outputs[:5] == [3, 3, 3, 3, 2]  # one step known, then two
    assert outputs[4:] == [3 - 0.25 * t for t in range(4, 12)]


def test_taylorseer_of_order_two_is_its_closed_form() -> None:
    """On t² the slope is that of half an interval ago, so k steps on it is short by N·k."""
    outputs, _ = generate(holdover.policy("taylorseer", every=4, order=2), Stack(Track(lambda t: t * t)), 16)
    assert outputs[8:] == [t * t - 4 * (t % 4) for t in range(8, 16)]


def test_taylorseer_of_order_zero_repeats_the_output() -> None:
    outputs, _ = generate(holdover.policy("taylorseer", every=3, order=0), Stack(Track(lambda t: t)), 6)
    assert outputs == [0, 0, 0, 3, 3, 3]


def test_taylorseer_divides_by_the_true_distance_of_computed_steps() -> None:
    policy = holdover.policy("taylorseer", every=4, order=2, retain=3)
    outputs, told = generate(policy, Stack(Track(lambda t: 2.0 * t)), 8)
    assert told == ["retained"] * 3 + ["reuse", "interval"] + ["reuse"] * 3
    assert outputs == [2.0 * t for t in range(8)]


def test_delta_dit_needs_two_blocks() -> None:
    with pytest.raises(ValueError, match="1 block has no halves"):
        holdover.attach(Stack(Scale()), holdover.policy("delta_dit"))


def test_delta_dit_turns_at_its_share_of_the_steps() -> None:
    model = Stack(Scale(), Scale(), Scale())  # of three blocks the front half is one
    with holdover.attach(model, holdover.policy("delta_dit", every=2, early=0.4)) as cache:
        for index in range(5):
            with cache.step(chunk=0, index=index, num_steps=5, commits=False):
                model(ones())
    assert [block.calls for block in model.blocks] == [4, 4, 4]
    # At step 3 the front half is held from step 2, which its turn begins with.
    assert reasons(cache)[0::3] == ["half", "half", "interval", "reuse", "interval"]
    assert reasons(cache)[1::3] == ["interval", "reuse", "half", "half", "half"]
