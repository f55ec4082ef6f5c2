"""The world model in plain form: one sequence of all windows, and a mask instead of a KV cache."""

from __future__ import annotations

import math
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from holdover_world.conditioning.motion import drive
from holdover_world.config import FRAMES, Plane, WorldConfig, token_rays
from holdover_world.model.block import Block
from holdover_world.model.features import sigma_features
from holdover_world.model.rotary import RotaryTables, rotate
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track


def naive_block_causal(
    model: WorldModel, x: Tensor, sigma_F: Tensor, actions: Tensor, track: Track | None = None
) -> Tensor:
    """All windows at once in one sequence, with a mask instead of a KV cache; the ego is where it was recorded."""
    config, frames, window = model.sizes, x.shape[1], model.sizes.window
    condition = model.sigma_mlp(sigma_features(sigma_F))[None] + model.action_mlp(naive_action_features(actions))
    modulation = model.modulation(F.silu(condition)).unflatten(-1, (6, -1))
    hidden = model.ray_mlp(naive_ray_features(config)).repeat(1, frames, 1, 1)
    kinds = [int(plane.modality == "depth") for plane in config.planes for _ in range(plane.rows * plane.columns)]
    for n, kind in enumerate(kinds):
        hidden[:, :, n] += model.embed[kind](x[:, :, n])
    expected, layouts, motion = torch.zeros_like(x), torch.zeros_like(x), None
    for first in range(0, frames, window):
        poses, motion = drive(motion, actions[:, first : first + window])
        if first == 0:
            continue
        sites = None
        if track is not None:
            sites = [track.site(first * FRAMES - 1)]
            poses, motion = drive(track.motion_T2[None, first * FRAMES - 1], actions[:, first : first + window])
        looked_up, seen, layout = model.reprojection(x[:, first - 1], poses, sites)
        expected[:, first : first + window], layouts[:, first : first + window] = looked_up, layout
        hidden[:, first : first + window] += model.seen_embed(seen)
        for n, kind in enumerate(kinds):
            hidden[:, first : first + window, n] += model.layout_embed[kind](layout[:, :, n])
        for f in range(first, first + window):
            for plane, kind in zip(config.planes, (0, 0, 0, 1, 1, 1), strict=True):
                for r, c in product(range(plane.rows), range(plane.columns)):
                    around = [
                        expected[0, f, plane.start + i * plane.columns + j]
                        if 0 <= i < plane.rows and 0 <= j < plane.columns
                        else torch.zeros_like(expected[0, 0, 0])
                        for i, j in product((r - 1, r, r + 1), (c - 1, c, c + 1))
                    ]
                    token = plane.start + r * plane.columns + c
                    hidden[:, f, token] += model.last_embed[kind](torch.cat(around))
    for block in model.blocks:
        assert isinstance(block, Block)
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + block.table_6C).unsqueeze(2).unbind(3)
        y = F.layer_norm(hidden, hidden.shape[-1:], eps=1.0) * (1 + scale1) + shift1
        heads = config.heads
        q, k, v = block.qkv(y).unflatten(-1, (3, heads, -1)).unbind(3)
        q, k = block.norm_q(q), block.norm_k(k)
        out = torch.zeros_like(v)
        if block.temporal:
            for camera in config.cameras:
                mine = [plane for plane in config.planes if plane.camera == camera]
                own = torch.cat([torch.arange(plane.tokens.start, plane.tokens.stop) for plane in mine])
                places = torch.tensor([(f, *place) for f in range(frames) for p in mine for place in naive_places(p)])
                chunk = torch.arange(frames).repeat_interleave(len(own)) // window
                age = chunk[:, None] - chunk[None]
                allowed = (age >= 0) & (age <= config.context // window)
                for h in range(heads):
                    qs, ks = (naive_rotate(t[0, :, own, h].flatten(0, 1), places) for t in (q, k))
                    scores = (qs @ ks.T).masked_fill(~allowed, -math.inf).softmax(-1)
                    out[0, :, own, h] = (scores @ v[0, :, own, h].flatten(0, 1)).unflatten(0, (frames, -1))
        else:
            cos, sin = (t.flatten(0, 2) for t in RotaryTables(config).cross(x.device, x.dtype))
            for f, h in product(range(frames), range(heads)):
                scores = (rotate(q[0, f, :, h], (cos, sin)) @ rotate(k[0, f, :, h], (cos, sin)).T).softmax(-1)
                out[0, f, :, h] = scores @ v[0, f, :, h]
        hidden = hidden + gate1 * block.out(out.flatten(-2))
        y = F.layer_norm(hidden, hidden.shape[-1:], eps=1.0) * (1 + scale2) + shift2
        hidden = hidden + gate2 * block.down(F.gelu(block.up(y)))
    shift, scale = model.final_modulation(F.silu(condition)).unsqueeze(2).chunk(2, -1)
    final = F.layer_norm(hidden, hidden.shape[-1:], eps=1.0) * (1 + scale) + shift
    clean = torch.stack([model.head[kind](final[:, :, n]) for n, kind in enumerate(kinds)], 2)
    for f in range(window, frames):
        clean[:, f] += torch.sigmoid(model.keep(final[:, f])) * expected[:, f]
        clean[:, f] += model.keep_layout(final[:, f]) * layouts[:, f]
    return clean


def naive_places(plane: Plane) -> list[tuple[float, float]]:
    """Centres of the tokens of a plane, in tokens of colour. The origin is the centre of the first token of colour."""
    size = 16 if plane.modality == "colour" else 32
    return [
        ((size * (r + 0.5)) / 16 - 0.5, (size * (c + 0.5)) / 16 - 0.5)
        for r, c in product(range(plane.rows), range(plane.columns))
    ]


def naive_rotate(x: Tensor, places: Tensor) -> Tensor:
    """The channels as complex numbers: half turn with time, a quarter with the row, a quarter with the column."""
    half = x.shape[1] // 2
    counts = half - 2 * (half // 4), half // 4, half // 4
    angles = torch.cat(
        [
            places[:, a, None] * torch.tensor([2.0 ** (-5 * i / (n - 1)) for i in range(n)])
            for a, n in enumerate(counts)
        ],
        1,
    )
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], 1)


def naive_ray_features(config: WorldConfig) -> Tensor:
    features = []
    for plane in config.planes:
        for direction, at in zip(*token_rays(config)[plane.tokens].reshape(-1, 2, 3).swapaxes(0, 1), strict=True):
            angles = [math.pi * 2**k * float(d) for d in direction for k in range(4)]
            kind = [plane.modality == "colour", plane.modality == "depth"]
            features.append([*direction, *at, *map(math.sin, angles), *map(math.cos, angles), *kind])
    return torch.tensor(features)


def naive_action_features(actions: Tensor) -> Tensor:
    logarithm = torch.where(actions < 0, -torch.log(1 - actions), torch.log(1 + actions))
    angles = torch.stack([logarithm * math.pi * 2.0**k for k in range(-1, 7)], -1).flatten(-2)
    return torch.cat([logarithm, angles.sin(), angles.cos()], -1)
