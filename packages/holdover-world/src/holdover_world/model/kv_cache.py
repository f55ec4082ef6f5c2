"""The rolling KV cache of one stream, and those of several streams as one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from holdover_world.conditioning.motion import drive
from holdover_world.config import FRAMES
from holdover_world.scene.layout import Site, Track
from holdover_world.scene.poses import placed, seen_from

#: What is expected ``[B, F, N, P]``, how much of each token is known ``[B, F, N, 1]``, the layout ``[B, F, N, P]``.
Expected = tuple[Tensor, Tensor, Tensor]
#: To it, from the newest latent frame ``[B, N, P]``, the ego's poses at video frames to come ``[B, K, 3]``, where each
#: row is in its layout, and how many video frames there are before those.
Expect = Callable[[Tensor, Tensor, Sequence[Site | None] | None, int], Expected]


class KVCache:
    """Keys and values of the committed windows of one stream, for every temporal block, rolling.

    A clean pass stages its keys and values with `stage`; they become visible together on `commit`, so a pass that
    fails half-way leaves the cache as it was.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.frames = 0  # latent frames committed since the start, the position of the next window
        self.last: Tensor | None = None  # the newest committed latent frame itself, [B, N, P]
        self.motion: Tensor | None = None  # the ego's speed and curvature now, [B, 2]
        self.pose: Tensor | None = None  # where it is, seen from that frame, [B, 3]; None: there, or as its action says
        self._begun: tuple[Tensor | None, Tensor] | None = None  # its motion before the newest frames, where they end
        self.sites: tuple[Site | None, ...] = ()  # where each row is in its layout, if it has one; empty: none has
        self._expected: tuple[Tensor, Expected] | None = None
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

    def commit(self, latents_BFNP: Tensor, action_BFA: Tensor | None) -> None:
        """Append what was staged for these latent frames, and drop what no longer fits.

        Args:
            action_BFA: the actions that led to them; None: the ego goes on as before.
        """
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
        self._expected = None
        if action_BFA is not None:
            poses_BK3, motion = drive(self.motion, action_BFA)
            self._begun, self.motion = (self.motion, poses_BK3[:, -1]), motion
            if self.sites:
                ends = zip(self.sites, placed(self.pose, poses_BK3)[:, -1], strict=True)
                self.sites = tuple(site and site.moved(pose, FRAMES * frames) for site, pose in ends)
            self.pose = None

    def carried_out(self, action_BFA: Tensor) -> None:
        """In the frames committed last the ego did this, whatever they show: what comes begins where that led."""
        assert self._begun is not None
        begun, shown_B3 = self._begun
        poses_BK3, self.motion = drive(begun, action_BFA)
        self.pose = seen_from(shown_B3, poses_BK3[:, -1])
        self._expected = None

    def expect(self, action_BFA: Tensor, expect: Expect) -> Expected:
        """What is to be expected after the newest latent frame; of the actions that were asked about last, what follows
        from the first of them that is new is worked out."""
        assert self.last is not None
        told, found = self._expected or (None, None)
        if told is action_BFA and found is not None:
            return found
        known = 0
        if told is not None and told.shape == action_BFA.shape:
            known = int((told == action_BFA).all(-1).all(0).int().cumprod(0).sum())
        if found is None or known < action_BFA.shape[1]:
            poses_BK3 = placed(self.pose, drive(self.motion, action_BFA)[0])[:, FRAMES * known :]
            new = expect(self.last, poses_BK3, self.sites or None, FRAMES * known)
            if found is not None:
                new = joined(found[0], new[0], known), joined(found[1], new[1], known), joined(found[2], new[2], known)
            found = new
        self._expected = action_BFA, found
        return found

    def stand(self, tracks: Sequence[Track | None], frames: Sequence[int]) -> None:
        """Each row is where a recording was at a video frame, if it has a layout; if all have, they move as it did."""
        assert self.last is not None
        known = [(track, frame) for track, frame in zip(tracks, frames, strict=True) if track is not None]
        self.sites = tuple(t.site(frame) if t else None for t, frame in zip(tracks, frames, strict=True))
        if len(known) == len(self.last):
            motion_B2 = torch.stack([track.motion_T2[frame] for track, frame in known])
            self.motion = motion_B2.to(self.last.device, torch.float32)
        self.pose = self._expected = None

    def fork(self) -> KVCache:
        """A copy that shares memory: held tensors are replaced, never written in place."""
        twin = KVCache(self.capacity)
        twin.frames, twin.last, twin.motion, twin._held = self.frames, self.last, self.motion, dict(self._held)
        twin._expected, twin.sites, twin.pose, twin._begun = self._expected, self.sites, self.pose, self._begun
        return twin

    def take(self, rows: Sequence[int]) -> KVCache:
        """A copy for some rows of the batch."""
        assert self.last is not None
        batch, twin = self.last.shape[0], self.fork()
        twin.last = self.last[rows]
        twin.motion = None if self.motion is None else self.motion[rows]
        twin.pose = None if self.pose is None else self.pose[rows]
        twin._begun = None
        twin._expected = None
        twin.sites = tuple(self.sites[row] for row in rows) if self.sites else ()
        for key, kv in self._held.items():
            keys, values = (t.unflatten(0, (batch, -1))[rows].flatten(0, 1) for t in kv)
            twin._held[key] = keys, values
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        tensors = {f"{b}.{g}.{n}": t for (b, g), kv in self._held.items() for n, t in zip("kv", kv, strict=True)}
        newest = {"last": self.last, "motion": self.motion, "pose": self.pose}
        known = {name: tensor for name, tensor in newest.items() if tensor is not None}
        for row, site in enumerate(self.sites):
            if site is not None:
                known |= {f"site.{row}.{name}": tensor for name, tensor in site.state_dict().items()}
        return {"frames": torch.tensor(self.frames), **known, **tensors}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        keys = {tuple(map(int, name.split(".")[:2])) for name in tensors if name[0].isdigit()}
        self._held = {(b, g): (tensors[f"{b}.{g}.k"], tensors[f"{b}.{g}.v"]) for b, g in keys}
        self._staged, self._expected = {}, None
        self.frames, self.last, self.motion = int(tensors["frames"]), tensors.get("last"), tensors.get("motion")
        self.pose, self._begun = tensors.get("pose"), None
        rows = range(len(self.last) if self.last is not None else 0)
        sites = tuple(Site.from_state_dict(tensors, f"site.{row}.") for row in rows)
        self.sites = sites if any(sites) else ()

    @property
    def nbytes(self) -> int:
        last = 0 if self.last is None else self.last.nbytes
        return last + sum(t.nbytes for kv in self._held.values() for t in kv)


class KVBatch:
    """The KV caches of several streams, one row each, that hold equally many latent frames."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        assert len({cache.length for cache in caches}) == 1
        self.caches = tuple(caches)
        self._expected: tuple[Tensor, Expected] | None = None

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

    def commit(self, latents_BFNP: Tensor, action_BFA: Tensor | None) -> None:
        self._expected = None
        actions = [None] * len(self.caches) if action_BFA is None else action_BFA.split(1)
        for cache, latents, action in zip(self.caches, latents_BFNP.split(1), actions, strict=True):
            cache.commit(latents, action)

    def expect(self, action_BFA: Tensor, expect: Expect) -> Expected:
        """`KVCache.expect` of every row."""
        if self._expected is None or self._expected[0] is not action_BFA:
            rows = zip(self.caches, action_BFA.split(1), strict=True)
            latents, seen, layouts = zip(*(cache.expect(action, expect) for cache, action in rows), strict=True)
            self._expected = action_BFA, (torch.cat(latents), torch.cat(seen), torch.cat(layouts))
        return self._expected[1]

    def take(self, rows: Sequence[int]) -> KVBatch:
        return KVBatch([self.caches[row] for row in rows])


def joined(first_BFNP: Tensor, rest_BFNP: Tensor, known: int) -> Tensor:
    """So many latent frames of the first, then the rest."""
    return torch.cat([first_BFNP[:, :known], rest_BFNP], 1)
