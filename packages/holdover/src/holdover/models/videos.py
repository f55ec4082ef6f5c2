"""The videos that a pipeline makes: which stream and chunk a pass belongs to, shared by its transformers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover.models.schedule import Chunk

#: The name that diffusers gives to a pass of both guidance branches, in one batch.
BATCHED = "cond_uncond"


@dataclass
class Video:
    """What is known of one stream: the call that it belongs to, its first chunk's number, and its current chunk."""

    call: object = None
    chunk: Chunk | None = None
    begin: int = 0

    @property
    def next(self) -> int:
        """The number of the next chunk."""
        return self.begin if self.chunk is None else self.chunk.number + 1


class Videos:
    """The streams of a target.

    Attributes:
        session: the stream that passes belong to; None where every call of a pipeline is a video of its own.
        caches: the cache of each transformer.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = policies
        self.session: str | None = None
        self.caches: dict[str, Cache] = {}
        self._known: dict[str, Video] = {}
        self._warned = False

    @property
    def stream(self) -> str:
        """The name of the stream that passes belong to."""
        return "default" if self.session is None else self.session

    def of(self, call: object, *, autoregressive: bool) -> Video:
        """The video that a pass belongs to. A call of a pipeline begins a new one, unless its stream has a name."""
        stream, live = self.stream, {name for cache in self.caches.values() for name in cache.streams}
        # A stream that was reset is forgotten here as well.
        self._known = {name: v for name, v in self._known.items() if v.chunk is None or name in live}
        video = self._known.setdefault(stream, Video())
        if call is not None and video.call is not call:
            if self.session is None and video.chunk is not None:
                if not autoregressive:
                    self._warn_if_it_might_go_on()
                for cache in self.caches.values():
                    cache.restart(stream)
                video = self._known[stream] = Video(begin=video.next)
            video.call = call
        return video

    def free(self, chunk: Chunk, besides: str | None = None) -> None:
        """Free what serves a chunk alone, in all transformers or in all but one."""
        for name, cache in self.caches.items():
            if name != besides:
                cache.give_up(chunk.number, self.stream)

    def require_guide(self, branch: str) -> None:
        """Raises: ValueError: a method tells guidance branches from each other, and the pipeline does not name them."""
        for policy in self.policies:
            if policy.guided and (not branch or branch == BATCHED or branch.isdigit()):
                raise ValueError(
                    f"{policy.name} tells guidance branches apart, {' and '.join(map(repr, policy.guided))}, and this "
                    f"pipeline runs {repr(branch) + ' as one batch' if branch else 'them without names'}; enable "
                    f"another method: holdover.diffusers.enable(pipe, holdover.policy('fbcache'))"
                )

    def _warn_if_it_might_go_on(self) -> None:
        policy = self.policies[-1]
        if self._warned or policy.lifetime == "chunk" or policy.predictor is None:
            return
        if all(cache.stats(self.stream).reused == 0 for cache in self.caches.values()):
            self._warned = True
            warnings.warn(
                f"{policy.name} reuses from one chunk to the next, and every call of a pipeline is a video of its own; "
                f"where calls go on with one video, say so: `with enabled.stream('name'): pipe(...)`",
                stacklevel=2,
            )
