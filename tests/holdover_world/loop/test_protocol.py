"""The loop drives any model that satisfies its protocol: one without cameras, layout or ego."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from holdover_world.loop.batch import advance, batches
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.protocol import LoopModel
from holdover_world.loop.state import LoopState
from tests.holdover_world.small import small_layout

START = torch.zeros(1, 2, 3, 1)
TOLD = torch.zeros(1, 2, 1)


@dataclass
class Sum:
    """What a counter remembers: the sum of the frames written, how many there are, and what was done meanwhile."""

    total: Tensor = field(default_factory=lambda: torch.zeros(1))
    frames: int = 0
    done: tuple[Tensor | None, ...] = ()

    @property
    def length(self) -> int:
        return min(self.frames, 2)

    def write(self, latents_BFNP: Tensor, done_BFA: Tensor | None) -> None:
        self.total = self.total + latents_BFNP[..., 0].mean(2).sum(1)
        self.frames += latents_BFNP.shape[1]
        self.done += (done_BFA,)

    def fork(self) -> Sum:
        return replace(self)


class Counter:
    """Every latent frame is the sum of all frames before, plus the actions since. Noise does not matter to it."""

    sizes = SimpleNamespace(window=2)

    def new_history(self) -> Sum:
        return Sum()

    def __call__(
        self,
        latents_BFNP: Tensor,
        /,
        *,
        sigma: float,
        action_BFA: Tensor | None,
        history: Any,
        write: bool = False,
        done_BFA: Tensor | None = None,
    ) -> Tensor:
        assert action_BFA is not None
        if write:
            history.write(latents_BFNP, done_BFA)
        ends = history.total[:, None] + action_BFA.sum(-1).cumsum(1)
        return ends[..., None, None].expand_as(latents_BFNP).clone()


class SavedSum(Sum):
    """A sum that goes into files."""

    def state_dict(self) -> dict[str, Tensor]:
        return {"total": self.total, "frames": torch.tensor(self.frames)}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.total, self.frames = tensors["total"], int(tensors["frames"])


class Sums:
    """Several sums, a row each."""

    def __init__(self, sums: Sequence[Sum]) -> None:
        self.sums = sums

    @property
    def total(self) -> Tensor:
        return torch.cat([each.total for each in self.sums])

    def write(self, latents_BFNP: Tensor, done_BFA: Tensor | None) -> None:
        done = [None] * len(self.sums) if done_BFA is None else done_BFA.split(1)
        for each, *row in zip(self.sums, latents_BFNP.split(1), done, strict=True):
            each.write(*row)


class StackingCounter(Counter):
    """A counter for several videos at once."""

    def new_history(self) -> SavedSum:
        return SavedSum()

    def stack(self, histories: Sequence[Sum]) -> Sums:
        return Sums(histories)


def drive(loop: ClosedLoop[Any], actions: Sequence[float]) -> list[float]:
    return [loop.step(torch.tensor([action])).latents.mean().item() for action in actions]


def test_a_counter_is_driven() -> None:
    """By hand: a window of two frames, of which the first chunk's is committed, whatever the second is told."""
    model: LoopModel = Counter()
    loop = ClosedLoop(model, START, TOLD)
    # 1; then 1 + 3. Committed are 1 and 1 + 1, so that the next window starts from 3.
    assert drive(loop, [1, 3, 10, 0]) == [1, 4, 3 + 10, 3 + 10]
    started, *later = loop.history.done
    assert started is None
    assert [each[0, :, 0].tolist() for each in later] == [[1, 3], [10, 0]]


def test_it_commits_what_was_emitted_if_told_to() -> None:
    loop = ClosedLoop(Counter(), START, TOLD, config=LoopConfig(commit="emitted"))
    assert drive(loop, [1, 3, 10]) == [1, 4, 5 + 10]


def test_a_fork_goes_its_own_way() -> None:
    loop = ClosedLoop(Counter(), START, TOLD)
    drive(loop, [1])
    twin = loop.fork("twin")
    assert drive(loop, [3, 0]) == [4, 3]
    assert drive(twin, [5, 1]) == [6, 4]


def test_several_are_driven_in_one_pass() -> None:
    model = StackingCounter()
    loops = [ClosedLoop(model, START, TOLD) for _ in range(3)]
    assert batches(loops) == [[0, 1, 2]]
    made = [
        [piece.latents.mean().item() for piece in advance(loops, [torch.tensor([a])] * 3)] for a in (1.0, 3.0, 10.0)
    ]
    assert made == [[1] * 3, [4] * 3, [13] * 3]


def test_a_model_that_cannot_stack_is_driven_one_by_one() -> None:
    model = Counter()
    loops = [ClosedLoop(model, START, TOLD) for _ in range(2)]
    assert batches(loops) == [[0], [1]]
    with pytest.raises(ValueError, match="a model that stacks"):
        advance(loops, [torch.zeros(1)] * 2)


def test_a_history_that_can_be_saved_goes_into_a_file() -> None:
    loop = ClosedLoop(StackingCounter(), START, TOLD)
    drive(loop, [1, 3, 10])
    resumed = ClosedLoop.resume(loop.model, LoopState.from_tensors(loop.state.tensors(), loop.model))
    assert drive(resumed, [0, 2]) == drive(loop, [0, 2])
    with pytest.raises(TypeError, match="a Sum cannot be saved; give it state_dict and load_state_dict"):
        ClosedLoop(Counter(), START, TOLD).state.tensors()


def test_a_history_without_a_place_has_no_use_for_a_track() -> None:
    with pytest.raises(ValueError, match="a Sum has no place on a map; leave track out"):
        ClosedLoop(Counter(), START, TOLD, track=small_layout())
