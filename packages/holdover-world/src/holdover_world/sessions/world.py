"""What sessions share: a world model under several policies, and where videos begin."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover.engine.attach import attach
from holdover.engine.cache import Cache
from holdover.method import Policy
from holdover.engine.blocks import find_blocks
from holdover.engine.snapshot import model_digest
from holdover.methods.registry import policy as policy_by_name
from holdover_world.loop.closed_loop import LoopConfig, Piece
from holdover_world.loop.scenarios import KINDS, load_scenario
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track

#: The policies a world offers unless told otherwise; the first is the default, because it heeds every action.
POLICIES = ("xcache_reactive", "xcache", "never")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a video begins: clean latents ``[1, F, N, P]``, whole windows, their actions ``[1, F, A]``, and the layout
    that they were recorded in, if there is one."""

    latents: Tensor
    actions: Tensor
    track: Track | None = None


class World:
    """A world model that sessions share. For use by one thread.

    Args:
        model: in evaluation mode; it is not changed, copies that share its weights are.
        starts: by name what sessions may begin with, on the model's device.
        policies: by name what sessions may run under, the first by default.
        loop: how chunks follow each other.
        depth: whether chunks come with depth as well; decoding it takes time.
    """

    def __init__(
        self,
        model: WorldModel,
        starts: Mapping[str, Start],
        *,
        policies: Mapping[str, Policy] | None = None,
        loop: LoopConfig | None = None,
        depth: bool = False,
    ) -> None:
        if not starts:
            raise ValueError("starts is empty; give a world at least one scenario to start from")
        if policies is not None and not policies:
            raise ValueError("policies is empty; give at least one, such as {'never': holdover.never()}")
        if depth and "depth" not in model.sizes.modalities:
            raise ValueError("depth=True, but this model draws none; leave it out")
        self.model, self.starts, self._depth = model, dict(starts), depth
        self.policies = dict(policies or {name: policy_by_name(name) for name in POLICIES})
        self.loop = loop or LoopConfig(commit="last_full")
        self.digest = model_digest(find_blocks(model, [model]))
        self._lanes: dict[str, tuple[WorldModel, Cache]] = {}
        self._freed: list[int] = []
        self._numbers = itertools.count()

    def __deepcopy__(self, _: dict[int, object]) -> World:
        """Itself: it is shared, and attached models cannot be copied apart from their caches."""
        return self

    @property
    def default_policy(self) -> str:
        return next(iter(self.policies))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def lane(self, policy: str) -> tuple[WorldModel, Cache]:
        """The model under a policy, and its cache.

        Raises:
            ValueError: the world does not offer this policy.
        """
        if policy not in self.policies:
            raise ValueError(f"policy {policy!r} is not one of {', '.join(self.policies)}")
        if policy not in self._lanes:
            weights = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
            twin = copy.deepcopy(self.model, weights)
            self._lanes[policy] = twin, attach(twin, self.policies[policy])
        return self._lanes[policy]

    def stream(self) -> str:
        """A name for a session's streams: the lowest free one, so that what is counted per name stays bounded."""
        return str(heapq.heappop(self._freed) if self._freed else next(self._numbers))

    def free(self, stream: str) -> None:
        heapq.heappush(self._freed, int(stream))

    def frames(self, piece: Piece) -> dict[str, NDArray[np.uint8]]:
        """What a piece of one row shows: per camera ``uint8 [T, height, width, 3]``."""
        return {name: video[0] for name, video in self.model.codec.decode(piece.latents, piece.before).items()}

    def depth(self, piece: Piece) -> dict[str, NDArray[np.float32]]:
        """How far away that is: per camera ``float32 [T, height, width]`` in metres; empty where none is asked for."""
        if not self._depth:
            return {}
        return {name: video[0] for name, video in self.model.codec.decode_depth(piece.latents, piece.before).items()}


def load_starts(model: WorldModel, scenarios: Sequence[str] = KINDS) -> dict[str, Start]:
    """The starts of the shipped clips, for a model of the shipped cameras."""
    device = model.device
    starts = {}
    for name in scenarios:
        scenario = load_scenario(f"{name}-steady", model, chunks=1)
        latents, actions = scenario.start.to(device), scenario.start_actions.to(device)
        starts[name] = Start(latents=latents, actions=actions, track=scenario.track)
    return starts
