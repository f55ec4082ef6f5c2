"""Latent frames of the world model that are computed by themselves, given the keys and values of the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import holdover
from holdover_world.loop.batch import advance
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.model.block import Block, Pass, compute_part
from holdover_world.model.transformer import WorldModel
from tests.holdover_world.driving import world_model
from tests.holdover_world.small import latents

ACTIONS = torch.tensor([[0.4, 0.1], [0.5, -0.2], [0.1, 0.3], [0.9, 0.0]])[None]


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return world_model()


def entering(model: WorldModel, x: Tensor, actions: Tensor) -> tuple[Tensor, Pass]:
    """What enters the blocks in a pass after one committed window per row."""
    seen: list[tuple[Tensor, Pass]] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    histories = []
    for n in range(len(x)):
        history = model.new_history()
        for _ in range(n + 1):  # rows begin at different times
            model(latents(model, 4, seed=9 + n), sigma=0.0, action_BFA=ACTIONS, history=history, write=True)
        histories.append(history)
    seen.clear()
    model(x, sigma=0.7, action_BFA=actions, history=model.stack(histories) if len(x) > 1 else histories[0])
    handle.remove()
    return seen[0]


def frames(model: WorldModel, numbers: list[list[int]]) -> Tensor:
    """The tokens of latent frames, a row per row of the batch."""
    n = model.sizes.tokens
    return torch.tensor(numbers).repeat_interleave(n, 1) * n + torch.arange(n).repeat(len(numbers[0]))


def take(hidden_BLC: Tensor, tokens_BK: Tensor) -> Tensor:
    return torch.stack([row[tokens] for row, tokens in zip(hidden_BLC, tokens_BK, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("numbers", [[[1]], [[2, 3]], [[0], [3]], [[1, 2], [2, 3]]])
def test_a_part_equals_those_frames_of_the_whole(model: WorldModel, numbers: list[list[int]]) -> None:
    """Given what the others have in the same pass, nothing is lost, whichever frames a row computes."""
    rows = len(numbers)
    hidden, shared = entering(model, latents(model, 4, batch=rows), ACTIONS.repeat(rows, 1, 1))
    tokens = frames(model, numbers)
    part = take(hidden, tokens)
    for block in model.blocks:
        hidden, memory = compute_part(block, None, {}, (hidden, shared), {})
        own = {name: tensor.clone() for name, tensor in memory.items()}
        for held in own.values():  # what is computed anew need not be there
            for row, chosen in zip(held, numbers, strict=True):
                row.unflatten(2, (4, -1))[:, :, chosen] = torch.nan
        part, after = compute_part(block, tokens, own, (part, shared), {})
        torch.testing.assert_close(part, take(hidden, tokens), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dict(after), dict(memory), rtol=1e-5, atol=1e-5)
        assert all(after[name] is own[name] for name in own)  # written in place
        assert len(memory) == (2 * len(model.sizes.groups) if block.temporal else 0)


@torch.no_grad()
def test_a_part_looks_at_what_the_others_had(model: WorldModel) -> None:
    """One temporal block by hand: the queries of a frame, over keys and values that another input made."""
    block, n = model.blocks[0], model.sizes.tokens
    assert isinstance(block, Block)
    old, _ = entering(model, latents(model, 4, seed=1), ACTIONS)
    new, shared = entering(model, latents(model, 4, seed=2), ACTIONS.flip(1))
    _, memory = compute_part(block, None, {}, (old, shared), {})
    part, _ = compute_part(block, frames(model, [[2]])[0], memory, (new[:, 2 * n : 3 * n], shared), {})
    mixed = torch.cat([old[:, : 2 * n], new[:, 2 * n : 3 * n], old[:, 3 * n :]], 1)
    torch.testing.assert_close(part, block(mixed, shared)[:, 2 * n : 3 * n], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(part, block(new, shared)[:, 2 * n : 3 * n], atol=1e-3)


@torch.no_grad()
def test_tokens_that_are_no_latent_frames_are_refused(model: WorldModel) -> None:
    hidden, shared = entering(model, latents(model, 4), ACTIONS)
    n = model.sizes.tokens
    tokens = torch.arange(n) + 1
    with pytest.raises(ValueError, match="whole latent frames"):
        compute_part(model.blocks[0], tokens, {}, (hidden[:, tokens], shared), {})


def drive(count: int) -> Iterator[Tensor]:
    """A steady start, then a brake in mid-cycle."""
    for n in range(count):
        yield torch.tensor([0.8 if n < 6 else 0.1, 0.05 * n])


def loop(
    model: WorldModel, cache: holdover.Cache | None, guidance: float = 1.0, stream: str = "default"
) -> ClosedLoop[WorldModel]:
    config = LoopConfig(steps=2, guidance=guidance)
    return ClosedLoop(model, latents(model, 4), ACTIONS, config=config, cache=cache, stream=stream)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_loop_shows_frames_that_were_computed(guidance: float) -> None:
    """First chunks equal full compute bit for bit, which the KV cache then is as well; the others are close to it."""
    model, full = world_model(), loop(world_model(), None, guidance)
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        ours = loop(model, cache, guidance)
        seen: list[int] = []
        last = model.blocks[-1]
        assert isinstance(last, Block)
        last.up.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for n, action in enumerate(drive(8)):
            piece, expected = ours.step(action).latents, full.step(action).latents
            if n % 4 == 0:
                assert torch.equal(piece, expected)
            torch.testing.assert_close(piece, expected, atol=0.3, rtol=0.1)
    branches = 1 if guidance == 1 else 2
    assert seen == ([4] * 2 * branches + [1] * 6 * branches + [4]) * 2
    tensors = ours.state.tensors()
    committed = {name: tensor for name, tensor in full.state.tensors().items() if name.startswith("history.kv")}
    assert len(committed) == 1 + 2 * 2 * 2  # frames, and keys and values of two temporal blocks and two groups
    for name, tensor in committed.items():
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("later", ["never", "always"])
def test_only_what_is_computed_is_looked_up(later: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Being told which frame is shown changes no bit of it, whether it is the only one computed or not."""
    shown = list[list[Tensor]]()
    looked_up = list[list[list[int]]]()
    for told in (True, False):
        model, frames = world_model(), list[list[int]]()
        look = model.reprojection.forward
        monkeypatch.setattr(
            model.reprojection, "forward", lambda *a, f=frames, g=look: (f.append(list(a[3])), g(*a))[1]
        )
        with holdover.attach(model, holdover.policy("frontier", later=later)) as cache:
            monkeypatch.setattr(type(cache), "by_frame", told)
            ours = loop(model, cache)
            shown.append([ours.step(action).latents for action in drive(8)])
        looked_up.append(frames)
    for ours_, theirs in zip(*shown, strict=True):
        assert torch.equal(ours_, theirs)
    if later == "never":
        assert looked_up[0] == [[0, 1, 2, 3], [1], [2], [3], [0, 1, 2, 3], [1], [2], [3]]
    assert looked_up[1][1] == [1, 2, 3]


@torch.no_grad()
def test_a_pass_that_computes_all_frames_looks_all_of_them_up(model: WorldModel) -> None:
    """Although it was told that one will do: nothing but time is lost if no cache leaves any."""
    x, history = latents(model, 4), model.new_history()
    model(x, sigma=0.0, action_BFA=ACTIONS, history=history, write=True)
    model(x, sigma=0.7, action_BFA=ACTIONS.flip(1), history=history)
    expected = model(x, sigma=0.7, action_BFA=ACTIONS, history=history.fork())
    assert torch.equal(model(x, sigma=0.7, action_BFA=ACTIONS, history=history, shown=[2]), expected)


def test_what_is_held_is_keys_values_and_one_residual_per_pass() -> None:
    model = world_model()
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        ours = loop(model, cache)
        for action in drive(2):
            ours.step(action)
        window = 4 * model.sizes.tokens * model.sizes.channels * 4  # bytes of one hidden state
        temporal = sum(isinstance(block, Block) and block.temporal for block in model.blocks)
        assert cache.nbytes == 2 * (2 * temporal + 1) * window


def test_videos_of_one_batch_show_their_own_frames() -> None:
    """Two videos at different places of their cycles, in one batch."""
    model, alone = world_model(), list[list[Tensor]]()
    for behind in (0, 1):
        own = world_model()
        with holdover.attach(own, holdover.policy("frontier")) as cache:
            one = loop(own, cache)
            alone.append([one.step(action).latents for action in list(drive(6 - behind))])
    with holdover.attach(model, holdover.policy("frontier")) as cache:
        first, second = loop(model, cache, stream="0"), loop(model, cache, stream="1")
        actions = list(drive(6))
        outputs = [[first.step(actions[0]).latents], list[Tensor]()]
        for n in range(1, 3):
            for each, piece in zip(outputs, advance([first, second], [actions[n], actions[n - 1]]), strict=True):
                each.append(piece.latents)
    torch.testing.assert_close(outputs[0], alone[0][:3], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[1], alone[1][:2], atol=1e-4, rtol=1e-4)


def test_it_goes_inside_of_a_policy_that_holds_whole_passes() -> None:
    """What step_hold does not serve is frontier's to decide, pass index by pass index."""
    model, kinds = world_model(), dict[int, list[str]]()
    policies = [holdover.policy("step_hold", protection="chunk"), holdover.policy("frontier")]
    with holdover.attach(model, policies) as cache:
        video = ClosedLoop(model, latents(model, 4), ACTIONS, cache=cache)
        for n, action in enumerate(drive(6)):
            video.step(action)
            found = [d for d in cache.trace if d.chunk == n and d.role == "denoise" and d.slot == "blocks.0"]
            kinds[n] = [decision.reason for decision in found]
    assert kinds[0] == kinds[4] == ["kv cycle"] * 4
    assert kinds[1] == kinds[3] == kinds[5] == ["reuse", "step_hold", "step_hold", "reuse"]
