from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from holdover.world.cameras import RIG, stitch
from holdover.world.config import WorldConfig, ray_directions
from holdover.world.kv_cache import KVCache
from holdover.world.latents import patchify, unpatchify
from holdover.world.rotary import RotaryTables, rotary_table, rotate
from holdover.world.transformer import Block, WorldModel, attention, sigma_features

from .small import latents, small_config, small_model


def random_video(config: WorldConfig, frames: int) -> dict[str, Tensor]:
    return {c.name: torch.randint(0, 256, (2, frames, c.height, c.width, 3), dtype=torch.uint8) for c in config.cameras}


def test_patches_go_there_and_back() -> None:
    config = WorldConfig()
    video = random_video(config, 8)
    x = patchify(video, config)
    assert x.shape == (2, 2, 532, 768)
    back = unpatchify(x, config)
    assert list(back) == [c.name for c in RIG]
    assert all(torch.equal(back[name], video[name]) for name in video)


def test_tokens_are_ordered_by_group_view_row_and_column() -> None:
    config = small_config()
    video = {name: torch.zeros_like(frames) for name, frames in random_video(config, 4).items()}
    video["front_narrow"][0, 2, 8:16, 16:24] = 255  # second latent frame, second row, third column
    lit = (patchify(video, config)[0] > 0).any(-1).nonzero()
    per_view = 2 * 4
    assert lit.tolist() == [[1, per_view + 1 * 4 + 2]]


def test_a_missing_camera_and_a_ragged_clip_are_named() -> None:
    config = small_config()
    video = random_video(config, 4)
    with pytest.raises(ValueError, match="rear"):
        patchify({name: v for name, v in video.items() if name != "rear"}, config)
    with pytest.raises(ValueError, match="3 frames"):
        patchify({name: v[:, :3] for name, v in video.items()}, config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"heads": 5}, "heads=5"), ({"context": 3}, "context=3"), ({"patch": 7}, "patch=7"), ({"heads": 8}, "rotary")],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_config(**changes)


def test_rotary_scores_depend_on_distance_alone() -> None:
    table = rotary_table(torch.arange(10.0)[:, None], [torch.tensor([1.0, 0.3, 0.05])])
    q, k = torch.randn(6).expand(10, 6), torch.randn(6).expand(10, 6)
    scores = rotate(q, table) @ rotate(k, table).T
    for distance in range(-3, 4):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_plain_attention_equals_the_fused_one() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 16)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1)
    torch.testing.assert_close(
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), expected, atol=0.05, rtol=0.05
    )
    torch.testing.assert_close(attention(q, k, v), expected)


def test_neighbouring_cameras_look_where_the_rig_says() -> None:
    directions = dict(zip([c.name for c in RIG], np.split(ray_directions(WorldConfig()), _camera_ends()), strict=True))
    for camera in RIG:
        azimuth = directions[camera.name][:, 0]
        middle = math.atan2(np.sin(azimuth).mean(), np.cos(azimuth).mean())
        assert abs(math.remainder(middle - math.radians(camera.yaw), math.tau)) < 0.02
    columns = WorldConfig().grid(RIG[0])[1]
    assert directions["front_wide"][0, 0] > directions["front_wide"][columns - 1, 0]  # left is positive
    assert directions["front_wide"][0, 1] > directions["front_wide"][-1, 1]  # the first row is the sky


def _camera_ends() -> list[int]:
    config = WorldConfig()
    return np.cumsum([math.prod(config.grid(c)) for c in config.cameras])[:-1].tolist()


def naive_block_causal(model: WorldModel, x: Tensor, sigma_F: Tensor, actions: Tensor) -> Tensor:
    """All windows at once in one sequence, with a mask instead of a KV cache."""
    config = model.sizes
    frames, window = x.shape[1], config.window
    condition = model.sigma_mlp(sigma_features(sigma_F))[None] + model.action_mlp(_action_features(actions))
    modulation = model.modulation(F.silu(condition)).unflatten(-1, (6, -1))
    hidden = model.embed(x) + model.position_NC
    for first in range(window, frames, window):
        last, start = x[0, first - 1], 0
        for camera in config.cameras:
            rows, columns = config.grid(camera)
            for r in range(rows):
                for c in range(columns):
                    around = [
                        last[start + i * columns + j]
                        if 0 <= i < rows and 0 <= j < columns
                        else torch.zeros_like(last[0])
                        for i in (r - 1, r, r + 1)
                        for j in (c - 1, c, c + 1)
                    ]
                    hidden[:, first : first + window, start + r * columns + c] += model.last_embed(torch.cat(around))
            start += rows * columns
    for block in model.blocks:
        assert isinstance(block, Block)
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + block.table_6C).unsqueeze(2).unbind(3)
        y = F.layer_norm(hidden, hidden.shape[-1:], eps=1.0) * (1 + scale1) + shift1
        heads = config.heads
        q, k, v = block.qkv(y).unflatten(-1, (3, heads, -1)).unbind(3)
        q, k = block.norm_q(q), block.norm_k(k)
        out = torch.zeros_like(v)
        if block.temporal:
            start = 0
            for g, group in enumerate(config.view_groups):
                size = group.height * group.width
                table = RotaryTables(config).temporal([0], frames, x.device, x.dtype)[g]
                for _ in range(group.views):
                    own = slice(start, start + size)
                    for h in range(heads):
                        qs, ks = (rotate(t[0, :, own, h].flatten(0, 1), table) for t in (q, k))
                        chunk = torch.arange(frames).repeat_interleave(size) // window
                        age = chunk[:, None] - chunk[None]
                        allowed = (age >= 0) & (age <= config.context // window)
                        scores = (qs @ ks.T).masked_fill(~allowed, -math.inf).softmax(-1)
                        out[0, :, own, h] = (scores @ v[0, :, own, h].flatten(0, 1)).unflatten(0, (frames, size))
                    start += size
        else:
            table = RotaryTables(config).cross(x.device, x.dtype)
            for f in range(frames):
                for h in range(heads):
                    scores = (rotate(q[0, f, :, h], table) @ rotate(k[0, f, :, h], table).T).softmax(-1)
                    out[0, f, :, h] = scores @ v[0, f, :, h]
        hidden = hidden + gate1 * block.out(out.flatten(-2))
        y = F.layer_norm(hidden, hidden.shape[-1:], eps=1.0) * (1 + scale2) + shift2
        hidden = hidden + gate2 * block.down(F.gelu(block.up(y)))
    shift, scale = model.final_modulation(F.silu(condition)).unsqueeze(2).chunk(2, -1)
    final = F.layer_norm(hidden, hidden.shape[-1:], eps=1.0) * (1 + scale) + shift
    clean = model.head(final).unflatten(-1, (config.frames_per_latent, -1, 3))
    motion = model.motion(final).unflatten(-1, (config.frames_per_latent, 2, 3))
    share = torch.sigmoid(model.keep(final))
    for f in range(window, frames):
        newest, start = x[0, f // window * window - 1].unflatten(-1, (config.frames_per_latent, -1, 3))[:, -1], 0
        for camera in config.cameras:
            rows, columns = config.grid(camera)
            tokens = newest[start : start + rows * columns].view(rows, columns, 8, 8, 3)
            image = tokens.permute(0, 2, 1, 3, 4).reshape(8 * rows, 8 * columns, 3)
            for token in range(rows * columns):
                for t in range(config.frames_per_latent):
                    moved = naive_patch(image, divmod(token, columns), motion[0, f, start + token, t])
                    colour = moved.mean(0)
                    clean[0, f, start + token, t] += colour + share[0, f, start + token, t] * (moved - colour)
            start += rows * columns
    return clean.flatten(-3)


def naive_patch(image: Tensor, at: tuple[int, int], motion: Tensor) -> Tensor:
    """The 8x8 patch at (row, column) of an image, each pixel fetched from where an affine motion points."""
    height, width, _ = image.shape
    pixels = []
    for r in range(8):
        for c in range(8):
            inside = torch.tensor([1.0, (r - 3.5) / 4, (c - 3.5) / 4])
            down, right = (4 * (motion @ inside)).tolist()
            y = min(max(8 * at[0] + r + down, 0), height - 1)
            x = min(max(8 * at[1] + c + right, 0), width - 1)
            y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
            top = (1 - (x - x0)) * image[y0, x0] + (x - x0) * image[y0, x0 + 1]
            bottom = (1 - (x - x0)) * image[y0 + 1, x0] + (x - x0) * image[y0 + 1, x0 + 1]
            pixels.append((1 - (y - y0)) * top + (y - y0) * bottom)
    return torch.stack(pixels)


def _action_features(actions: Tensor) -> Tensor:
    octaves = [math.pi * 2.0**k for k in range(-1, 7)]
    angles = torch.stack([actions * o for o in octaves], -1).flatten(-2)
    return torch.cat([actions, angles.sin(), angles.cos()], -1)


def test_streaming_with_the_kv_cache_equals_one_masked_pass() -> None:
    model = small_model()
    x, actions = latents(model, 8), torch.rand(1, 8, 2)
    sigma_F = torch.tensor([0.0] * 6 + [0.8] * 2)
    expected = naive_block_causal(model, x, sigma_F, actions)
    cache = model.new_cache()
    for start in (0, 2, 4):
        window = slice(start, start + 2)
        written = model(x[:, window], sigma=0.0, action_BFA=actions[:, window], cache=cache, write=True)
        torch.testing.assert_close(written, expected[:, window], atol=1e-4, rtol=1e-4)
    noisy = model(x[:, 6:], sigma=0.8, action_BFA=actions[:, 6:], cache=cache)
    torch.testing.assert_close(noisy, expected[:, 6:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(noisy, model(x[:, 6:], sigma=0.8, action_BFA=actions[:, 6:]), atol=1e-2)


def test_a_patch_is_found_where_it_was() -> None:
    """A motion of whole pixels moves the newest video frame by so many."""
    model = small_model()
    before = latents(model, 1).clamp(-1, 1)
    motion = torch.zeros(1, 1, model.sizes.tokens, model.sizes.frames_per_latent, 2, 3)
    motion[..., 0, 0], motion[..., 1, 0] = 3 / 4, -2 / 4  # 3 pixels down, 2 left, in half patches
    share = torch.ones(1, 1, model.sizes.tokens, model.sizes.frames_per_latent)
    after = unpatchify(model.carried(before[:, 0], motion.flatten(3), share), model.sizes)
    for name, frames in unpatchify(before, model.sizes).items():
        assert torch.equal(after[name][0, 0, :-3, 2:], frames[0, -1, 3:, :-2])
        assert torch.equal(after[name][0, 0, -1, 2:], frames[0, -1, -1, :-2])  # past the border, what lies there


def test_what_is_unmoved_is_carried_over() -> None:
    """A model that adds nothing repeats the newest video frame, or its mean colour per patch."""
    model = small_model()
    for layer in (model.head, model.keep, model.motion):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    shown, actions, cache = latents(model, 2).clamp(-1, 1), torch.zeros(1, 2, 2), model.new_cache()
    model(shown, sigma=0.0, action_BFA=actions, cache=cache, write=True)
    before = unpatchify(shown, model.sizes)
    for bias in (50.0, -50.0):
        torch.nn.init.constant_(model.keep.bias, bias)
        after = unpatchify(model(latents(model, 2, seed=1), sigma=1.0, action_BFA=actions, cache=cache), model.sizes)
        for name, frames in after.items():
            newest = before[name][:, -1:]
            if bias < 0:
                rows = newest.float().unflatten(2, (-1, 8)).unflatten(4, (-1, 8))  # [B, 1, rows, 8, columns, 8, 3]
                newest = rows.mean((3, 5), keepdim=True).expand_as(rows).flatten(4, 5).flatten(2, 3)
            assert (frames.float() - newest.float()).abs().max() <= (0 if bias > 0 else 1)


def test_the_cache_rolls_forks_and_survives_a_failed_pass() -> None:
    model = small_model()
    cache = model.new_cache()
    x, actions = latents(model, 2), torch.rand(1, 2, 2)
    for _ in range(3):
        model(x, sigma=0.0, action_BFA=actions, cache=cache, write=True)
    held = cache.get(0, 0)
    assert held is not None
    assert cache.frames == 6
    assert held[0].shape[2] == model.sizes.context * 2 * 4  # four of six latent frames, eight patches a view
    twin = cache.fork()
    handle = model.blocks[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("lost power")))
    with pytest.raises(RuntimeError, match="lost power"):
        model(x + 1, sigma=0.0, action_BFA=actions, cache=cache, write=True)
    handle.remove()
    assert cache.frames == 6
    assert torch.equal(cache.get(0, 0)[0], held[0])  # type: ignore[index]
    model(x + 1, sigma=0.0, action_BFA=actions, cache=cache, write=True)
    assert twin.frames == 6
    assert torch.equal(twin.get(0, 0)[0], held[0])  # type: ignore[index]
    restored = KVCache(model.sizes.context)
    restored.load_state_dict(cache.state_dict())
    expected = model(x, sigma=0.5, action_BFA=actions, cache=cache)
    assert torch.equal(model(x, sigma=0.5, action_BFA=actions, cache=restored), expected)
    assert restored.nbytes == cache.nbytes > 0


def test_a_row_of_a_batch_is_that_row_alone() -> None:
    model = small_model()
    x, actions = latents(model, 2, batch=2), torch.rand(2, 2, 2)
    both = model(x, sigma=torch.tensor([0.3, 0.9]), action_BFA=actions)
    alone = model(x[1:], sigma=0.9, action_BFA=actions[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_keeps_weights_and_configuration(tmp_path: Path) -> None:
    model = small_model()
    model.save(tmp_path / "model.safetensors")
    loaded = WorldModel.load(tmp_path / "model.safetensors", dtype=torch.float32)
    assert loaded.config == model.sizes
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(FileNotFoundError, match="holdover world train"):
        WorldModel.load(tmp_path / "other.safetensors")


def test_the_rig_is_stitched_in_place() -> None:
    frames = {c.name: np.full((2, c.height, c.width, 3), i + 1) for i, c in enumerate(RIG)}
    canvas = stitch(frames)
    assert canvas.shape == (2, 160, 256, 3)
    names = [c.name for c in RIG]
    assert canvas[0, 0, 0, 0] == names.index("front_wide") + 1
    assert canvas[0, 64, 0, 0] == names.index("left_rear") + 1
    assert canvas[0, 159, 128, 0] == names.index("rear") + 1
    assert canvas[0, 159, 0, 0] == 0
    assert (canvas > 0).sum() == 2 * 3 * sum(c.width * c.height for c in RIG)
    with pytest.raises(ValueError, match="none of the rig"):
        stitch({"periscope": frames["rear"]})


def test_the_tap_is_what_attention_sees() -> None:
    model, seen = small_model(), []
    slot = model.holdover_slots()[0]
    assert isinstance(slot.block, Block)
    slot.block.register_forward_pre_hook(lambda block, args: seen.append(slot.taps["modulated"](block, *args)))
    slot.block.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(latents(model, 2), sigma=0.5, action_BFA=torch.rand(1, 2, 2))
    assert torch.equal(seen[0], seen[1].flatten(1, 2))
