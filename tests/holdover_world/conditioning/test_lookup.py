"""An expectation is worked out once for each action."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from holdover_world.conditioning.lookup import Expected, Lookup


def worked_out(action_BFA: Tensor, known: int = 0) -> Expected:
    """An expectation in which each latent frame depends on all actions up to it."""
    told = action_BFA.sum(-1).cumsum(1)[:, known:, None, None]
    return Expected(told, 2 * told, 3 * told)


CALM = torch.tensor([[[0.3, 0.1], [0.4, 0.1]]])
LATER = torch.tensor([[[0.3, 0.1], [0.9, -0.5]]])
OTHER = torch.tensor([[[0.5, 0.1], [0.9, -0.5]]])


@pytest.mark.parametrize("forked", [False, True])
def test_only_frames_that_a_new_action_changes_are_worked_out(forked: bool) -> None:
    lookup, asked = Lookup(), list[int]()
    steps = (CALM, [0]), (CALM, []), (CALM.clone(), []), (LATER, [1]), (OTHER, [0]), (OTHER[:, :1], [0])
    for action, known in steps:
        asked.clear()
        lookup = lookup.fork() if forked else lookup
        found = lookup.get(action, lambda n, action=action: (asked.append(n), worked_out(action, n))[1])
        assert asked == known
        for each, expected in zip(found, worked_out(action), strict=True):
            torch.testing.assert_close(each, expected)


def test_a_row_that_changes_is_worked_out_with_its_batch() -> None:
    lookup, both = Lookup(), torch.cat([CALM, CALM])
    lookup.get(both, lambda known: worked_out(both, known))
    changed = torch.cat([CALM, LATER])
    found = lookup.get(changed, lambda known: worked_out(changed, known))
    torch.testing.assert_close(found.latents_BFNP, worked_out(changed).latents_BFNP)


def test_a_fork_asks_for_itself() -> None:
    lookup = Lookup()
    lookup.get(CALM, lambda known: worked_out(CALM, known))
    twin = lookup.fork()
    twin.get(OTHER, lambda known: worked_out(OTHER, known))

    def never(known: int) -> Expected:
        raise AssertionError(f"asked for all but {known} frames")

    lookup.get(CALM, never)
