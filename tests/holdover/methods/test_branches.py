"""FasterCache's branch reuse, on outputs whose difference can be told by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import holdover
from holdover import ViewGroup
from holdover.methods.fastercache import low_frequencies

ROWS, COLUMNS = 12, 15


def wave(down: int, across: int) -> Tensor:
    rows, columns = torch.arange(ROWS)[:, None] / ROWS, torch.arange(COLUMNS) / COLUMNS
    return torch.cos(2 * math.pi * (down * rows + across * columns))


class Guided(nn.Module):
    """Adds to its input what the prompt says: a picture."""

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return 2 * x + prompt


def test_low_frequencies_are_those_within_a_fifth_of_the_shorter_side() -> None:
    for down, across, is_low in [(0, 0, True), (2, 0, True), (1, -1, True), (2, 1, False), (0, 3, False)]:
        picture = wave(down, across)
        expected = picture if is_low else torch.zeros_like(picture)
        torch.testing.assert_close(low_frequencies(picture), expected, atol=1e-5, rtol=0)


def differences(run: list[str], **options: Any) -> tuple[list[Tensor], list[str]]:
    """Per pass, named by its branch, how far the output is from what was put in; and the reasons."""
    model, steps = Guided(), {"cond": -1, "uncond": -1}
    prompts = {"cond": 3 * wave(0, 1) + wave(4, 4), "uncond": wave(0, 0)}
    policy = holdover.policy("fastercache", every=99, retain=0, **options)
    outputs = []
    with holdover.attach(model, policy) as cache:
        for branch in run:
            steps[branch] += 1
            x = torch.full((1, 1, ROWS, COLUMNS), float(steps[branch]))
            with cache.step(chunk=0, index=steps[branch], num_steps=4, branch=branch):
                outputs.append(model(x, prompts[branch]) - 2 * x)
    return outputs, [decision.reason for decision in cache.trace]


def test_with_weights_of_one_the_difference_is_added_as_it_was() -> None:
    outputs, reasons = differences(["cond", "uncond"] * 4, low=1.0, high=1.0)
    assert reasons == ["guide", "interval", *["guide", "reuse"] * 3]
    for output in outputs[1::2]:
        torch.testing.assert_close(output[0, 0], wave(0, 0), atol=1e-5, rtol=0)


def test_low_frequencies_are_weighted_first_then_the_others() -> None:
    outputs, _ = differences(["cond", "uncond"] * 4, low=1.5, high=0.5, switch=0.5)
    cond, low, high = 3 * wave(0, 1) + wave(4, 4), wave(0, 0) - 3 * wave(0, 1), -wave(4, 4)
    for step, expected in ((1, 1.5 * low + high), (2, low + 0.5 * high), (3, low + 0.5 * high)):
        torch.testing.assert_close(outputs[2 * step + 1][0, 0], cond + expected, atol=1e-5, rtol=0)


def test_a_branch_that_comes_before_its_guide_is_computed() -> None:
    outputs, reasons = differences(["uncond", "cond"] * 3)
    assert set(reasons) == {"guide"}
    assert all(torch.equal(output[0, 0], wave(0, 0)) for output in outputs[::2])


def test_what_was_computed_without_its_guide_tells_no_difference() -> None:
    _, reasons = differences(["uncond", "cond", "cond", "uncond", "cond", "uncond"])
    assert reasons == ["guide", "guide", "guide", "history", "guide", "reuse"]


def test_a_difference_from_an_old_condition_is_not_used() -> None:
    model = Guided()
    with holdover.attach(model, holdover.policy("fastercache", every=99, retain=0)) as cache:
        for index in range(4):
            prompt = torch.full((1, 1, 4, 4), float(index > 1))
            for branch, condition in (("cond", index > 1), ("uncond", None)):
                with cache.step(chunk=0, index=index, num_steps=4, branch=branch, condition=condition):
                    model(torch.zeros(1, 1, 4, 4), prompt)
    assert [d.reason for d in cache.trace if d.branch == "uncond"] == ["interval", "reuse", "condition", "reuse"]


def test_tokens_are_laid_out_as_their_grids_say() -> None:
    """Two views, one frame after the other: each is a picture of its own."""
    part = holdover.policy("fastercache", grids=[ViewGroup("side", 2, ROWS, COLUMNS)]).predictor
    pictures = torch.stack([wave(0, 1), wave(5, 0), wave(4, 4), wave(1, 1)])  # frame 0: two views, frame 1: two
    low = part._low(pictures.reshape(1, -1, 1))  # type: ignore[union-attr]
    expected = torch.stack([wave(0, 1), 0 * wave(0, 0), 0 * wave(0, 0), wave(1, 1)])
    torch.testing.assert_close(low.reshape(pictures.shape), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "uncond"}, "branch and guide are both 'uncond'"),
        ({"switch": 1.5}, "switch=1.5 is not a share"),
        ({"low": -1.0}, "low=-1.0 is negative"),
        ({"grids": [3]}, r"grids=\(3,\) holds what is no token grid"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy("fastercache", **options)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 17), st.integers(1, 17), st.integers(0, 99))
def test_low_frequencies_are_a_projection(h: int, w: int, seed: int) -> None:
    """Taken twice they are the same; what is left is orthogonal to them and has no mean."""
    picture = torch.randn(h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low = low_frequencies(picture)
    torch.testing.assert_close(low_frequencies(low), low)
    torch.testing.assert_close(low.mean(), picture.mean())
    assert abs((low * (picture - low)).sum()) < 1e-9
