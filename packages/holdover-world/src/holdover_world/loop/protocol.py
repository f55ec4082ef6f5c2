"""What the closed loop needs: of a model, of the history that the model keeps of a video, and of a cache.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor


class History(Protocol):
    """What a model remembers of one video, such as its KV cache. Only the model writes into it, in a clean pass."""

    @property
    def length(self) -> int:
        """Latent frames that the next window attends to."""
        ...

    def fork(self) -> Self:
        """A copy; neither changes the other."""
        ...


class Sizes(Protocol):
    """The sizes of a model."""

    @property
    def window(self) -> int:
        """Latent frames that are denoised together."""
        ...


class LoopModel(Protocol):
    """A model that the loop can drive."""

    @property
    def sizes(self) -> Sizes: ...

    def new_history(self) -> Any:
        """The `History` of a new video."""
        ...

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
        shown: Sequence[int] | None = None,
    ) -> Tensor:
        """Run the model once and return predicted clean latents ``[B, F, N, P]``.

        Args:
            latents_BFNP: noisy latents; clean ones in the clean pass.
            sigma: their noise level, 0 to 1.
            action_BFA: the action of each latent frame; None is the unguided branch of a loop with guidance.
            history: what `new_history` or `Stacks.stack` returned.
            write: this is the clean pass, which adds the latents to the history. Its output is not used. With a
                ``sigma`` above 0 it is the last denoising pass, which writes instead: its keys and values and the
                latents that it predicts are added, and its output is used.
            done_BFA: with ``write``, the actions that were carried out while these frames were shown. They differ from
                ``action_BFA`` where a new action arrived after the window was made. None: the same.
            shown: per row the latent frame that the chunk shows, told where the cache may leave the others
                (`Drafts`).
        """
        ...


@runtime_checkable
class Stacks(Protocol):
    """A model that can drive several videos in one pass."""

    def stack(self, histories: Sequence[Any]) -> Any:
        """Histories of equal length as one, a row each. What is written into it is written into them."""
        ...


@runtime_checkable
class Located(Protocol):
    """A history that knows where on a map its video takes place."""

    def follow(self, track: Any) -> None:
        """The latent frames so far were recorded along a track, from its beginning."""
        ...


@runtime_checkable
class Conditioned(Protocol):
    """A history of which more than clean passes may change what a window is drawn from."""

    @property
    def conditions(self) -> tuple[object, ...]:
        """What a window is drawn from, besides the noise and the actions. Whatever changes is another object then."""
        ...


@runtime_checkable
class Moving(Protocol):
    """A history that knows how the camera moves."""

    def poses(self, action_BFA: Tensor) -> Tensor:
        """The poses from which the next latent frames are seen under these actions: x, y (m) and yaw (rad).

        Returns:
            ``[B, F, K, 3]``, for each of the K video frames of a latent frame.
        """
        ...


@runtime_checkable
class Saved(Protocol):
    """A history that can be written to a file."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None: ...


class LoopCache(Protocol):
    """A cache on the model, such as `holdover.attach` returns."""

    def step(self, *args: Any, **fields: Any) -> AbstractContextManager[Any]:
        """Say where the forward pass inside the context stands."""
        ...

    def exact(self, stream: str) -> bool:
        """Whether every block of the stream's newest chunk was computed."""
        ...

    def hold(self, *, chunk: int, num_steps: int, stream: str, branches: Sequence[str]) -> None:
        """Note a chunk that shows the next frame of the window in hand and runs no pass."""
        ...


@runtime_checkable
class Drafts(Protocol):
    """A cache whose policies may compute some latent frames of a window and leave the others."""

    @property
    def by_frame(self) -> bool:
        """Whether it has such a policy. Then the model is told which latent frame a chunk shows."""
        ...

    def drafts(self, stream: str) -> Sequence[int]:
        """The latent frames that the stream's newest chunk left."""
        ...
