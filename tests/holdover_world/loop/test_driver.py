"""The window cadence of the closed loop, read off the calls that the model receives."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import holdover
from holdover import Step
from holdover_world.conditioning.motion import drive as drive_cars
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.model.sampler import noise_levels
from holdover_world.model.transformer import WorldModel
from holdover_world.scene.poses import placed
from tests.holdover_world.small import latents, small_model


class Spy:
    """Records every call of a model: its inputs and what it returned."""

    def __init__(self, model: WorldModel) -> None:
        self.calls: list[dict[str, Any]] = []
        model.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, model: Any, args: tuple[Tensor], kwargs: dict[str, Any], output: Tensor) -> None:
        self.calls.append(
            {"x": args[0].clone(), "output": output.clone(), **kwargs, "write": kwargs.get("write", False)}
        )

    @property
    def written(self) -> list[dict[str, Any]]:
        return [call for call in self.calls if call["write"]]


def loop(model: WorldModel, **changes: Any) -> ClosedLoop:
    return ClosedLoop(model, latents(model, 2), torch.zeros(1, 2, 2), config=LoopConfig(**changes), seed=3)


def drive(model: WorldModel, chunks: int, **changes: Any) -> tuple[list[Tensor], Spy]:
    spy = Spy(model)
    driver = loop(model, **changes)
    torch.manual_seed(0)
    actions = torch.rand(chunks, 2, generator=torch.Generator().manual_seed(5))
    return [piece.latents for piece in driver.run(actions)], spy


def test_a_window_is_generated_once_per_piece_with_the_same_noise() -> None:
    pieces, spy = drive(small_model(), 4)
    sigmas = noise_levels(4, 5.0)
    assert len(pieces) == 4
    assert [call["write"] for call in spy.calls] == [True] + ([False] * 8 + [True]) * 2
    first, second = spy.calls[1:5], spy.calls[5:9]
    assert [call["sigma"] for call in first] == list(sigmas)
    assert torch.equal(first[0]["x"], second[0]["x"])
    assert not torch.equal(spy.calls[10]["x"], first[0]["x"])  # the next cycle has new noise
    # The emitted piece is put into its place and noised again, with the noise that the first chunk had at this step.
    for i in (1, 2, 3):
        noise = (first[i]["x"] - (1 - sigmas[i]) * first[i - 1]["output"]) / sigmas[i]
        expected = (1 - sigmas[i]) * pieces[0] + sigmas[i] * noise[:, :1]
        torch.testing.assert_close(second[i]["x"][:, :1], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(pieces[1], second[3]["output"][:, 1:2])


@pytest.mark.parametrize("changes", [{"commit": "emitted"}, {"cadence": "plain"}])
def test_decoding_piece_by_piece_is_decoding_it_all(changes: dict[str, str]) -> None:
    """When the committed frames are those that were shown."""
    model = small_model()
    start = latents(model, 2)
    pieces = list(loop(model, **changes).run(torch.rand(5, 2)))
    assert torch.equal(
        torch.stack([piece.before for piece in pieces], 1),
        torch.cat([start[:, -1:], *(p.latents for p in pieces[:-1])], 1),
    )
    whole = model.codec.decode(torch.cat([start, *(piece.latents for piece in pieces)], 1))
    for n, piece in enumerate(pieces):
        for name, video in model.codec.decode(piece.latents, piece.before).items():
            assert np.array_equal(video, whole[name][:, 8 + 4 * n : 12 + 4 * n])


def test_a_cycle_goes_on_from_what_was_committed() -> None:
    model = small_model()
    spy, driver = Spy(model), loop(model, commit="first")
    pieces = list(driver.run(torch.rand(5, 2)))
    for n, piece in enumerate(pieces):
        committed = spy.written[n // 2]["x"][:, -1]
        assert torch.equal(piece.before, pieces[n - 1].latents[:, -1] if n % 2 else committed)
    assert not torch.equal(pieces[2].before, pieces[1].latents[:, -1])


def test_the_frames_of_a_committed_chunk_are_exact() -> None:
    """Whether or not the frames before them were served from cache."""
    eager = holdover.xcache(tau_floor=-1.0, margin=2.0, tau_dev=float("inf"))
    made: list[list[dict[str, Tensor]]] = []
    for policy in (eager, None):
        model = small_model()
        cache = holdover.attach(model, policy) if policy else None
        start, config = latents(model, 2), LoopConfig(commit="first")
        run = ClosedLoop(model, start, torch.zeros(1, 2, 2), config=config, seed=3, cache=cache)
        actions = torch.rand(6, 2, generator=torch.Generator().manual_seed(5))
        made.append([model.codec.pictures("colour", piece.latents, piece.before) for piece in run.run(actions)])
    exact = [all(torch.equal(cached[name], full[name]) for name in full) for cached, full in zip(*made, strict=True)]
    assert exact == [True, False] * 3


def test_nothing_looks_ahead() -> None:
    _, spy = drive(small_model(), 4)
    actions = torch.rand(4, 2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(spy.calls[1]["action_BFA"][0], actions[[0, 0]])  # frames not yet commanded hold the newest
    assert torch.equal(spy.calls[5]["action_BFA"][0], actions[[0, 1]])
    assert torch.equal(spy.calls[10]["action_BFA"][0], actions[[2, 2]])


class Noted:
    """A cache that notes the steps it is told."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(self, *args: Any, **fields: Any) -> AbstractContextManager[Any]:
        self.steps.append(Step(**fields))
        return nullcontext()

    def exact(self, stream: str) -> bool:
        return True


def steps_of(model: WorldModel, chunks: int, **changes: Any) -> list[Step]:
    cache = Noted()
    start = latents(model, 2), torch.zeros(1, 2, 2)
    run = ClosedLoop(model, *start, config=LoopConfig(steps=2, **changes), cache=cache)
    list(run.run(torch.tensor([[0.125, 0.25], [0.5, 0.75], [1.0, 0.0]])[:chunks]))
    return [step for step in cache.steps if step.role == "denoise"]


def test_a_pass_says_what_each_frame_is_told_and_which_is_shown() -> None:
    a, b, c = (0.125, 0.25), (0.5, 0.75), (1.0, 0.0)
    steps = steps_of(small_model(), 3)
    assert [step.frame_vectors for step in steps[::2]] == [(a, a), (a, b), (c, c)]
    assert [step.shown for step in steps] == [0, 0, 1, 1, 0, 0]
    assert [step.frame_vectors for step in steps[1::2]] == [(a, a), (a, b), (c, c)]
    plain = steps_of(small_model(), 2, cadence="plain")
    assert [(step.frame_vectors, step.shown) for step in plain[::2]] == [((a,), None), ((b,), None)]


def test_the_branch_without_an_action_tells_frames_nothing() -> None:
    steps = steps_of(small_model(), 1, guidance=2.0)
    assert [(step.branch, step.frame_vectors is None) for step in steps] == [("", False), ("uncond", True)] * 2


def test_fresh_noise_is_drawn_every_chunk() -> None:
    _, spy = drive(small_model(), 2, fresh_noise=True)
    assert not torch.equal(spy.calls[1]["x"], spy.calls[5]["x"])


def test_the_commit_rules() -> None:
    pieces, spy = drive(small_model(), 2, commit="first")
    assert torch.equal(spy.written[1]["x"], spy.calls[4]["output"])
    assert torch.equal(spy.written[1]["action_BFA"], spy.calls[1]["action_BFA"])
    pieces, spy = drive(small_model(), 2, commit="emitted")
    assert torch.equal(spy.written[1]["x"], torch.cat(pieces, 1))
    pieces, spy = drive(small_model(), 2, commit="last_full")  # without a cache every chunk is computed in full
    assert torch.equal(spy.written[1]["x"], torch.cat(pieces, 1))
    assert spy.written[1]["sigma"] == 0


def test_the_plain_cadence_commits_every_piece() -> None:
    pieces, spy = drive(small_model(), 3, cadence="plain")
    assert [call["write"] for call in spy.calls] == [True] * 2 + ([False] * 4 + [True]) * 3
    assert all(call["x"].shape[1] == 1 for call in spy.calls)
    assert torch.equal(spy.calls[6]["x"], pieces[0])


def test_the_same_seed_draws_the_same_video() -> None:
    first, _ = drive(small_model(), 5)
    again, _ = drive(small_model(), 5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_mistakes_are_named() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="cadence='waltz'"):
        LoopConfig(cadence="waltz")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 latent frames"):
        ClosedLoop(model, latents(model, 3), torch.zeros(1, 3, 2))
    with pytest.raises(ValueError, match="start_actions"):
        ClosedLoop(model, latents(model, 2), torch.zeros(1, 4, 2))


def test_guidance_moves_away_from_the_unguided_prediction() -> None:
    model = small_model()
    (piece,), spy = drive(model, 1, guidance=3.0, sampler="euler", steps=2)
    passes = [call for call in spy.calls if not call["write"]]
    assert [call["action_BFA"] is None for call in passes] == [False, True] * 2
    told, free = (call["output"] for call in passes[2:])
    torch.testing.assert_close(piece, (free + 3 * (told - free))[:, :1])
    sigma = noise_levels(2, 5.0)[1]
    clean = passes[1]["output"] + 3 * (passes[0]["output"] - passes[1]["output"])
    torch.testing.assert_close(passes[2]["x"], (1 - sigma) * clean + sigma * passes[0]["x"])  # at level 1 all is noise
    with pytest.raises(ValueError, match=r"guidance=0\.5"):
        LoopConfig(guidance=0.5)


def test_guided_branches_are_kept_apart() -> None:
    """With a gate that never opens, a guided loop gives what it gives with nothing attached."""
    plain, cached = small_model(), small_model()
    expected, _ = drive(plain, 3, guidance=2.0)
    with holdover.attach(cached, holdover.xcache(tau_floor=2.0)) as cache:
        run = ClosedLoop(
            cached, latents(cached, 2), torch.zeros(1, 2, 2), config=LoopConfig(guidance=2.0), seed=3, cache=cache
        )
        made = [piece.latents for piece in run.run(torch.rand(3, 2, generator=torch.Generator().manual_seed(5)))]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    assert {decision.branch for decision in cache.trace} == {"", "uncond"}


def test_a_cycle_begins_where_the_one_before_it_led() -> None:
    """The window of the first chunk, which is committed, does not show the later actions that the ego carried out."""
    actions = torch.tensor([[0.3, 0.1], [0.1, -0.4]])
    ends = [drive_cars(torch.tensor([[0.0, 0.0]]), told[None])[0][0, -1] for told in (actions[[0, 0]], actions)]
    for commit, shown in (("first", ends[0]), ("last_full", ends[1]), ("emitted", ends[1])):
        run = loop(small_model(), commit=commit)
        run.step(actions[0])
        run.step(actions[1])
        pose = run.history.ego.pose_B3
        assert pose is not None
        torch.testing.assert_close(placed(shown[None], pose[None])[0, 0], ends[1], atol=1e-5, rtol=1e-5)
        assert pose.any() == (commit == "first")
