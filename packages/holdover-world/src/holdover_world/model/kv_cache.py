"""The rolling KV cache of one stream, and those of several streams as one batch.

Shape suffixes: B batch, V views of a group, H heads, S tokens of an attention sequence, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values of the newest committed latent frames of one stream, for every temporal block.

    A clean pass stages its keys and values with `stage`. `commit` then makes all of them visible together, so a pass
    that fails half-way leaves the cache as it was.

    Args:
        capacity: latent frames kept; older ones are dropped.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.frames = 0  # latent frames committed since the start, which is the position of the next window
        self._held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._staged: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def starts(self) -> tuple[int, ...]:
        """The position of the next window, the same for all rows."""
        return (self.frames,)

    @property
    def length(self) -> int:
        """Latent frames held."""
        return min(self.frames, self.capacity)

    def get(self, block: int, group: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B, V, H, S, D]`` of a block and view group, oldest first; None if there are none."""
        return self._held.get((block, group))

    def stage(self, block: int, group: int, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values ``[B, V, H, S, D]`` of new latent frames for the next `commit`."""
        self._staged[block, group] = keys, values

    def commit(self, frames: int) -> None:
        """Append what is staged for this many latent frames, and drop the oldest beyond the capacity."""
        for key, staged in self._staged.items():
            old = self._held.get(key, tuple(t[:, :, :, :0] for t in staged))
            per_frame = staged[0].shape[3] // frames
            drop = max(0, old[0].shape[3] + staged[0].shape[3] - per_frame * self.capacity)
            # Cut first: a slice of the joined tensor would keep all of it in memory.
            keys, values = (torch.cat([o[:, :, :, drop:], s], 3) for o, s in zip(old, staged, strict=True))
            self._held[key] = keys, values
        self._staged = {}
        self.frames += frames

    def fork(self) -> KVCache:
        """A copy that shares memory: held tensors are replaced, never written in place."""
        twin = KVCache(self.capacity)
        twin.frames, twin._held = self.frames, dict(self._held)
        return twin

    def take(self, rows: Sequence[int]) -> KVCache:
        """A copy for some rows of the batch."""
        twin = self.fork()
        twin._held = {key: (keys[rows], values[rows]) for key, (keys, values) in self._held.items()}
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {f"{b}.{g}.{n}": t for (b, g), kv in self._held.items() for n, t in zip("kv", kv, strict=True)}
        return {"frames": torch.tensor(self.frames), **tensors}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        self.frames = int(tensors["frames"])
        keys = {tuple(map(int, name.split(".")[:2])) for name in tensors if name != "frames"}
        self._held = {(b, g): (tensors[f"{b}.{g}.k"], tensors[f"{b}.{g}.v"]) for b, g in keys}
        self._staged = {}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kv in self._held.values() for t in kv)


class KVBatch:
    """The KV caches of several streams, one row each. All hold equally many latent frames."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        assert len({cache.length for cache in caches}) == 1
        self.caches = tuple(caches)

    @property
    def starts(self) -> tuple[int, ...]:
        """Per row the position of the next window."""
        return tuple(cache.frames for cache in self.caches)

    def get(self, block: int, group: int) -> tuple[Tensor, Tensor] | None:
        """As `KVCache.get`, one row per stream."""
        held = [kv for cache in self.caches if (kv := cache.get(block, group)) is not None]
        return (torch.cat([k for k, _ in held]), torch.cat([v for _, v in held])) if held else None

    def stage(self, block: int, group: int, keys: Tensor, values: Tensor) -> None:
        for cache, own_keys, own_values in zip(self.caches, keys.split(1), values.split(1), strict=True):
            cache.stage(block, group, own_keys, own_values)

    def commit(self, frames: int) -> None:
        for cache in self.caches:
            cache.commit(frames)

    def take(self, rows: Sequence[int]) -> KVBatch:
        """The caches of some rows."""
        return KVBatch([self.caches[row] for row in rows])
