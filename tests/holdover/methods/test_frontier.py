"""What frontier computes, chunk by chunk, on a bidirectional window transformer that is not ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdover
from holdover import Slot, ViewGroup

FRAMES, GRID, DIM, BLOCKS, STEPS = 4, (2, 3), 16, 3, 2
PER_FRAME = GRID[0] * GRID[1]


class Attention(nn.Module):
    """Attention over all tokens it is given, and as many more as their keys and values are given."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.to_out = nn.Linear(DIM, DIM)

    def forward(self, hidden_states: Tensor, known: dict[str, Tensor] | None, tokens: Tensor | None) -> Tensor:
        query, key, value = (each(hidden_states) for each in (self.to_q, self.to_k, self.to_v))
        if known is not None and tokens is not None:
            places = tokens.expand(len(key), -1)[..., None].expand(-1, -1, DIM)
            key, value = known["key"].scatter(1, places, key), known["value"].scatter(1, places, value)
        if known is not None:
            known |= {"key": key, "value": value}
        attended: Tensor = self.to_out(F.scaled_dot_product_attention(query, key, value))
        return attended


class TransformerBlock(nn.Module):
    """In the style of diffusers: norms, attention over the whole window, feed-forward; modulated by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn1, self.ff = Attention(), nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.scale = nn.Linear(1, DIM)
        self.seen: list[int] = []

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        known: dict[str, Tensor] | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        self.seen.append(hidden_states.shape[1])
        attended = self.attn1(self.norm1(hidden_states) * (1 + self.scale(temb)), known, tokens)
        hidden_states = hidden_states + attended
        fed: Tensor = hidden_states + self.ff(self.norm2(hidden_states))
        return fed


def some_tokens(
    run: Any, tokens: Tensor | None, memory: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Mapping[str, Tensor]]:
    known = dict(memory)
    return run(*args, **kwargs, known=known, tokens=tokens), known


def some_rows(
    rows: Sequence[int], hidden_states: Tensor, temb: Tensor, **others: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (hidden_states[rows], temb), others


class WindowTransformer(nn.Module):
    """Sees a window of latent frames at once, ``[B, FRAMES·PER_FRAME, DIM]``."""

    def __init__(self, *, parts: bool = True, grids: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(TransformerBlock() for _ in range(BLOCKS))
        self.parts, self.grids = parts, grids
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, temb: float) -> Tensor:
        for block in self.blocks:
            latents = block(latents, torch.tensor([temb]))
        return latents

    def holdover_slots(self) -> list[Slot]:
        return [Slot(block, part=some_tokens if self.parts else None, rows=some_rows) for block in self.blocks]

    def holdover_view_groups(self) -> tuple[ViewGroup, ...]:
        return (ViewGroup("front", 1, *GRID),) if self.grids else ()


def latents(chunk: int, index: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(1000 * seed + 10 * chunk + index)
    return torch.randn(1, FRAMES * PER_FRAME, DIM, generator=source)


def step(chunk: int, index: int, **fields: Any) -> dict[str, Any]:
    """Of a loop with windows of FRAMES chunks, the first of which is committed."""
    position = chunk % FRAMES
    own = {"chunk": chunk, "index": index, "num_steps": STEPS, "shown": position, "commits": position == 0}
    return own | fields


def play(
    model: WindowTransformer, cache: holdover.Cache, chunks: Sequence[int], *, seed: int = 0, **fields: Any
) -> list[Tensor]:
    """The last pass of each chunk."""
    outputs = []
    for chunk in chunks:
        for index in range(STEPS):
            with cache.step(**step(chunk, index, **fields)):
                output = model(latents(chunk, index, seed), temb=0.1 * index)
        outputs.append(output)
    return outputs


def counts(model: WindowTransformer) -> list[float]:
    """Latent frames that the last block computed, pass by pass."""
    seen = model.blocks[-1].seen
    assert isinstance(seen, list)
    return [tokens / PER_FRAME for tokens in seen]


def reasons(cache: holdover.Cache) -> list[str]:
    return [decision.reason for decision in cache.trace if decision.block == 0 and decision.index == 0]


def at(frame: int) -> slice:
    return slice(frame * PER_FRAME, (frame + 1) * PER_FRAME)


class ByHand:
    """All blocks on all tokens, once per chunk and pass, with attention's own words."""

    def __init__(self) -> None:
        self.model = WindowTransformer()
        self.known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.residual: dict[int, Tensor] = {}

    def __call__(self, chunk: int, index: int, frames: range) -> Tensor:
        x = latents(chunk, index)
        tokens = slice(frames[0] * PER_FRAME, (frames[-1] + 1) * PER_FRAME)
        hidden = x[:, tokens]
        for number, block in enumerate(self.model.blocks):
            assert isinstance(block, TransformerBlock)
            y = block.norm1(hidden) * (1 + block.scale(torch.tensor([0.1 * index])))
            blank = torch.zeros_like(x)
            key, value = (t.clone() for t in self.known.get((index, number), (blank, blank)))
            key[:, tokens], value[:, tokens] = block.attn1.to_k(y), block.attn1.to_v(y)
            self.known[index, number] = key, value
            weights = (block.attn1.to_q(y) @ key.transpose(1, 2) / DIM**0.5).softmax(-1)
            hidden = hidden + block.attn1.to_out(weights @ value)
            hidden = hidden + block.ff(block.norm2(hidden))
        if len(frames) == FRAMES:
            self.residual[index] = hidden - x
        output = x + self.residual[index]
        output[:, tokens] = hidden
        return output


def test_a_window_transformer_that_is_not_ours_computes_the_frame_to_be_shown() -> None:
    model, by_hand = WindowTransformer(), ByHand()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        outputs = play(model, cache, range(6))
        drafts = cache.drafts()
    for chunk, output in enumerate(outputs):
        position = chunk % FRAMES
        frames = range(position, position + 1) if position else range(FRAMES)
        expected = [by_hand(chunk, index, frames) for index in range(STEPS)]
        torch.testing.assert_close(output, expected[-1])
    assert counts(model) == [4, 4, 1, 1, 1, 1, 1, 1, 4, 4, 1, 1]
    assert reasons(cache) == ["kv cycle", "reuse", "reuse", "reuse", "kv cycle", "reuse"]
    assert drafts == (0, 2, 3)  # chunk 5 computed frame 1


def test_a_chunk_that_is_computed_whole_leaves_no_drafts(tmp_path: Path) -> None:
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        assert cache.drafts() == ()
        play(model, cache, range(1))
        assert cache.drafts() == ()
        play(model, cache, range(1, 3))
        assert cache.drafts() == (0, 1, 3)
        cache.fork("default", "fork")
        cache.snapshot().save(tmp_path / "snapshot")
        play(model, cache, [3, 4])
        assert cache.drafts() == ()
        assert cache.drafts("fork") == (0, 1, 3)
        cache.restore("default", holdover.Snapshot.load(tmp_path / "snapshot"))
        assert cache.drafts() == (0, 1, 3)


@pytest.mark.parametrize(("later", "expected"), [("never", [4, 1, 1, 1]), ("always", [4, 3, 2, 1])])
def test_later_frames_are_computed_where_it_is_asked_for(later: str, expected: list[int]) -> None:
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier", later=later)) as cache:
        play(model, cache, range(4))
    assert counts(model)[::STEPS] == expected


def test_a_revised_plan_computes_the_frames_that_it_is_about() -> None:
    model = WindowTransformer()
    kept, brakes = [[0.5], [0.6], [0.7], [0.8]], [[0.5], [0.6], [0.2], [0.1]]
    with holdover.attach(model, holdover.policy("frontier", later="revised")) as cache:
        for chunk, plan in enumerate([kept, kept, brakes, brakes]):
            play(model, cache, [chunk], action=plan[chunk], frame_actions=plan)
        assert counts(model)[::STEPS] == [4, 1, 2, 1]
        # Revised when its first frame is due, a plan for the frames after it that stays is still good.
        for chunk, plan in enumerate([kept, [[0.5], [0.0], [0.7], [0.8]]], start=4):
            play(model, cache, [chunk], action=plan[chunk - 4], frame_actions=plan)
        assert counts(model)[-1] == 1
        # Without a plan the newest action is what the frames to come are told.
        for chunk, action in zip((8, 9, 10, 11), (0.5, 0.5, 0.7, 0.7), strict=True):
            play(model, cache, [chunk], action=action)
    assert counts(model)[-4 * STEPS :: STEPS] == [4, 1, 2, 1]


def test_each_pass_goes_on_from_where_it_was_last_computed() -> None:
    """A pass index may not run in a chunk, because something else stands in for it: it keeps its own cycle."""
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        for chunk, indices in ((0, (0, 1)), (1, (0,)), (2, (0, 1)), (4, (0,)), (5, (0, 1)), (6, (0, 1))):
            for index in indices:
                with cache.step(**step(chunk, index)):
                    model(latents(chunk, index), temb=0.1)
    # In the second cycle pass 1 first runs in chunk 5: what it holds is of the first cycle.
    assert counts(model) == [4, 4, 1, 1, 1, 4, 1, 4, 1, 1]
    assert [d.reason for d in cache.trace if d.block == 0 and d.chunk == 5] == ["reuse", "new window"]


def test_a_cycle_whose_last_chunk_is_committed_begins_whole() -> None:
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        for chunk in range(8):
            play(model, cache, [chunk], commits=chunk % FRAMES == FRAMES - 1)
    assert counts(model)[::STEPS] == [4, 1, 1, 4] * 2
    assert reasons(cache) == ["first", "reuse", "reuse", "kv cycle", "new window", "reuse", "reuse", "kv cycle"]


def test_a_new_condition_is_computed_whole() -> None:
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        for chunk, condition in enumerate("aabb"):
            play(model, cache, [chunk], condition=condition)
    assert reasons(cache) == ["kv cycle", "reuse", "condition", "reuse"]
    assert counts(model)[::STEPS] == [4, 1, 4, 1]


def test_a_loop_that_does_not_say_what_it_shows_is_told_so() -> None:
    model = WindowTransformer()
    with (
        pytest.warns(UserWarning, match=r"frontier could reuse nothing in 2 chunks in a row: needs Step\.shown"),
        holdover.attach(model, holdover.policy("frontier")) as cache,
    ):
        play(model, cache, range(4), commits=False, shown=None)
    assert set(reasons(cache)) == {"needs Step.shown"}


def test_a_frame_outside_of_the_window_is_an_error() -> None:
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        play(model, cache, [0])
        with pytest.raises(ValueError, match="shown=4 is not one of the pass's 4 latent frames"):
            play(model, cache, [1], shown=4)
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        message = "7 tokens of a pass are not whole latent frames"
        with pytest.raises(ValueError, match=message), cache.step(**step(0, 0)):
            model(torch.zeros(1, 7, DIM), temb=0.0)


def test_models_without_latent_frames_or_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="frontier tells latent frames apart, and WindowTransformer does not say how"):
        holdover.attach(WindowTransformer(grids=False), holdover.policy("frontier"))
    with pytest.raises(ValueError, match=r"frontier computes parts of blocks, and block 'blocks\.0' does not say how"):
        holdover.attach(WindowTransformer(parts=False), holdover.policy("frontier"))
    grids = (ViewGroup("front", 1, *GRID),)
    holdover.attach(WindowTransformer(grids=False), holdover.policy("frontier"), view_groups=grids).detach()


@pytest.mark.parametrize("later", ["never", "always"])
@pytest.mark.parametrize("behind", [0, 1, 2])
def test_rows_that_show_other_frames_compute_their_own(later: str, behind: int) -> None:
    """Two videos in one batch, one some chunks behind: equal and unequal numbers of tokens, or one computed whole."""
    alone: list[list[Tensor]] = []
    for seed in (0, 1):
        model = WindowTransformer()
        with holdover.attach(model, holdover.policy("frontier", later=later)) as cache:
            alone.append(play(model, cache, range(6), seed=seed))
    model, outputs = WindowTransformer(), [list[Tensor](), list[Tensor]()]
    with holdover.attach(model, holdover.policy("frontier", later=later)) as cache:
        outputs[0] += play(model, cache, range(behind), seed=0, stream="0")
        for chunk in range(behind, 6):
            for index in range(STEPS):
                chunks = chunk, chunk - behind
                rows = [holdover.Step(**step(own, index, stream=str(n))) for n, own in enumerate(chunks)]
                with cache.step(rows=rows):
                    x = torch.cat([latents(own, index, n) for n, own in enumerate(chunks)])
                    both = model(x, temb=0.1 * index)
            for n, row in enumerate(both.split(1)):
                outputs[n].append(row)
    torch.testing.assert_close(outputs[0], alone[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[1], alone[1][: 6 - behind], rtol=1e-5, atol=1e-5)


def test_what_is_held_is_counted_and_capped() -> None:
    held = STEPS * 4 * FRAMES * PER_FRAME * DIM * (2 * BLOCKS + 1)  # keys, values, and the residual, in float32
    model = WindowTransformer()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        play(model, cache, range(3))
        assert cache.nbytes == held
    with holdover.attach(model, holdover.policy("frontier"), max_bytes=held // 2) as cache:
        play(model, cache, range(3))
        assert cache.nbytes <= held // 2
        assert [d.reason for d in cache.trace if d.block == 0 and d.chunk == 2] == ["reuse", "bytes"]
