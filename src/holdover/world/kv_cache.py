"""The rolling KV cache of one stream, and those of several streams as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    @property
    def starts(self) -> tuple[int, ...]:
        """The position of the next window, the same for all rows."""
        return (self.frames,)

    @property
    def length(self) -> int:
        """Latent frames held."""
        return min(self.frames, self.capacity)

    def get(self, block: int, group: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values ``[B*V, H, S, D]`` held for one block and view group, oldest first."""
        return self._held.get((block, group))

    def stage(self, block: int, group: int, keys: Tensor, values: Tensor) -> None:
        self._staged[block, group] = keys, values

    def commit(self, latents_BFNP: Tensor) -> None:
        """Append what was staged for these latent frames, and drop what no longer fits."""
        frames = latents_BFNP.shape[1]
        for key, staged in self._staged.items():
            old = self._held.get(key, tuple(t[:, :, :0] for t in staged))
            per_frame = staged[0].shape[2] // frames
            drop = max(0, old[0].shape[2] + staged[0].shape[2] - per_frame * self.capacity)
            # Cut first: a slice of the joined tensor would keep all of it in memory.
            keys, values = (torch.cat([o[:, :, drop:], s], 2) for o, s in zip(old, staged, strict=True))
            self._held[key] = keys, values
        self._staged = {}
        self.frames += frames
        self.last = latents_BFNP[:, -1].clone()

    def fork(self) -> KVCache:
        """A copy that shares memory: held tensors are replaced, never written in place."""
        twin = KVCache(self.capacity)
        twin.frames, twin.last, twin._held = self.frames, self.last, dict(self._held)
        return twin

    def take(self, rows: Sequence[int]) -> KVCache:
        """A copy for some rows of the batch."""
        assert self.last is not None
        batch, twin = self.last.shape[0], self.fork()
        twin.last = self.last[rows]
        for key, kv in self._held.items():
            keys, values = (t.unflatten(0, (batch, -1))[rows].flatten(0, 1) for t in kv)
            twin._held[key] = keys, values
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


class KVBatch:
    """The KV caches of several streams, one row each, that hold equally many latent frames."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        assert len({cache.length for cache in caches}) == 1
        self.caches = tuple(caches)

    @property
    def starts(self) -> tuple[int, ...]:
        """Per row the position of the next window."""
        return tuple(cache.frames for cache in self.caches)

    @property
    def last(self) -> Tensor | None:
        """Per row the newest committed latent frame, ``[B, N, P]``."""
        frames = [cache.last for cache in self.caches if cache.last is not None]
        return torch.cat(frames) if frames else None

    def get(self, block: int, group: int) -> tuple[Tensor, Tensor] | None:
        held = [kv for cache in self.caches if (kv := cache.get(block, group)) is not None]
        return (torch.cat([k for k, _ in held]), torch.cat([v for _, v in held])) if held else None

    def stage(self, block: int, group: int, keys: Tensor, values: Tensor) -> None:
        rows = zip(self.caches, keys.chunk(len(self.caches)), values.chunk(len(self.caches)), strict=True)
        for cache, own_keys, own_values in rows:
            cache.stage(block, group, own_keys, own_values)

    def commit(self, latents_BFNP: Tensor) -> None:
        for cache, latents in zip(self.caches, latents_BFNP.split(1), strict=True):
            cache.commit(latents)

    def take(self, rows: Sequence[int]) -> KVBatch:
        return KVBatch([self.caches[row] for row in rows])
