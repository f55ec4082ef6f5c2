"""Each latent frame is worked out once for the actions up to its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from holdover_world.conditioning.lookup import Expected, Lookup


def worked_out(action_BFA: Tensor, frames: Sequence[int] | None = None) -> Expected:
    """An expectation in which each latent frame depends on all actions up to it."""
    chosen = range(action_BFA.shape[1]) if frames is None else frames
    told = action_BFA.sum(-1).cumsum(1)[:, list(chosen), None, None]
    return Expected(told, 2 * told, 3 * told)


def of(action_BFA: Tensor, asked: list[int]) -> Callable[[Sequence[int]], Expected]:
    """Works out what is expected under these actions, and notes of which frames."""

    def expect(frames: Sequence[int]) -> Expected:
        asked.extend(frames)
        return worked_out(action_BFA, frames)

    return expect


CALM = torch.tensor([[[0.3, 0.1], [0.4, 0.1]]])
LATER = torch.tensor([[[0.3, 0.1], [0.9, -0.5]]])
OTHER = torch.tensor([[[0.5, 0.1], [0.9, -0.5]]])


@pytest.mark.parametrize("forked", [False, True])
def test_only_frames_that_a_new_action_changes_are_worked_out(forked: bool) -> None:
    lookup = Lookup()
    steps = (CALM, [0, 1]), (CALM, []), (CALM.clone(), []), (LATER, [1]), (OTHER, [0, 1]), (OTHER[:, :1], [])
    for action, frames in steps:
        asked = list[int]()
        lookup = lookup.fork() if forked else lookup
        found = lookup.get(action, of(action, asked))
        assert asked == frames
        for each, expected in zip(found, worked_out(action), strict=True):
            assert torch.equal(each, expected)


def test_of_frames_that_are_not_wanted_the_newest_serves() -> None:
    """Whatever it was told; one that was never worked out has to be."""
    lookup, asked = Lookup(), list[int]()
    calm, later, other = (worked_out(action) for action in (CALM, LATER, OTHER))
    cases = (
        (CALM, [1], [0, 1], (calm, calm)),
        (LATER, [0], [], (calm, calm)),
        (LATER, [1], [1], (calm, later)),
        (CALM, None, [], (calm, calm)),
        (OTHER, [0], [0], (other, later)),
        (OTHER, [1], [1], (other, other)),
    )
    for action, wanted, missing, expected in cases:
        asked.clear()
        found = lookup.get(action, of(action, asked), wanted)
        assert asked == missing
        for each, *right in zip(found, *expected, strict=True):
            assert torch.equal(each, torch.cat([own[:, [n]] for n, own in enumerate(right)], 1))


def test_earlier_windows_of_a_cycle_are_still_known() -> None:
    """The newest action is held in each of four generations; then the window of any of them is committed. No more
    windows than that are kept."""
    actions = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(0))
    held = [torch.cat([actions[:, :n], actions[:, n : n + 1].expand(-1, 4 - n, -1)], 1) for n in range(4)]
    lookup, asked = Lookup(), list[int]()
    for action in held:
        lookup.get(action, of(action, asked))
    assert asked == [0, 1, 2, 3, 1, 2, 3, 2, 3, 3]
    asked.clear()
    for action in (*reversed(held), *held):
        found = lookup.get(action.clone(), of(action, asked))
        for each, expected in zip(found, worked_out(action), strict=True):
            assert torch.equal(each, expected)
    assert not asked
    lookup.get(held[3] + 1, of(held[3] + 1, asked))
    lookup.get(held[0], of(held[0], asked))
    assert asked == [0, 1, 2, 3, 3]  # of the last frame four windows are kept, of the others all


def test_a_row_that_changes_is_worked_out_with_its_batch() -> None:
    lookup, both, asked = Lookup(), torch.cat([CALM, CALM]), list[int]()
    lookup.get(both, of(both, asked))
    changed = torch.cat([CALM, LATER])
    found = lookup.get(changed, of(changed, asked))
    assert asked == [0, 1, 1]
    assert torch.equal(found.latents_BFNP, worked_out(changed).latents_BFNP)


def test_a_fork_asks_for_itself() -> None:
    lookup, asked = Lookup(), list[int]()
    lookup.get(CALM, of(CALM, asked))
    twin = lookup.fork()
    twin.get(OTHER, of(OTHER, asked))
    assert asked == [0, 1, 0, 1]
    lookup.get(CALM.clone(), of(CALM, asked))
    lookup.get(OTHER, of(OTHER, asked))
    assert asked == [0, 1, 0, 1, 0, 1]
