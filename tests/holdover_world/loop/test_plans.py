"""What the frames of a window are told: what was commanded, then what the driver intends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from holdover_world.loop.batch import advance
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from tests.holdover_world.loop.test_protocol import START, TOLD, Counter, StackingCounter


class Hearing(Counter):
    """A counter that notes what its frames are told, in the first pass of each chunk; of windows of four."""

    class sizes:  # noqa: N801
        window = 4

    def __init__(self) -> None:
        self.told: list[list[float]] = []

    def __call__(self, latents_BFNP: Tensor, /, **inputs: Any) -> Tensor:
        if inputs["sigma"] == 1:
            self.told.append(inputs["action_BFA"][0, :, 0].tolist())
        return super().__call__(latents_BFNP, **inputs)


def loop(model: Counter, **changes: Any) -> ClosedLoop[Any]:
    return ClosedLoop(model, torch.zeros(1, 4, 3, 1), torch.zeros(1, 4, 1), config=LoopConfig(**changes))


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1)


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (None, [1, 1, 1, 1]),  # the newest is held
        (column(2, 3, 4), [1, 2, 3, 4]),
        (column(2, 3, 4, 5, 6), [1, 2, 3, 4]),  # longer: the rest is left out
        (column(2), [1, 2, 2, 2]),  # shorter: the last is held
        (torch.zeros(0, 1), [1, 1, 1, 1]),
        (column(2, 3, 4)[:, None], [1, 2, 3, 4]),  # a plan for each row
    ],
)
def test_frames_ahead_follow_the_plan(plan: Tensor | None, told: list[float]) -> None:
    model = Hearing()
    loop(model).step(torch.tensor([1.0]), plan)
    assert model.told == [told]


def test_a_plan_may_be_revised_at_every_chunk() -> None:
    model = Hearing()
    run = loop(model)
    for action, plan in [(1.0, column(2, 3)), (5.0, column(6)), (7.0, None), (8.0, column(9))]:
        run.step(torch.tensor([action]), plan)
    # What was commanded is never told otherwise, and a plan that was given before is not known any more.
    assert model.told == [[1, 2, 3, 3], [1, 5, 6, 6], [1, 5, 7, 7], [1, 5, 7, 8]]


def test_an_oracle_plan_is_always_kept() -> None:
    model, actions = Hearing(), column(1, 2, 3, 4, 5, 6)
    list(loop(model).run(actions, [actions[n + 1 :] for n in range(len(actions))]))
    assert model.told == [[1, 2, 3, 4]] * 4 + [[5, 6, 6, 6]] * 2


def test_every_row_has_a_plan_of_its_own() -> None:
    told: list[Tensor] = []

    class Rows(Hearing):
        def __call__(self, latents_BFNP: Tensor, /, **inputs: Any) -> Tensor:
            told.append(inputs["action_BFA"][..., 0])
            return super().__call__(latents_BFNP, **inputs)

    run = ClosedLoop(Rows(), torch.zeros(2, 4, 3, 1), torch.zeros(2, 4, 1))
    run.step(column(1, 2), torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]]]))
    assert told[1].tolist() == [[1, 3, 5, 5], [2, 4, 6, 6]]


def test_the_plain_cadence_has_no_frames_ahead() -> None:
    model = Hearing()
    list(loop(model, cadence="plain").run(column(1, 2), [column(5), column(6)]))
    assert model.told == [[1], [2]]


def test_what_was_carried_out_goes_into_the_history_and_not_what_was_planned() -> None:
    run = ClosedLoop(Counter(), START, TOLD)
    run.step(torch.tensor([1.0]), column(3))
    run.step(torch.tensor([5.0]))
    assert run.history.done[-1][0, :, 0].tolist() == [1, 5]
    # Committed is the first window, which was drawn with the plan: 1, 1 + 3. So the next one starts from 5.
    assert run.step(torch.tensor([0.0])).latents.mean().item() == 5


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (torch.zeros(3, 2), r"plan \(3, 2\) does not fit; give \[T, 1\] or \[T, 1, 1\]"),
        (torch.zeros(3), r"plan \(3,\) does not fit"),
        (torch.zeros(3, 2, 1), r"plan \(3, 2, 1\) does not fit"),
        (torch.zeros(0, 2), r"plan \(0, 2\) does not fit"),
        (column(1, float("nan")), r"plan=\[\[1.0\], \[nan\]\] is not finite; give normalised actions"),
        (column(1, 2, 3, 4, float("inf")), "is not finite"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_nothing_has_happened(plan: Tensor, message: str) -> None:
    model = StackingCounter()
    loops = [ClosedLoop(model, START, TOLD) for _ in range(2)]
    with pytest.raises(ValueError, match=message):
        advance(loops, [torch.tensor([1.0])] * 2, [None, plan])
    assert [each.chunk for each in loops] == [0, 0]
    made = advance(loops, [torch.tensor([1.0]), torch.tensor([2.0])], [None, column(4)])
    assert [piece.latents.mean().item() for piece in made] == [1, 2]


def test_a_plan_that_is_kept_changes_nothing_but_the_frames_ahead() -> None:
    """A counter's piece depends on the actions up to it alone."""
    actions = column(1, 3, 10, 0)
    held = [piece.latents.mean().item() for piece in loop(Counter(), commit="emitted").run(actions)]
    plans = [actions[n + 1 :] for n in range(4)]
    planned = [piece.latents.mean().item() for piece in loop(Counter(), commit="emitted").run(actions, plans)]
    assert planned == held == [1, 4, 5 + 10, 5 + 10]
