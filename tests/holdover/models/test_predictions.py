"""Step hold on every known model whose prediction is known: what it is given stands for the clean prediction held."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.models.noise import of_scheduler, per_thousand
from holdover.models.registry import find
from tests.holdover.models.contracts import CONTRACTS, Contract
from tests.holdover.models.models import TINY, Tiny

pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention.*"),
    pytest.mark.filterwarnings("ignore:In CPU autocast.*", "ignore:CPU Autocast.*"),
]

HOLD = holdover.policy("step_hold")
SIGMAS = (0.9, 0.85, 0.8, 0.75)
KNOWN = [tiny for tiny in TINY if (adapter := find(tiny.make())) is not None and adapter.prediction is not None]
CAUSAL = [held for held in CONTRACTS if (adapter := find(held.model())) is not None and adapter.prediction is not None]


def clean(kind: str, x: Tensor, y: Tensor, sigma: float) -> Tensor:
    x, y = x.double(), y.double()
    return x - sigma * y if kind == "flow" else math.sqrt(1 - sigma**2) * x - sigma * y


def returned(kind: str, x: Tensor, held: Tensor, sigma: float) -> Tensor:
    """The noise that is in x if the latents are those that are held; then what the model returns for both."""
    share = 1 - sigma if kind == "flow" else math.sqrt(1 - sigma**2)
    noise = (x.double() - share * held) / sigma
    return (noise - held if kind == "flow" else share * noise - sigma * held).float()


def test_which_are_known() -> None:
    names = {tiny.name for tiny in KNOWN}
    assert {"WanTransformer3DModel", "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"} <= names
    assert len(KNOWN) >= 10
    assert {held.name for held in CAUSAL} >= {"Self-Forcing", "CausVid", "LongLive", "Matrix-Game 2", "Krea realtime"}


@pytest.mark.parametrize("tiny", KNOWN, ids=lambda tiny: tiny.name)
@torch.inference_mode()
def test_held_passes_of_a_class_of_diffusers(tiny: Tiny) -> None:
    """The noise level is that of the timestep, or, where the model is not told it, of the step."""
    model = tiny.make()
    adapter = find(model)
    assert adapter is not None
    assert adapter.prediction is not None
    told: dict[str, Any] = {} if adapter.noise is not None else {"sigma": 0.6}
    inputs = [tiny.inputs(step, 3, 1, 0) for step in range(4)]
    outputs = [tiny.run(model, step) for step in range(4)]
    sigmas = [told.get("sigma", float(torch.as_tensor(each["timestep"]).max()) / 1000) for each in inputs]
    assert told or sigmas == pytest.approx(SIGMAS)
    with holdover.attach(model, HOLD) as cache:
        made = []
        for index in range(4):
            with cache.step(chunk=0, index=index, num_steps=4, **told):
                made.append(tiny.run(model, index))
    assert torch.equal(made[0], outputs[0])
    assert torch.equal(made[3], outputs[3])
    axis = next(
        (n for n, (a, b) in enumerate(zip(inputs[0]["hidden_states"].shape, outputs[0].shape, strict=True)) if a != b),
        1,
    )
    noisy = [each["hidden_states"].narrow(axis, 0, outputs[0].shape[axis]) for each in inputs]
    held = clean(adapter.prediction, noisy[0], outputs[0], sigmas[0])
    for index in (1, 2):
        expected = returned(adapter.prediction, noisy[index], held, sigmas[index])
        torch.testing.assert_close(made[index], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(made[index], outputs[index], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("held", CAUSAL, ids=lambda held: held.name)
@torch.inference_mode()
def test_held_passes_of_a_chunk_causal_model_and_its_kv_cache(held: Contract) -> None:
    """Two of four passes are held, and after the clean pass the KV cache is that of the same latents."""

    def drive(model: nn.Module, cache: holdover.Cache | None) -> tuple[list[Any], list[Tensor], list[Tensor]]:
        state, outputs, entered = held.state(), [], []
        for index, sigma in enumerate(SIGMAS):
            x = torch.randn(1, 3, 4, 2, 3, generator=torch.Generator().manual_seed(index))
            entered.append(x)
            if cache is None:
                outputs.append(held.run(model, x, 1000 * sigma, 0, state))
            else:
                with cache.step(chunk=0, index=index, num_steps=4):
                    outputs.append(held.run(model, x, 1000 * sigma, 0, state))
        done = torch.randn(1, 3, 4, 2, 3, generator=torch.Generator().manual_seed(9))
        if cache is None:
            held.run(model, done, 0.0, 0, state, clean=True)
        else:
            with cache.step(chunk=0, role="kv_update"):
                held.run(model, done, 0.0, 0, state, clean=True)
        return [each["k"].clone() for each in state["kv_cache"]], outputs, entered

    keys, outputs, entered = drive(held.model(), None)
    model = held.model()
    with holdover.attach(model, HOLD) as cache:
        held_keys, made, _ = drive(model, cache)
    assert [d.computed for d in cache.trace] == [True, False, False, True, True]
    assert all(map(torch.equal, held_keys, keys))
    assert torch.equal(made[0], outputs[0])
    kept = clean("flow", entered[0], outputs[0], SIGMAS[0])
    for index in (1, 2):
        expected = returned("flow", entered[index], kept, SIGMAS[index])
        torch.testing.assert_close(made[index], expected, rtol=1e-4, atol=1e-4)


def test_the_model_that_returns_nobody_knows_what_must_be_told() -> None:
    tiny = next(tiny for tiny in TINY if tiny.name == "MochiTransformer3DModel")
    model = tiny.make()
    with (
        holdover.attach(model, HOLD) as cache,
        pytest.raises(ValueError, match="does not know what the model returns"),
        cache.step(chunk=0, num_steps=4),
    ):
        tiny.run(model, 0)


def test_noise_levels_of_timesteps_by_hand() -> None:
    video, tokens = torch.zeros(2, 4, 3, 5, 6), torch.zeros(2, 7, 4)
    assert per_thousand(video, torch.tensor([500.0, 250.0])).flatten().tolist() == [0.5, 0.25]
    assert per_thousand(video, torch.tensor(500)).shape == (2, 1, 1, 1, 1)
    frames = per_thousand(video, torch.tensor([[0.0, 500, 1000]] * 2))
    assert frames.shape == (2, 1, 3, 1, 1)
    assert frames[1, 0, :, 0, 0].tolist() == [0, 0.5, 1]
    assert per_thousand(tokens, torch.full((2, 7), 100.0)).shape == (2, 7, 1)
    with pytest.raises(ValueError, match=r"timesteps \[2, 7\] do not say the noise level of latents \[2, 4, 3, 5, 6\]"):
        per_thousand(video, torch.zeros(2, 7))


def test_noise_levels_of_schedulers() -> None:
    """A flow's σ stands in the schedule; v's follows from what is kept of the signal, ``√(1 - ᾱ)``."""
    diffusers, level = pytest.importorskip("diffusers"), cast(Any, of_scheduler)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(4)
    sigmas = [float(level(flow, n, "flow")) for n in range(4)]
    assert sigmas == pytest.approx([float(t) / 1000 for t in flow.timesteps])
    ddim = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    ddim.set_timesteps(4)
    clear, noise = torch.randn(1, 2, 3), torch.randn(1, 2, 3)
    for n, t in enumerate(ddim.timesteps):
        x = ddim.add_noise(clear, noise, t.reshape(1))
        v = ddim.get_velocity(clear, noise, t.reshape(1))
        sigma = float(level(ddim, n, "v"))
        torch.testing.assert_close(clean("v", x, v, sigma).float(), clear, rtol=1e-4, atol=1e-4)
    assert of_scheduler(SimpleNamespace(sigmas=[0.5]), 0, "v") is None
    assert of_scheduler(SimpleNamespace(), 0, "flow") is None
