"""Methods that look from step to step: closed forms, calibration, and what sets each apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.policies.policy import Policy
from tests.engine.models import Scale, Stack, ones, reasons


class Track(nn.Module):
    """Gives ``path(step)`` wherever it is asked, whatever enters."""

    def __init__(self, path: Callable[[float], float]) -> None:
        super().__init__()
        self.path, self.step = path, 0

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.path(self.step))


def generate(policy: Policy, model: Stack, steps: int) -> tuple[list[float], list[str]]:
    """What leaves the model at every step of one generation, and block 0's reasons."""
    outputs = []
    with holdover.attach(model, policy) as cache:
        for index in range(steps):
            for block in model.blocks:
                block.step = index
            with cache.step(chunk=0, index=index, num_steps=steps, commits=False):
                outputs.append(float(model(ones())[0, 0, 0]))
    return outputs, reasons(cache)[:: len(model.blocks)]


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
