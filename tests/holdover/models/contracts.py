"""The chunk-causal repositories that cannot be installed, as contracts: what their blocks take, return and write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.holdover.models import causal_wan as wan
from tests.holdover.models.causal_wan import BLOCKS, CAPACITY, CHUNK, DIM, RATE, TOKENS
from tests.holdover.models.worldplay import (
    FRAMES,
    TEXT_PASS,
    HunyuanVideo_1_5_DiffusionTransformer,
    WanTransformer3DModel,
)


def kv(
    index: Callable[[], Any] = lambda: torch.zeros(1, dtype=torch.long), places: int = CAPACITY * TOKENS
) -> list[dict[str, Any]]:
    return [
        {
            "k": torch.zeros(1, places, DIM),
            "v": torch.zeros(1, places, DIM),
            "global_end_index": index(),
            "local_end_index": index(),
        }
        for _ in range(BLOCKS)
    ]


@dataclass(frozen=True)
class Contract:
    """A repository: how its model is made, and how one pass over a chunk of it is called."""

    name: str
    make: Callable[[], nn.Module]
    index: Callable[[], Any] = lambda: torch.zeros(1, dtype=torch.long)
    in_place: bool = True
    chunks: int = 6

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval().requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """What one video holds: K/V per block, and more."""
        if self.name == "HY-WorldPlay":
            return {"kv_cache": self.model()(**TEXT_PASS)}
        if self.name == "HY-WorldPlay, Wan":
            return {"kv_cache": [{"k": None, "v": None} for _ in range(BLOCKS)]}
        held: dict[str, Any] = {
            "kv_cache": kv(self.index),
            "crossattn_cache": [{"is_init": False} for _ in range(BLOCKS)],
        }
        if self.name == "StreamDiffusionV2":
            for each in held["kv_cache"]:
                each.update(current_step=4, total_steps=4)
        if self.name == "Matrix-Game 2":
            held |= {name: kv(places=CAPACITY * CHUNK) for name in ("kv_cache_mouse", "kv_cache_keyboard")}
        return held

    def run(
        self, model: nn.Module, latents: Tensor, sigma: float, chunk: int, state: dict[str, Any], clean: bool = False
    ) -> Any:
        """One pass over the latents ``[1, C, F, H, W]`` of a chunk."""
        t = torch.full((1, latents.shape[2]), sigma)
        context = torch.linspace(-1, 1, 2 * DIM).reshape(1, 2, DIM)
        if self.name == "HY-WorldPlay":
            turned = torch.full_like(t, chunk)
            given = {**FRAMES, "action": turned, "viewmats": context, "kv_cache": state["kv_cache"]}
            output = model(**given, hidden_states=latents, timestep=t, cache_vision=clean)
            if clean:  # a new list: the old one stays as it was
                state["kv_cache"] = output
            return output
        if self.name == "HY-WorldPlay, Wan":
            given = {"encoder_hidden_states": context, "window_frames": CHUNK, "action": t[0] * 0 + chunk}
            given |= {"viewmats": context, "kv_cache": state["kv_cache"], "is_cache": clean, "current_start": 0}
            output = model(latents, timestep=1000 * t.flatten(), current_end=TOKENS, return_dict=False, **given)
            if clean:
                state["kv_cache"] = output
            return output
        more: dict[str, Any] = {"current_start": chunk * TOKENS}
        if self.name in ("CausVid", "StreamDiffusionV2"):
            more["current_end"] = more["current_start"] + TOKENS
        if self.name == "Rolling Forcing":
            more["updating_cache"] = clean
        if self.name == "Matrix-Game 2":
            frames = 1 + RATE * (CHUNK * (chunk + 1) - 1)
            grown = torch.linspace(0, 1, 2 * frames).reshape(1, -1, 2)  # actions of the clip so far
            more |= {"mouse_cond": grown, "keyboard_cond": 1 - grown, "visual_context": context}
            return model(latents, t, **state, **more)
        return model(latents, t, context, **state, **more)


CONTRACTS = [
    Contract("Self-Forcing", lambda: wan.CausalWanModel(wan.SelfForcingBlock)),
    Contract("Krea realtime", lambda: wan.CausalWanModel(wan.KreaBlock), index=int),
    Contract("CausVid", lambda: wan.CausalWanModel(wan.CausVidBlock), chunks=CAPACITY),
    Contract("LongLive", lambda: wan.LongLiveModel(wan.LongLiveBlock)),
    Contract("LongLive, branch v1.0", lambda: wan.LongLiveModel(wan.LongLive10Block)),
    Contract("Matrix-Game 2", lambda: wan.CausalWanModel(wan.MatrixGameBlock)),
    Contract("HY-WorldPlay", HunyuanVideo_1_5_DiffusionTransformer, in_place=False),
    Contract("HY-WorldPlay, Wan", WanTransformer3DModel, in_place=False),
]
#: Of these nothing can be reused.
REFUSED = [
    Contract("LongLive 2", lambda: wan.LongLiveModel(wan.LongLive2Block)),
    Contract("StreamDiffusionV2", lambda: wan.CausalWanModel(wan.StreamDiffusionBlock)),
    Contract("Rolling Forcing", lambda: wan.CausalWanModel(wan.RollingForcingBlock)),
]


def contract(name: str) -> Contract:
    """A repository's."""
    return next(each for each in (*CONTRACTS, *REFUSED) if each.name == name)
