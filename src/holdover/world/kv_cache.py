"""The rolling KV cache of one stream."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the committed windows of one stream, for every temporal block, rolling.

    A clean pass stages its keys and values with `stage`; they become visible together on `commit`, so a pass that
    fails half-way leaves the cache as it was.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.frames = 0  # latent frames committed since the start, the position of the next window
        self.last: Tensor | None = None  # the newest committed latent frame itself, [B, N, P]
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._staged: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def get(self, block: int, group: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B*V, H, S, D]`` held for one block and view group, oldest first."""
        return self._held.get((block, group))

    def stage(self, block: int, group: int, keys: Tensor, values: Tensor) -> None:
        self._staged[block, group] = keys, values

    def commit(self, latents_BFNP: Tensor) -> None:
        """Append what was staged for these latent frames, and drop what no longer fits."""
        frames = latents_BFNP.shape[1]
        for key, staged in self._staged.items():
            held = self._held.get(key)
            joined = [torch.cat(pair, 2) for pair in zip(held, staged, strict=True)] if held else list(staged)
            limit = staged[0].shape[2] // frames * self.capacity
            self._held[key] = joined[0][:, :, -limit:], joined[1][:, :, -limit:]
        self._staged = {}
        self.frames += frames
        self.last = latents_BFNP[:, -1].clone()

    def fork(self) -> KVCache:
        """A copy that shares memory: held tensors are replaced, never written in place."""
        twin = KVCache(self.capacity)
        twin.frames, twin.last, twin._held = self.frames, self.last, dict(self._held)
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {f"{b}.{g}.{n}": t for (b, g), kv in self._held.items() for n, t in zip("kv", kv, strict=True)}
        last = {} if self.last is None else {"last": self.last}
        return {"frames": torch.tensor(self.frames), **last, **tensors}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        keys = {tuple(map(int, name.split(".")[:2])) for name in tensors if name not in ("frames", "last")}
        self._held = {(b, g): (tensors[f"{b}.{g}.k"], tensors[f"{b}.{g}.v"]) for b, g in keys}
        self._staged = {}
        self.frames, self.last = int(tensors["frames"]), tensors.get("last")

    @property
    def nbytes(self) -> int:
        last = 0 if self.last is None else self.last.nbytes
        return last + sum(t.nbytes for kv in self._held.values() for t in kv)
