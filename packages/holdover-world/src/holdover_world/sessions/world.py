"""What sessions share: a world model with several policies attached, and the starts of videos."""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdover.engine.attach import attach
from holdover.engine.blocks import find_blocks
from holdover.engine.cache import Cache
from holdover.engine.snapshot import model_digest
from holdover.method import Policy
from holdover.methods.registry import policy as policy_by_name
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.scenarios import KINDS, load_scenario
from holdover_world.loop.state import Piece
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track

#: The policies that a world offers by default. Sessions start with the first, because it reacts to every action.
POLICIES = ("xcache_reactive", "xcache", "never")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a video begins.

    Attributes:
        latents: clean latents ``[1, F, N, P]``, whole windows.
        actions: their actions ``[1, F, A]``.
        track: the layout in which they were recorded, if there is one.
    """

    latents: Tensor
    actions: Tensor
    track: Track | None = None


class Attached(NamedTuple):
    """A copy of the model, and the cache attached to it."""

    model: WorldModel
    cache: Cache


class World:
    """A world model that sessions share. Use it from one thread.

    Args:
        model: in evaluation mode. It is not changed: policies are attached to copies that share its weights.
        starts: the starts that sessions can choose from, by name, on the model's device.
        policies: the policies that sessions can choose from, by name. The first is the default.
        loop: how chunks follow each other.
        depth: also decode depth for every chunk. This takes time.

    Raises:
        ValueError: there are no starts or no policies, or the model has no depth.
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
            raise ValueError("starts is empty; give at least one scenario")
        if policies is not None and not policies:
            raise ValueError("policies is empty; give at least one, such as {'never': holdover.never()}")
        if depth and "depth" not in model.sizes.modalities:
            raise ValueError("depth=True, but this model has no depth; leave it out")
        self.model, self.starts, self._depth = model, dict(starts), depth
        self.policies = dict(policies or {name: policy_by_name(name) for name in POLICIES})
        self.loop = loop or LoopConfig(commit="last_full")
        self.digest = model_digest(find_blocks(model, [model]))
        self._attached: dict[str, Attached] = {}
        self._freed: list[int] = []
        self._numbers = itertools.count()

    def __deepcopy__(self, _: dict[int, object]) -> World:
        """Itself: sessions share it, and an attached model cannot be copied without its cache."""
        return self

    @property
    def default_policy(self) -> str:
        return next(iter(self.policies))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def attached(self, policy: str) -> Attached:
        """The model with a policy attached.

        Raises:
            ValueError: the world does not offer this policy.
        """
        if policy not in self.policies:
            raise ValueError(f"policy {policy!r} is not one of {', '.join(self.policies)}")
        if policy not in self._attached:
            weights = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
            twin = copy.deepcopy(self.model, weights)
            self._attached[policy] = Attached(twin, attach(twin, self.policies[policy]))
        return self._attached[policy]

    def stream(self) -> str:
        """A free name for a session's stream. Names are reused, so the counts that caches keep per name stay few."""
        return str(heapq.heappop(self._freed) if self._freed else next(self._numbers))

    def free(self, stream: str) -> None:
        """Give a stream's name back."""
        heapq.heappush(self._freed, int(stream))

    def frames(self, piece: Piece) -> dict[str, NDArray[np.uint8]]:
        """The frames of a piece of one row: ``uint8 [T, height, width, 3]`` per camera."""
        return {name: video[0] for name, video in self.model.codec.decode(piece.latents, piece.before).items()}

    def depth(self, piece: Piece) -> dict[str, NDArray[np.float32]]:
        """The depth of a piece of one row in metres: ``float32 [T, height, width]`` per camera. Empty without depth."""
        if not self._depth:
            return {}
        return {name: video[0] for name, video in self.model.codec.decode_depth(piece.latents, piece.before).items()}


def load_starts(model: WorldModel, scenarios: Sequence[str] = KINDS) -> dict[str, Start]:
    """The starts of the shipped clips, by scenario. The model has the shipped cameras."""
    device = model.device
    starts = {}
    for name in scenarios:
        scenario = load_scenario(f"{name}-steady", model, chunks=1)
        latents, actions = scenario.start.to(device), scenario.start_actions.to(device)
        starts[name] = Start(latents=latents, actions=actions, track=scenario.track)
    return starts
