"""What is expected of the next latent frames, kept from one pass to the next.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Remembers what is expected, latent frame by latent frame, and works out only what it does not know.

    A latent frame depends on the actions up to its own. Each is kept for as many different actions as the window has
    frames: the window that a cycle commits may be an earlier one of it.
    """

    def __init__(self) -> None:
        # Per latent frame the actions up to its own and what is expected then, the newest last.
        self._known: dict[int, tuple[tuple[Tensor, Expected], ...]] = {}
        self._latest: tuple[Tensor, tuple[int, ...], Expected] | None = None

    def get(
        self, action_BFA: Tensor, expect: Callable[[Sequence[int]], Expected], frames: Sequence[int] | None = None
    ) -> Expected:
        """What is expected of the window under these actions.

        Args:
            expect: works out some latent frames of the window, given by their numbers from 0.
            frames: which latent frames must be right, by default all. Of the others, what was expected last serves,
                whatever the actions were.
        """
        every = tuple(range(action_BFA.shape[1]))
        wanted = every if frames is None else tuple(frames)
        if self._latest is not None and self._latest[0] is action_BFA and self._latest[1] == wanted:
            return self._latest[2]
        found = {frame: self._recall(frame, action_BFA) if frame in wanted else self._newest(frame) for frame in every}
        missing = [frame for frame, expected in found.items() if expected is None]
        if missing:
            parts = zip(*(part.split(1, 1) for part in expect(missing)), strict=True)
            for frame, part in zip(missing, parts, strict=True):
                found[frame] = Expected(*part)
                known = *self._known.get(frame, ()), (action_BFA[:, : frame + 1], Expected(*part))
                self._known[frame] = known[-action_BFA.shape[1] :]
        chosen = [expected for expected in found.values() if expected is not None]
        result = Expected(*(torch.cat(parts, 1) for parts in zip(*chosen, strict=True)))
        self._latest = action_BFA, wanted, result
        return result

    def _recall(self, frame: int, action_BFA: Tensor) -> Expected | None:
        own = action_BFA[:, : frame + 1]
        known = self._known.get(frame, ())
        return next((expected for told, expected in reversed(known) if torch.equal(told, own)), None)

    def _newest(self, frame: int) -> Expected | None:
        return self._known[frame][-1][1] if frame in self._known else None

    def fork(self) -> Lookup:
        """A copy that shares memory."""
        twin = Lookup()
        twin._known, twin._latest = dict(self._known), self._latest
        return twin
