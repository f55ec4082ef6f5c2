"""The closed loop drives other generators: AnyFlow FAR itself, and one with the calls of Self-Forcing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.loop.generator import Generator, Shape
from tests.holdover.models import causal_wan, contracts
from tests.holdover.models.inputs import WAN, far_kv
from tests.holdover.models.models import TINY

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:.* could reuse nothing"),
]
WINDOW, CYCLES = 4, 3
#: Reasons for which X-Cache computes without looking at the input.
FORBIDDEN = {"warm-up", "anchor", "kv cycle"}


def still(model: nn.Module) -> nn.Module:
    """Weights so small that only the noise matters, so that the scene stands still."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def self_forcing(window: int = WINDOW) -> tuple[nn.Module, Generator, int]:
    contract = contracts.CONTRACTS[0]
    model = still(contract.model())

    def predict(latents: Tensor, *, sigma: float, kv: Any, start: int, actions: Tensor, write: bool) -> Tensor:
        t = torch.full((1, latents.shape[2]), sigma)
        context = torch.linspace(-1, 1, 2 * causal_wan.DIM).reshape(1, 2, -1)
        return model(latents, t, context, **kv, current_start=start * causal_wan.PER_FRAME)

    shape = Shape(window, causal_wan.ROWS, causal_wan.COLUMNS)
    return model, Generator(shape, new_kv=contract.state, predict=predict), causal_wan.CHANNELS


def anyflow_far(window: int = WINDOW) -> tuple[nn.Module, Generator, int]:
    pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
    model = still(next(tiny for tiny in TINY if tiny.name == "AnyFlowFARTransformer3DModel").make())
    rows, columns, chunks = 8, 12, CYCLES + 1

    def new_kv() -> dict[str, Any]:
        return {"kv": far_kv(1, chunks * WINDOW * rows * columns // 4, WAN["attention_head_dim"]), "past": []}

    def predict(latents: Tensor, *, sigma: float, kv: Any, start: int, actions: Tensor, write: bool) -> Tensor:
        frames = latents.transpose(1, 2)
        cached = len(kv["past"])
        if write:  # its clean pass runs over the whole past, because it keeps old chunks compressed
            kv["past"].append(frames)
            frames = torch.cat(kv["past"], 1)
        time = torch.full((1, frames.shape[1]), 1000 * sigma)
        output = model(
            hidden_states=frames,
            timestep=time,
            r_timestep=time,
            encoder_hidden_states=torch.zeros(1, 5, 16),
            chunk_partition=[latents.shape[2]] * (cached + 1),
            kv_cache=kv["kv"],
            kv_cache_flag={"num_cached_chunks": cached, "is_cache_step": write},
            return_dict=False,
        )[0]
        return latents if write else output.transpose(1, 2)

    return model, Generator(Shape(window, rows, columns), new_kv=new_kv, predict=predict), WAN["in_channels"]


def drive(made: tuple[nn.Module, Generator, int], config: LoopConfig, cached: bool) -> tuple[Tensor, Any]:
    """The pieces of three cycles of a constant action, and the cache."""
    model, generator, channels = made
    sizes = generator.sizes
    start = torch.zeros(1, sizes.window, sizes.rows * sizes.columns, channels)
    cache = holdover.attach(model, holdover.xcache()) if cached else None
    loop = ClosedLoop(generator, start, torch.zeros(1, sizes.window, 2), config=config, cache=cache)
    pieces = [piece.latents for piece in loop.run(torch.zeros((CYCLES - 1) * WINDOW, 2))]
    if cache is not None:
        cache.detach()
    return torch.cat(pieces, 1), cache


each = pytest.mark.parametrize("make", [self_forcing, anyflow_far])


@each
@torch.inference_mode()
def test_a_still_scene_skips_what_may_be_skipped(make: Callable[[], Any]) -> None:
    made = make()
    pieces, cache = drive(made, LoopConfig(), cached=True)
    allowed = [d for d in cache.trace if d.role == "denoise" and d.reason not in FORBIDDEN]
    assert len(allowed) > 20
    assert cache.stats().reused >= 0.9 * len(allowed)
    assert all(d.computed for d in cache.trace if d.role == "kv_update")
    full, _ = drive(made, LoopConfig(), cached=False)
    assert torch.allclose(pieces, full, atol=1e-3)


@each
@pytest.mark.parametrize("fresh_noise", [False, True])
@torch.inference_mode()
def test_where_every_chunk_is_committed_everything_is_computed(make: Callable[[], Any], fresh_noise: bool) -> None:
    made = make(1)
    config = LoopConfig(cadence="plain", fresh_noise=fresh_noise)
    pieces, cache = drive(made, config, cached=True)
    assert cache.stats().reused == 0
    assert torch.equal(pieces, drive(made, config, cached=False)[0])


@each
@torch.inference_mode()
def test_fresh_noise_leaves_little_to_skip(make: Callable[[], Any]) -> None:
    """A window made from other noise is another input for the gate."""
    shared, fresh = (
        drive(make(), LoopConfig(fresh_noise=fresh), cached=True)[1].stats().reused for fresh in (False, True)
    )
    assert fresh < shared / 2
