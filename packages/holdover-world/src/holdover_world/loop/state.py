"""What a closed loop puts out, and where it stands between two chunks.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action, S denoising passes of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover_world.loop.protocol import History, LoopModel, Saved


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The output of one chunk.

    Attributes:
        latents: the emitted latent frame, ``float32 [B, 1, N, P]``.
        before: the latent frame before it, ``[B, N, P]``, which decoding needs. For the first piece of a cycle this is
            the newest committed frame, from which its window continues, so nothing served from cache gets into it.
        dit_seconds: time in the transformer for the whole batch, including the KV update that ends a cycle. A held
            piece has the KV update alone.
        exact: whether every block was computed; of a held piece, whether every block of its window was.
        held: whether it is a frame of the window in hand, shown without a pass.
    """

    latents: Tensor
    before: Tensor
    dit_seconds: float
    exact: bool
    held: bool = False


@dataclass(frozen=True, kw_only=True)
class Window:
    """The window in hand: what the latest chunk that ran its passes made.

    Attributes:
        latents: ``[B, F, N, P]``.
        told: the actions that it was drawn with, ``[B, F, A]``.
        exact: whether every block was computed.
        drafts: its latent frames that a policy did not compute with the others. They are not shown without a pass.
    """

    latents: Tensor
    told: Tensor
    exact: bool
    drafts: tuple[int, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name."""
        drafts = torch.tensor(self.drafts, dtype=torch.int64)
        return {"latents": self.latents, "told": self.told, "exact": torch.tensor(self.exact), "drafts": drafts}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Window:
        """The reverse of `tensors`."""
        drafts = tuple(tensors["drafts"].tolist())
        return cls(latents=tensors["latents"], told=tensors["told"], exact=bool(tensors["exact"]), drafts=drafts)


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """Where a loop stands, without the entries of its cache. It shares memory with the loop; do not write into it.

    Attributes:
        history: what the model remembers of the video.
        last: the newest committed latent frame, ``[B, N, P]``.
        chunk: the number of the next chunk.
        noise_source: the state of the generator that draws the noise.
        noise: the noise of the cycle, ``[S, B, F, N, P]``; None at the beginning of a cycle.
        emitted, actions: the pieces ``[B, 1, N, P]`` and actions ``[B, A]`` of the cycle so far, one per chunk.
        committed: the latents ``[B, F, N, P]`` and actions ``[B, F, A]`` that the KV update will write.
        window: the window in hand, where the loop may show more of it. None if the conditions changed since it was
            drawn.
    """

    history: History
    last: Tensor
    chunk: int
    noise_source: Tensor
    noise: Tensor | None
    emitted: tuple[Tensor, ...]
    actions: tuple[Tensor, ...]
    committed: tuple[Tensor, Tensor] | None
    window: Window | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by name.

        Raises:
            TypeError: the model's history cannot be saved (`Saved`).
        """
        if not isinstance(self.history, Saved):
            raise TypeError(f"a {type(self.history).__name__} cannot be saved; give it state_dict and load_state_dict")
        named = {f"history.{name}": tensor for name, tensor in self.history.state_dict().items()}
        named |= {"last": self.last, "chunk": torch.tensor(self.chunk), "noise_source": self.noise_source}
        named |= {"noise": self.noise} if self.noise is not None else {}
        named |= {f"emitted.{n}": piece for n, piece in enumerate(self.emitted)}
        named |= {f"actions.{n}": action for n, action in enumerate(self.actions)}
        if self.committed is not None:
            named["committed.latents"], named["committed.actions"] = self.committed
        if self.window is not None:
            named |= {f"window.{name}": tensor for name, tensor in self.window.tensors().items()}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], model: LoopModel) -> LoopState:
        """The reverse of `tensors`, for this model."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        history = model.new_history()
        history.load_state_dict(part("history."))
        committed, window = part("committed."), part("window.")
        count = len(part("emitted."))
        return cls(
            history=history,
            last=tensors["last"],
            chunk=int(tensors["chunk"]),
            noise_source=tensors["noise_source"],
            noise=tensors.get("noise"),
            emitted=tuple(tensors[f"emitted.{n}"] for n in range(count)),
            actions=tuple(tensors[f"actions.{n}"] for n in range(count)),
            committed=(committed["latents"], committed["actions"]) if committed else None,
            window=Window.from_tensors(window) if window else None,
        )
