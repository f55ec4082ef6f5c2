"""What is expected of the next latent frames, kept from one pass to the next.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What the next latent frames would be if the world stood still.

    Attributes:
        latents_BFNP: the latents.
        seen_BFN1: the share of each token that some camera sees now; the rest is a guess.
        layout_BFNP: the drawn layout alone, zero where there is none.
    """

    latents_BFNP: Tensor
    seen_BFN1: Tensor
    layout_BFNP: Tensor


class Lookup:
    """Remembers the latest expectation, and works out only the frames that a new action changes."""

    def __init__(self) -> None:
        self._latest: tuple[Tensor, Expected] | None = None

    def get(self, action_BFA: Tensor, expect: Callable[[int], Expected]) -> Expected:
        """What is expected under these actions.

        Args:
            expect: works out the frames from this one on, counted from 0.
        """
        if self._latest is None:
            found = expect(0)
        else:
            told_BFA, found = self._latest
            known = 0  # latent frames that the old and the new actions have in common
            if told_BFA is action_BFA:
                known = action_BFA.shape[1]
            elif told_BFA.shape == action_BFA.shape:
                known = int((told_BFA == action_BFA).all(-1).all(0).int().cumprod(0).sum())
            if known < action_BFA.shape[1]:
                pairs = zip(found, expect(known), strict=True)
                found = Expected(*(torch.cat([old[:, :known], new], 1) for old, new in pairs))
        self._latest = action_BFA, found
        return found

    def fork(self) -> Lookup:
        """A copy that shares memory."""
        twin = Lookup()
        twin._latest = self._latest
        return twin
