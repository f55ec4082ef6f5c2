"""The closed loop: an action comes in, the next piece of video goes out. It drives any `LoopModel`.

*Window cadence*, our reading of X-Cache (arXiv 2604.20289): the chunks of a cycle generate one window again and again,
with the same noise. Each chunk takes the newest action and emits one more latent frame. A clean pass then writes one of
these windows into the KV cache. *Plain cadence*: each chunk generates a new window of one latent frame and commits it.

The frames of a window that are not yet commanded follow the *plan*, what the driver intends for them. Without a plan
they hold the newest action.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action, T chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from torch import Tensor

from holdover_world.loop.batch import advance, write_history
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.cycle import Cycle, M
from holdover_world.loop.protocol import History, Located, LoopCache
from holdover_world.loop.state import LoopState, Piece


class ClosedLoop(Cycle[M]):
    """One stream of a model, driven action by action.

    Args:
        model: the model, with or without a cache attached.
        start: clean latents ``[B, F, N, P]`` that the video begins with, whole windows. They are written into the
            history.
        start_actions: their normalised actions ``[B, F, A]``.
        config: the cadence.
        seed: of the noise.
        cache: what `holdover.attach` returned for this model; None computes everything.
        stream: the name of this stream in the cache.
        track: what the start was recorded along, for a model whose history is `Located`.

    Raises:
        ValueError: the start is not whole windows with their actions, or the model has no use for a track.
    """

    def __init__(
        self,
        model: M,
        start: Tensor,
        start_actions: Tensor,
        *,
        config: LoopConfig | None = None,
        seed: int = 0,
        cache: LoopCache | None = None,
        stream: str = "default",
        track: Any = None,
    ) -> None:
        window = model.sizes.window
        if start.shape[1] == 0 or start.shape[1] % window:
            raise ValueError(f"start has {start.shape[1]} latent frames; give a multiple of the window, {window}")
        if start_actions.shape[:2] != start.shape[:2]:
            raise ValueError(f"start_actions {tuple(start_actions.shape)} do not match start {tuple(start.shape)}")
        super().__init__(model, config or LoopConfig(), cache, stream, start.device)
        history: History = model.new_history()
        if track is not None and not isinstance(history, Located):
            raise ValueError(f"a {type(history).__name__} has no place on a map; leave track out")
        self.remember(history)
        self.chunk, self.committed, self.last = 0, None, start[:, -1].clone()
        self._noise_source.manual_seed(seed)
        self.begin_cycle()
        length = 1 if self.config.cadence == "plain" else window
        for first in range(0, start.shape[1], length):
            part = slice(first, first + length)
            write_history([self], [(start[:, part], start_actions[:, part])])
            if isinstance(history, Located) and track is not None:
                history.follow(track)

    @classmethod
    def resume(
        cls,
        model: M,
        state: LoopState,
        *,
        config: LoopConfig | None = None,
        cache: LoopCache | None = None,
        stream: str = "default",
    ) -> ClosedLoop[M]:
        """A loop that continues from a state. The cache restores its own entries."""
        loop = cls.__new__(cls)
        Cycle.__init__(loop, model, config or LoopConfig(), cache, stream, state.last.device)
        loop.state = state
        return loop

    def fork(self, stream: str) -> ClosedLoop[M]:
        """An independent loop that continues from here as another stream. The cache forks its own entries."""
        return ClosedLoop.resume(self.model, self.state, config=self.config, cache=self.cache, stream=stream)

    def step(self, action: Tensor, plan: Tensor | None = None) -> Piece:
        """Generate the next piece.

        Args:
            action: the newest normalised action, ``[B, A]`` or ``[A]``.
            plan: what is intended for the frames that are not yet commanded, ``[T, A]`` or ``[T, B, A]``. If it is
                shorter than the rest of the window, its last action is held; if it is longer, the end is left out. The
                next chunk may bring another plan. None: the newest action is held.

        Raises:
            ValueError: the plan has another width than the action, or is not finite.
        """
        return advance([self], [action], [plan])[0]

    def run(self, actions: Tensor, plans: Iterable[Tensor | None] | None = None) -> Iterator[Piece]:
        """Generate one piece per action of ``actions``, ``[T, A]`` or ``[T, B, A]``, each with its plan."""
        for action, plan in zip(actions, plans or repeat(None), strict=False):
            yield self.step(action, plan)
