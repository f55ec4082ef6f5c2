"""Chunk-causal models: noisy passes may be reused, the clean pass is always computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from holdover.models.registry import find
from tests.holdover.models.causal_wan import CHANNELS, CHUNK, COLUMNS, DIM, ROWS
from tests.holdover.models.contracts import CONTRACTS, REFUSED, Contract
from tests.holdover.models.worldplay import TEXT_PASS

pytestmark = pytest.mark.filterwarnings("ignore:.* could reuse nothing")
each = pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)

SIGMAS = (1.0, 0.8, 0.5, 0.25)
SKIPPING = holdover.fixed_interval(every=3, front_anchors=0, warmup=1, protection="pass")


def latents(seed: int, frames: int = CHUNK) -> Tensor:
    return torch.randn(1, CHANNELS, frames, ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))


def tensors(held: Any) -> list[Tensor]:
    """Everything a video holds, in order."""
    if isinstance(held, dict):
        return [tensor for key in sorted(held) for tensor in tensors(held[key])]
    if isinstance(held, list):
        return [tensor for item in held for tensor in tensors(item)]
    if held is None:
        return []
    return [held.clone() if isinstance(held, Tensor) else torch.tensor(held)]


def generate(contract: Contract, model: Any, cache: holdover.Cache | None) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Chunks whose clean latents are given: what is held before and after each clean pass."""
    state, seen = contract.state(), []
    rolling = contract.name == "Rolling Forcing"
    for chunk in range(contract.chunks):
        noise = latents(chunk, 2 * CHUNK if rolling else CHUNK)
        for index, sigma in enumerate(SIGMAS):
            if cache is None:
                contract.run(model, noise * sigma, sigma, chunk, state)
            else:
                with cache.step(chunk=chunk, index=index, num_steps=4, sigma=sigma):
                    contract.run(model, noise * sigma, sigma, chunk, state)
        before, clean = tensors(state), latents(100 + chunk)
        if cache is None:
            contract.run(model, clean, 0.0, chunk, state, clean=True)
        else:
            with cache.step(chunk=chunk, role="kv_update"):
                contract.run(model, clean, 0.0, chunk, state, clean=True)
        seen.append((before, tensors(state)))
    return seen


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each
def test_a_model_is_known_by_what_its_blocks_take(contract: Contract) -> None:
    adapter = find(contract.model())
    assert adapter is not None
    assert contract.name in adapter.family


@each
@torch.inference_mode()
def test_after_the_clean_pass_the_kv_cache_is_that_of_full_compute(contract: Contract) -> None:
    """A held-over block leaves K/V of an earlier pass behind; where latents agree, the clean pass mends them all."""
    model = contract.model()
    full = generate(contract, model, None)
    with holdover.attach(model, SKIPPING) as cache:
        cached = generate(contract, model, cache)
    assert cache.stats().reused > cache.stats().computed / 2
    stale = [not same(a, b) for (a, _), (b, _) in zip(full, cached, strict=True)]
    assert any(stale) == contract.in_place
    assert all(same(a, b) for (_, a), (_, b) in zip(full, cached, strict=True))


@each
def test_the_clean_pass_is_computed_whatever_is_held(contract: Contract) -> None:
    model = contract.model()
    with holdover.attach(model, SKIPPING) as cache:
        generate(contract, model, cache)
    writes = [d for d in cache.trace if d.role == "kv_update"]
    assert len(writes) == contract.chunks * 4
    assert all(d.computed for d in writes)


@each
def test_a_gate_that_never_opens_changes_no_bit(contract: Contract) -> None:
    model = contract.model()
    full = generate(contract, model, None)
    with holdover.attach(model, holdover.xcache()) as cache:  # every chunk is committed: nothing may be skipped
        cached = generate(contract, model, cache)
    assert all(same(a, b) and same(c, d) for (a, c), (b, d) in zip(full, cached, strict=True))
    assert cache.stats().reused == 0


@pytest.mark.parametrize("name", ["Rolling Forcing", "HY-WorldPlay"])
def test_a_write_that_is_called_denoising_is_refused(name: str) -> None:
    contract = next(contract for contract in CONTRACTS if contract.name == name)
    model = contract.model()
    refused = pytest.raises(ValueError, match="writes the KV cache")
    with holdover.attach(model, SKIPPING) as cache, refused, cache.step(chunk=0):
        contract.run(model, latents(0), 0.0, 0, contract.state(), clean=True)


@pytest.mark.parametrize("name", ["Krea realtime", "LongLive"])
def test_a_pass_that_writes_the_whole_context_anew_is_known_by_its_mask(name: str) -> None:
    contract = next(contract for contract in CONTRACTS if contract.name == name)
    model: Any = contract.model()
    states = contract.state(), contract.state()
    with holdover.attach(model, SKIPPING) as cache:
        with cache.step(chunk=0):
            contract.run(model, latents(0), 1.0, 0, states[0])
        model.block_mask = object()
        with pytest.raises(ValueError, match="writes the KV cache"), cache.step(chunk=1):
            contract.run(model, latents(1), 0.0, 0, states[0])
        with cache.step(chunk=1, role="kv_update"):
            contract.run(model, latents(1), 0.0, 0, states[0])
        model.block_mask = None
    contract.run(model, latents(0), 1.0, 0, states[1])
    model.block_mask = object()
    contract.run(model, latents(1), 0.0, 0, states[1])
    assert same(tensors(states[0]), tensors(states[1]))


def test_blocks_that_go_by_the_cache_of_another_are_refused() -> None:
    """LongLive 2. Held over nevertheless, the KV cache is not that of full compute once it rolls."""
    model = REFUSED.model()
    with pytest.raises(ValueError, match="LongLive 2 cannot be reused: every block goes by the first one's place"):
        holdover.attach(model, SKIPPING)
    longlive = find(CONTRACTS[3].model())
    assert longlive is not None
    full = generate(REFUSED, model, None)
    anchored = holdover.fixed_interval(every=3, front_anchors=1, warmup=1, protection="pass")
    with holdover.attach(model, anchored, slots=longlive.slots(model)) as cache:
        cached = generate(REFUSED, model, cache)
    agree = [same(a, b) for (_, a), (_, b) in zip(full, cached, strict=True)]
    assert all(agree[:3])
    assert not all(agree[3:])


def test_worldplay_holds_over_what_its_blocks_return_beside_the_frames() -> None:
    """Nothing in a noisy pass of the chunk-causal model; the text in a pass over all frames at once."""
    contract = next(contract for contract in CONTRACTS if contract.name == "HY-WorldPlay")
    model = contract.model()
    given = {"action": torch.zeros(1, CHUNK), "viewmats": torch.ones(1, 2, DIM), "text_states": torch.ones(1, 3, 1)}

    def both(step: int) -> Tensor:
        noisy = {"hidden_states": latents(step), "timestep": torch.ones(1, CHUNK)}
        output: Tensor = model(bi_inference=True, **given, **noisy)[0]
        return output

    every_other = holdover.fixed_interval(over="steps", every=2, front_anchors=0, warmup=0, protection="pass")
    with holdover.attach(model, every_other) as cache:
        with cache.step(chunk=0, role="prefill"):
            assert len(model(**TEXT_PASS)) == 4
        with pytest.raises(ValueError, match="writes the KV cache"), cache.step(chunk=0):
            model(**TEXT_PASS)
        for index in range(2):
            with cache.step(chunk=0, index=index, num_steps=2, commits=False):
                output = both(index)
    assert cache.stats().reused == 4
    # Each block adds what it added to the frames before; as nothing else makes the output, so does the whole.
    x = [model.patch(latents(n).flatten(2).transpose(1, 2)) for n in range(2)]
    before = torch.atanh(both(0)).flatten(2).transpose(1, 2)
    expected = (
        torch.tanh(before + (x[1] - x[0]) @ model.head.weight.T).transpose(1, 2).unflatten(2, (CHUNK, ROWS, COLUMNS))
    )
    assert torch.allclose(output, expected, atol=1e-4)


def test_an_audit_is_refused_where_noisy_passes_write_in_place() -> None:
    with pytest.raises(ValueError, match="writes keys and values in place"):
        holdover.attach(CONTRACTS[0].model(), holdover.xcache(), audit=0.1)


def test_a_block_of_another_version_is_an_explained_error() -> None:
    class Other(torch.nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden

    model = CONTRACTS[0].model()
    model.blocks[0] = Other()
    with pytest.raises(ValueError, match=r"block 'blocks.0' of CausalWanModel takes no argument 'x'"):
        holdover.attach(model, holdover.xcache())


def test_the_modulated_input_is_what_enters_attention() -> None:
    block: Any = CONTRACTS[0].model().blocks[0]
    adapter = find(CONTRACTS[0].model())
    assert adapter is not None
    source = torch.Generator().manual_seed(0)
    x = torch.randn(1, 12, 8, generator=source)
    e = torch.randn(1, 3, 6, 8, generator=source)
    assert torch.allclose(adapter.taps["modulated"](block, x, e=e), block.normed(x, e), atol=1e-6)
