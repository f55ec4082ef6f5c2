"""What the world model remembers of one video, and of several videos as one batch.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action, K video frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from holdover_world.conditioning.ego import Ego
from holdover_world.conditioning.lookup import Expected, Lookup
from holdover_world.config import FRAMES
from holdover_world.model.kv_cache import KVBatch, KVCache
from holdover_world.scene.layout import Site, Sites, Track

#: Works out what is expected, as `Reprojection` does: from the newest latent frame ``[B, N, P]``, the poses to come
#: ``[B, K, 3]``, the sites, and the numbers of the latent frames that show these poses, counted from 0.
Expect = Callable[[Tensor, Tensor, Sequence[Site | None] | None, Sequence[int]], Expected]


@dataclass(kw_only=True)
class WorldHistory:
    """What the model remembers of one video, which may have several rows. A clean pass is what changes it.

    Attributes:
        kv: keys and values of the newest committed latent frames.
        last: the newest committed latent frame itself, ``[B, N, P]``; None before the first.
        ego: how the ego moves, and where it is relative to that frame.
        sites: the place of each row in its layout.
        lookup: what is expected of the next latent frames.
    """

    kv: KVCache
    last: Tensor | None = None
    ego: Ego = field(default_factory=Ego)
    sites: Sites = field(default_factory=Sites)
    lookup: Lookup = field(default_factory=Lookup)
    _embedded: tuple[Expected, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def length(self) -> int:
        """Latent frames in the KV cache."""
        return self.kv.length

    @property
    def conditions(self) -> tuple[object, ...]:
        """What a window is drawn from, besides noise and actions: whatever changes is another object then."""
        return self.last, self.ego, self.sites

    def poses(self, action_BFA: Tensor) -> Tensor:
        """The poses of the next latent frames under these actions, relative to the newest one's.

        Returns:
            x, y (m) and yaw (rad), ``[B, F, K, 3]``, for each of the K video frames of a latent frame.
        """
        poses_BFK3: Tensor = self.ego.ahead(action_BFA).unflatten(1, (-1, FRAMES))
        return poses_BFK3

    def commit(self, latents_BFNP: Tensor, action_BFA: Tensor | None, done_BFA: Tensor | None = None) -> None:
        """Add latent frames, whose keys and values are staged.

        Args:
            action_BFA: the actions that led to them; None leaves the ego where it is.
            done_BFA: the actions that the ego carried out meanwhile; by default the same.
        """
        frames = latents_BFNP.shape[1]
        self.kv.commit(frames)
        self.last = latents_BFNP[:, -1].clone()
        self.lookup = Lookup()
        if action_BFA is not None:
            self.ego, end_B3 = self.ego.moved(action_BFA, done_BFA)
            self.sites = self.sites.moved(end_B3, FRAMES * frames)

    def expect(self, action_BFA: Tensor, expect: Expect, shown: Sequence[int] | None = None) -> Expected:
        """What is expected after the newest latent frame, under these actions.

        Args:
            shown: per row the latent frame that must be right, counted from 0; by default all of them. Of the others,
                what was expected last serves.
        """
        last_BNP = self.last
        assert last_BNP is not None

        def work_out(frames: Sequence[int]) -> Expected:
            poses_BK3 = self.poses(action_BFA)[:, list(frames)].flatten(1, 2)
            return expect(last_BNP, poses_BK3, self.sites or None, frames)

        return self.lookup.get(action_BFA, work_out, None if shown is None else sorted(set(shown)))

    def embed(self, expected: Expected, embed: Callable[[Expected], Tensor]) -> Tensor:
        """What is expected as the model embeds it; the passes of a chunk share that, unless gradients are recorded."""
        if torch.is_grad_enabled():
            return embed(expected)
        if self._embedded is None or self._embedded[0] is not expected:
            self._embedded = expected, embed(expected)
        return self._embedded[1]

    def stand(self, tracks: Sequence[Track | None], frames: Sequence[int]) -> None:
        """Put each row where its recording was at a video frame; rows without a track have no place.

        If all rows have a track, the egos also move as they were recorded to move.
        """
        assert self.last is not None
        known = [(track, frame) for track, frame in zip(tracks, frames, strict=True) if track is not None]
        self.sites = Sites(track.site(frame) if track else None for track, frame in zip(tracks, frames, strict=True))
        motion_B2 = self.ego.motion_B2
        if len(known) == len(self.last):
            recorded_B2 = torch.stack([track.motion_T2[frame] for track, frame in known])
            motion_B2 = recorded_B2.to(self.last.device, torch.float32)
        self.ego, self.lookup = Ego(motion_B2), Lookup()

    def follow(self, track: Track) -> None:
        """Put all rows where a recording is that began when this video did."""
        assert self.last is not None
        rows = len(self.last)
        self.stand([track.to(self.last.device)] * rows, [self.kv.frames * FRAMES - 1] * rows)

    def fork(self) -> WorldHistory:
        """A copy that shares memory: tensors are replaced, never written in place."""
        kv, lookup = self.kv.fork(), self.lookup.fork()
        return WorldHistory(kv=kv, last=self.last, ego=self.ego, sites=self.sites, lookup=lookup)

    def take(self, rows: Sequence[int]) -> WorldHistory:
        """A copy for some rows of the batch."""
        last = None if self.last is None else self.last[rows]
        return WorldHistory(kv=self.kv.take(rows), last=last, ego=self.ego.take(rows), sites=self.sites.take(rows))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything by name; what is expected is left out, because it follows from the rest."""
        tensors = {f"kv.{name}": tensor for name, tensor in self.kv.state_dict().items()}
        tensors |= {"last": self.last} if self.last is not None else {}
        tensors |= {f"ego.{name}": tensor for name, tensor in self.ego.state_dict().items()}
        return tensors | {f"site.{name}": tensor for name, tensor in self.sites.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of `state_dict`."""
        self.kv.load_state_dict(part(tensors, "kv."))
        self.last = tensors.get("last")
        self.ego = Ego.from_state_dict(part(tensors, "ego."))
        rows = 0 if self.last is None else len(self.last)
        self.sites, self.lookup = Sites.from_state_dict(part(tensors, "site."), rows), Lookup()

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + (0 if self.last is None else self.last.nbytes)


class HistoryBatch:
    """The histories of several videos, one row each, that hold equally many latent frames."""

    def __init__(self, histories: Sequence[WorldHistory]) -> None:
        self.histories = tuple(histories)
        self.kv = KVBatch([history.kv for history in histories])

    @property
    def last(self) -> Tensor | None:
        """Per row the newest committed latent frame, ``[B, N, P]``."""
        frames = [history.last for history in self.histories if history.last is not None]
        return torch.cat(frames) if frames else None

    def commit(self, latents_BFNP: Tensor, action_BFA: Tensor | None, done_BFA: Tensor | None = None) -> None:
        """`WorldHistory.commit` of every row."""
        count = len(self.histories)
        actions, done = ([None] * count if x is None else x.split(1) for x in (action_BFA, done_BFA))
        for history, *each in zip(self.histories, latents_BFNP.split(1), actions, done, strict=True):
            history.commit(*each)

    def expect(self, action_BFA: Tensor, expect: Expect, shown: Sequence[int] | None = None) -> Expected:
        """`WorldHistory.expect` of every row."""
        chosen = [None] * len(self.histories) if shown is None else [[frame] for frame in shown]
        rows = zip(self.histories, action_BFA.split(1), chosen, strict=True)
        found = [history.expect(action, expect, own) for history, action, own in rows]
        return Expected(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def embed(self, expected: Expected, embed: Callable[[Expected], Tensor]) -> Tensor:
        """What is expected of all rows as the model embeds it."""
        return embed(expected)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
