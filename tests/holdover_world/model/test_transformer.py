"""The world model against one masked sequence, and its parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from holdover_world.conditioning.motion import drive
from holdover_world.config import Plane
from holdover_world.model.block import Block, attention
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.layout import Track
from tests.holdover_world.model.naive_transformer import naive_action_features, naive_block_causal
from tests.holdover_world.small import latents, small_config, small_layout, small_model


def test_the_autoencoders_go_where_the_model_goes() -> None:
    model = small_model()
    model.to("meta")
    assert {autoencoder.device.type for autoencoder in model.codec.autoencoders.values()} == {"meta"}
    other = WorldModel.of(small_config()).to("meta")
    other.codec = small_model().codec
    assert {autoencoder.device.type for autoencoder in other.codec.autoencoders.values()} == {"meta"}


def test_plain_attention_equals_the_fused_one() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 16)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1)
    torch.testing.assert_close(
        attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).float(), expected, atol=0.05, rtol=0.05
    )
    torch.testing.assert_close(attention(q, k, v), expected)


@pytest.mark.parametrize("in_layout", [False, True])
def test_streaming_with_the_kv_cache_equals_one_masked_pass(in_layout: bool) -> None:
    model = small_model()
    track = None
    if in_layout:
        poses = torch.stack([torch.arange(32.0) / 4, torch.zeros(32), torch.arange(32.0) / 90], -1).double()
        track = Track(small_layout(), poses, torch.tensor([[3.0, 0.05]]).repeat(32, 1))
    x, actions = latents(model, 8), torch.rand(1, 8, 2) * 4 - 2
    sigma_F = torch.tensor([0.0] * 6 + [0.8] * 2)
    expected = naive_block_causal(model, x, sigma_F, actions, track)
    history = model.new_history()
    for start in (0, 2, 4):
        window = slice(start, start + 2)
        written = model(x[:, window], sigma=0.0, action_BFA=actions[:, window], history=history, write=True)
        torch.testing.assert_close(written, expected[:, window], atol=1e-4, rtol=1e-4)
        if track is not None:
            history.stand([track], [4 * (start + 2) - 1])
    noisy = model(x[:, 6:], sigma=0.8, action_BFA=actions[:, 6:], history=history)
    torch.testing.assert_close(noisy, expected[:, 6:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(noisy, model(x[:, 6:], sigma=0.8, action_BFA=actions[:, 6:]), atol=1e-2)


def test_what_is_expected_is_carried_over() -> None:
    """A model whose blocks add nothing returns the expectation, or nothing, by its ``keep`` gate. Without an action it
    expects the old frame."""
    model = small_model()
    for layer in (*model.head, model.keep):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    shown, actions, history = latents(model, 2), torch.tensor([0.2, 0.5]).expand(1, 2, 2), model.new_history()
    model(shown, sigma=0.0, action_BFA=actions, history=history, write=True)
    moved = model.reprojection(shown[:, 1], drive(drive(None, actions)[1], actions)[0])[0]
    nothing, stays = torch.zeros_like(shown), shown[:, 1:].expand_as(shown)
    for bias, action, expected in ((50.0, actions, moved), (-200.0, actions, nothing), (50.0, None, stays)):
        torch.nn.init.constant_(model.keep.bias, bias)
        drawn = model(latents(model, 2, seed=1), sigma=1.0, action_BFA=action, history=history)
        assert torch.equal(drawn, expected)


def test_no_action_stands_for_any() -> None:
    model = small_model()
    x, action = latents(model, 2, batch=2), torch.tensor([0.3, -0.2]).expand(2, 2, 2)
    model.no_action_C.copy_(model.action_mlp(naive_action_features(action[:1]))[0, 0])
    told = model(x, sigma=0.5, action_BFA=action)
    torch.testing.assert_close(model(x, sigma=0.5, action_BFA=None), told)
    assert not torch.allclose(model(x, sigma=0.5, action_BFA=-action), told, atol=1e-2)


def test_a_row_of_a_batch_is_that_row_alone() -> None:
    model = small_model()
    x, actions = latents(model, 2, batch=2), torch.rand(2, 2, 2)
    both = model(x, sigma=torch.tensor([0.3, 0.9]), action_BFA=actions)
    alone = model(x[1:], sigma=0.9, action_BFA=actions[1:])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def tokens_of(plane: Plane) -> range:
    return range(plane.tokens.start, plane.tokens.stop)


def test_the_tap_is_what_attention_sees() -> None:
    model, seen = small_model(), []
    slot = model.holdover_slots()[0]
    assert isinstance(slot.block, Block)
    slot.block.register_forward_pre_hook(lambda block, args: seen.append(slot.taps["modulated"](block, *args)))
    slot.block.qkv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(latents(model, 2), sigma=0.5, action_BFA=torch.rand(1, 2, 2))
    sorted_by_camera = [
        t for c in model.sizes.cameras for p in model.sizes.planes if p.camera == c for t in tokens_of(p)
    ]
    assert torch.equal(seen[0].unflatten(1, (2, -1))[:, :, sorted_by_camera], seen[1])
