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
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._staged: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def get(self, block: int, group: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B*V, H, S, D]`` held for one block and view group, oldest first."""
        return self._held.get((block, group))

    def stage(self, block: int, group: int, keys: Tensor, values: Tensor) -> None:
        self._staged[block, group] = keys, values

    def commit(self, frames: int) -> None:
        """Append what was staged, ``frames`` latent frames, and drop what no longer fits."""
        for key, staged in self._staged.items():
            held = self._held.get(key)
            joined = [torch.cat(pair, 2) for pair in zip(held, staged, strict=True)] if held else list(staged)
            limit = staged[0].shape[2] // frames * self.capacity
            self._held[key] = joined[0][:, :, -limit:], joined[1][:, :, -limit:]
        self._staged = {}
        self.frames += frames

    def fork(self) -> KVCache:
        """A copy that shares memory: held tensors are replaced, never written in place."""
        twin = KVCache(self.capacity)
        twin.frames, twin._held = self.frames, dict(self._held)
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {f"{b}.{g}.{n}": t for (b, g), kv in self._held.items() for n, t in zip("kv", kv, strict=True)}
        return {"frames": torch.tensor(self.frames), **tensors}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        keys = {tuple(map(int, name.split(".")[:2])) for name in tensors if name != "frames"}
        self._held = {(b, g): (tensors[f"{b}.{g}.k"], tensors[f"{b}.{g}.v"]) for b, g in keys}
        self._staged = {}
        self.frames = int(tensors["frames"])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kv in self._held.values() for t in kv)
