"""An adapter that lets the closed loop drive other chunk-causal generators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class Predict(Protocol):
    def __call__(
        self, latents: Tensor, *, sigma: float, kv: Any, start: int, actions: Tensor | None, write: bool
    ) -> Tensor | None:
        """Run the generator's transformer once.

        Args:
            latents: noisy latents ``[B, C, F, H, W]``; clean ones in the clean pass.
            sigma: their noise level, 0 to 1.
            kv: what ``new_kv`` returned.
            start: the number of latent frames before them.
            actions: of these frames, ``[B, F, A]``; None in the unguided branch of a loop with guidance.
            write: this pass writes the KV cache: the clean one, or, with a ``sigma`` above 0, the last denoising pass.

        Returns:
            Predicted clean latents ``[B, C, F, H, W]``. The output of a clean pass is not used.
        """
        ...


@dataclass
class GeneratorHistory:
    """What a generator remembers of one video: its KV cache, and how many latent frames are in it."""

    kv: Any
    frames: int = 0

    @property
    def length(self) -> int:
        """Latent frames so far."""
        return self.frames

    def fork(self) -> GeneratorHistory:
        """A copy that shares nothing, because generators write in place."""
        return copy.deepcopy(self)


@dataclass(frozen=True)
class Shape:
    """The shape of the latents: frames that are denoised together, rows and columns."""

    window: int
    rows: int
    columns: int


class Generator:
    """A generator as `holdover_world.loop.protocol.LoopModel`. The loop tells the cache where each pass stands.

    Args:
        shape: of the latents.
        new_kv: makes the KV cache of a new video.
        predict: runs the transformer once. The cache is attached to this transformer.
    """

    def __init__(self, shape: Shape, *, new_kv: Callable[[], Any], predict: Predict) -> None:
        self.sizes, self._new_kv, self._predict = shape, new_kv, predict

    def new_history(self) -> GeneratorHistory:
        return GeneratorHistory(self._new_kv())

    def __call__(
        self,
        latents_BFNP: Tensor,
        /,
        *,
        sigma: float,
        action_BFA: Tensor | None,
        history: GeneratorHistory,
        write: bool = False,
        done_BFA: Tensor | None = None,
        shown: Sequence[int] | None = None,
    ) -> Tensor:
        """One pass; ``done_BFA`` and ``shown`` are not used, because generators keep no ego and look nothing up."""
        latents = latents_BFNP.unflatten(2, (self.sizes.rows, self.sizes.columns)).permute(0, 4, 1, 2, 3)
        output = self._predict(
            latents, sigma=sigma, kv=history.kv, start=history.frames, actions=action_BFA, write=write
        )
        if write:
            history.frames += latents_BFNP.shape[1]
        return latents_BFNP if output is None else output.permute(0, 2, 3, 4, 1).flatten(2, 3)
