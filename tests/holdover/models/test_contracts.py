"""Chunk-causal models: noisy passes may be reused, the clean pass is always computed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from holdover.models.registry import find
from tests.holdover.models.causal_wan import CHANNELS, CHUNK, COLUMNS, DIM, ROWS, LongLive10Block, LongLiveModel
from tests.holdover.models.contracts import CONTRACTS, REFUSED, Contract, contract
from tests.holdover.models.worldplay import TEXT_PASS

pytestmark = pytest.mark.filterwarnings("ignore:.* could reuse nothing")
each = pytest.mark.parametrize("held", CONTRACTS, ids=lambda held: held.name)

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


def generate(held: Contract, model: Any, cache: holdover.Cache | None) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Chunks whose clean latents are given: what is held before and after each clean pass."""
    state, seen = held.state(), []
    rolling = held.name == "Rolling Forcing"
    for chunk in range(held.chunks):
        noise = latents(chunk, 2 * CHUNK if rolling else CHUNK)
        for index, sigma in enumerate(SIGMAS):
            if cache is None:
                held.run(model, noise * sigma, sigma, chunk, state)
            else:
                with cache.step(chunk=chunk, index=index, num_steps=4, sigma=sigma):
                    held.run(model, noise * sigma, sigma, chunk, state)
        before, clean = tensors(state), latents(100 + chunk)
        if cache is None:
            held.run(model, clean, 0.0, chunk, state, clean=True)
        else:
            with cache.step(chunk=chunk, role="kv_update"):
                held.run(model, clean, 0.0, chunk, state, clean=True)
        seen.append((before, tensors(state)))
    return seen


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each
def test_a_model_is_known_by_what_its_blocks_take(held: Contract) -> None:
    adapter = find(held.model())
    assert adapter is not None
    assert held.name in adapter.family


@each
@torch.inference_mode()
def test_after_the_clean_pass_the_kv_cache_is_that_of_full_compute(held: Contract) -> None:
    """A held-over block leaves K/V of an earlier pass behind; where latents agree, the clean pass mends them all."""
    model = held.model()
    full = generate(held, model, None)
    with holdover.attach(model, SKIPPING) as cache:
        cached = generate(held, model, cache)
    assert cache.stats().reused > cache.stats().computed / 2
    stale = [not same(a, b) for (a, _), (b, _) in zip(full, cached, strict=True)]
    assert any(stale) == held.in_place
    assert all(same(a, b) for (_, a), (_, b) in zip(full, cached, strict=True))


@each
def test_the_clean_pass_is_computed_whatever_is_held(held: Contract) -> None:
    model = held.model()
    with holdover.attach(model, SKIPPING) as cache:
        generate(held, model, cache)
    writes = [d for d in cache.trace if d.role == "kv_update"]
    assert len(writes) == held.chunks * 4
    assert all(d.computed for d in writes)


@each
def test_a_gate_that_never_opens_changes_no_bit(held: Contract) -> None:
    model = held.model()
    full = generate(held, model, None)
    with holdover.attach(model, holdover.xcache()) as cache:  # every chunk is committed: nothing may be skipped
        cached = generate(held, model, cache)
    assert all(same(a, b) and same(c, d) for (a, c), (b, d) in zip(full, cached, strict=True))
    assert cache.stats().reused == 0


# What tells a KV write.

#: Of the whole model, and of its blocks.
LEVELS = [SKIPPING, holdover.never(), holdover.policy("taylorseer", span="model")]
each_level = pytest.mark.parametrize("policy", LEVELS, ids=["blocks", "never", "whole"])


@each_level
@pytest.mark.parametrize(
    "name", ["HY-WorldPlay", "HY-WorldPlay, Wan", "Self-Forcing", "LongLive, branch v1.0", "CausVid"]
)
def test_a_write_that_is_called_denoising_is_refused(name: str, policy: holdover.Policy) -> None:
    """Told by an argument, or by timestep 0."""
    held = contract(name)
    model, state = held.model(), held.state()
    refused = pytest.raises(ValueError, match=r"writes the KV cache within a denoising step.*role='kv_update'")
    with holdover.attach(model, policy) as cache:
        with cache.step(chunk=0, num_steps=5):
            held.run(model, latents(0), 1.0, 0, state)
        with refused, cache.step(chunk=0, index=4, num_steps=5):
            held.run(model, latents(0), 0.0, 0, state, clean=True)
        assert not cache.in_step
        with cache.step(chunk=0, role="kv_update"):
            held.run(model, latents(0), 0.0, 0, state, clean=True)


@each_level
def test_a_pass_after_the_last_with_less_noise_is_suspected(policy: holdover.Policy) -> None:
    """A clean pass may keep a little noise. Announced as a chunk of its own, it stands where one is complete."""
    held = contract("Self-Forcing")
    model, state = held.model(), held.state()
    with holdover.attach(model, policy) as cache:

        def run(chunk: int, index: int, sigma: float, at: int) -> None:
            with cache.step(chunk=chunk, index=index, num_steps=2):
                held.run(model, latents(index), sigma, at, state)

        run(0, 0, 1.0, at=0)
        run(0, 1, 0.5, at=0)
        with pytest.raises(
            ValueError, match=r"announced as denoising of chunk 1.*where chunk 0 does.*role='kv_update'"
        ):
            run(1, 0, 0.1, at=0)
        run(1, 0, 1.0, at=0)  # the same window once more
        run(1, 1, 0.5, at=0)
        run(2, 0, 0.1, at=1)  # the next place


@pytest.mark.parametrize("name", ["Krea realtime", "LongLive"])
def test_a_pass_that_writes_the_whole_context_anew_is_known_by_its_mask(name: str) -> None:
    """Krea's mask is an attribute, which it takes back; LongLive's an argument of that call."""
    held = contract(name)
    model: Any = held.model()
    states = held.state(), held.state()

    def anew(state: dict[str, Any]) -> None:
        if name == "LongLive":
            more = {"current_start": 0, "block_mask": object(), **state}
            model(latents(1), torch.full((1, CHUNK), 0.1), torch.linspace(-1, 1, 2 * DIM).reshape(1, 2, DIM), **more)
            return
        model.block_mask = object()
        try:
            held.run(model, latents(1), 0.1, 0, state)
        finally:
            model.block_mask = None

    with holdover.attach(model, SKIPPING) as cache:
        with cache.step(chunk=0):
            held.run(model, latents(0), 1.0, 0, states[0])
        with pytest.raises(ValueError, match="writes the KV cache"), cache.step(chunk=1):
            anew(states[0])
        with cache.step(chunk=1, role="kv_update"):
            anew(states[0])
    held.run(model, latents(0), 1.0, 0, states[1])
    anew(states[1])
    assert same(tensors(states[0]), tensors(states[1]))


@pytest.mark.parametrize("policy", LEVELS[:2], ids=["blocks", "never"])
def test_what_a_switch_of_prompts_leaves_behind_is_no_write(policy: holdover.Policy) -> None:
    """LongLive's branch v1.0: the model's mask stays set after the pass that writes the context anew."""
    held, states = contract("LongLive, branch v1.0"), []
    for cached in (False, True):
        model: Any = held.model()
        state = held.state()
        cache = holdover.attach(model, policy) if cached else None

        def step(model: Any = model, cache: Any = cache, **fields: Any) -> Any:
            return nullcontext() if cache is None else cache.step(**fields)

        def anew(model: Any = model, state: Any = state, **more: Any) -> None:
            more |= {"current_start": 0, "sink_recache_after_switch": True, **state}
            model(latents(9), torch.zeros(1, CHUNK), torch.linspace(0, 1, 2 * DIM).reshape(1, 2, DIM), **more)

        for chunk in range(4):
            for index, sigma in enumerate(SIGMAS):
                with step(chunk=chunk, index=index, num_steps=4, commits=False):
                    held.run(model, latents(chunk) * sigma, sigma, chunk, state)
            with step(chunk=chunk, role="kv_update"):
                held.run(model, latents(100 + chunk), 0.0, chunk, state)
            if chunk == 0:
                model.block_mask = object()
                if cache is not None:
                    with pytest.raises(ValueError, match="writes the KV cache"), cache.step(chunk=9):
                        anew()
                with step(chunk=chunk, role="kv_update"):
                    anew()
        states.append(tensors(state))
        if cache is not None:
            assert (cache.stats().reused > 0) == (policy.name != "never")
            cache.detach()
    assert same(*states)


# What cannot be reused.


@pytest.mark.parametrize("held", REFUSED, ids=lambda held: held.name)
def test_a_model_of_which_nothing_can_be_reused_says_why(held: Contract) -> None:
    """At no level. What computes everything may be attached, and changes no bit."""
    for policy in (SKIPPING, LEVELS[2], [LEVELS[2], SKIPPING]):
        with pytest.raises(ValueError, match=rf"{held.name} cannot be reused: .*attach holdover\.never\(\)"):
            holdover.attach(held.model(), policy)
    full = generate(held, held.model(), None)
    model = held.model()
    with holdover.attach(model, holdover.never()) as cache:
        traced = generate(held, model, cache)
    assert all(same(a, b) and same(c, d) for (a, c), (b, d) in zip(full, traced, strict=True))
    assert cache.stats().computed == held.chunks * 5 * 4


@pytest.mark.parametrize("name", ["LongLive 2", "StreamDiffusionV2"])
def test_held_over_nevertheless_the_kv_cache_would_be_wrong(name: str) -> None:
    """Once it rolls: blocks go by the place of another, or by the calls that they have counted."""
    held = contract(name)
    like = find(contract("LongLive" if name == "LongLive 2" else "CausVid").model())
    assert like is not None
    full = generate(held, held.model(), None)
    model = held.model()
    anchored = holdover.fixed_interval(every=3, front_anchors=1, warmup=1, protection="pass")
    with holdover.attach(model, anchored, slots=like.slots(model)) as cache:
        cached = generate(held, model, cache)
    agree = [same(a, b) for (_, a), (_, b) in zip(full, cached, strict=True)]
    assert agree[0]
    assert not all(agree[3:])


def test_a_sink_that_is_larger_than_a_chunk_is_refused() -> None:
    """LongLive's branch v1.0. Held over nevertheless, the sink is not that of full compute."""
    held = Contract("LongLive, branch v1.0", lambda: LongLiveModel(lambda n: LongLive10Block(n, sink=CHUNK + 1)))
    model = held.model()
    with pytest.raises(ValueError, match="sink of 5 latent frames is larger than a chunk of 4"):
        holdover.attach(model, SKIPPING)
    adapter = find(model)
    assert adapter is not None
    full = generate(held, model, None)
    with holdover.attach(model, SKIPPING, slots=adapter.slots(model)) as cache:
        cached = generate(held, model, cache)
    assert not all(same(a, b) for (_, a), (_, b) in zip(full, cached, strict=True))


def test_worldplay_holds_over_what_its_blocks_return_beside_the_frames() -> None:
    """Nothing in a noisy pass of the chunk-causal model; the text in a pass over all frames at once."""
    model = contract("HY-WorldPlay").model()
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
