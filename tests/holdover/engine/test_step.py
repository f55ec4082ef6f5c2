"""What a step may say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import holdover
from holdover import Step
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0, "role": "denoising"}, "role='denoising' is not one of denoise, kv_update, prefill"),
        ({"chunk": 0.5}, r"chunk=0.5 is not a whole number"),
        ({"chunk": True}, "chunk=True is not a whole number"),
        ({"chunk": 0, "index": 4, "num_steps": 4}, "index=4 is not one of num_steps=4"),
        ({"chunk": 0, "index": 1}, r"pass num_steps=len\(sigmas\)"),
        ({"chunk": 0, "index": -1}, "index=-1"),
        ({"chunk": 0, "stream": 3}, "stream=3 is not a name"),
        ({"chunk": 0, "branch": None}, "branch=None is not a name"),
        ({"chunk": 0, "action": "left"}, "action='left' is not numbers"),
        ({"chunk": 0, "action": [0.1, float("nan")]}, "is not finite"),
        ({"chunk": 0, "frame_actions": "left"}, "frame_actions='left' is not numbers"),
        ({"chunk": 0, "frame_actions": [0.1, 0.2]}, r"frame_actions \(2,\) is not \[F, A\]"),
        ({"chunk": 0, "frame_actions": torch.zeros(0, 2)}, r"frame_actions \(0, 2\) is not \[F, A\]"),
        ({"chunk": 0, "frame_actions": [[0.1], [float("inf")]]}, r"frame_actions=\(\(0.1,\), \(inf,\)\) is not finite"),
        ({"chunk": 0, "shown": -1}, "shown=-1 is no latent frame"),
        ({"chunk": 0, "shown": True}, "shown=True is no latent frame"),
        ({"chunk": 0, "shown": 2, "frame_actions": [[0.1], [0.2]]}, "shown=2 is not one of the 2 frames"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Step(**fields)


@pytest.mark.parametrize(
    "action", [[[0.5], [1]], (0.5, 1), np.array([[0.5, 1.0]]), torch.tensor([[0.5, 1.0]], dtype=torch.bfloat16)]
)
def test_an_action_is_taken_as_numbers(action: Any) -> None:
    assert Step(chunk=0, action=action).action_vector == (0.5, 1.0)
    assert Step(chunk=0, action=2).action_vector == (2.0,)
    assert Step(chunk=0).action_vector is None


@pytest.mark.parametrize(
    "frames", [[[0.5, 1], (0.25, 2)], np.array([[0.5, 1.0], [0.25, 2.0]]), torch.tensor([[0.5, 1.0], [0.25, 2.0]])]
)
def test_what_frames_are_told_is_taken_as_numbers(frames: Any) -> None:
    step = Step(chunk=0, action=[0.5], frame_actions=frames, shown=1)
    assert step.frame_vectors == step.told == ((0.5, 1.0), (0.25, 2.0))
    assert step.action_vector == (0.5,)
    assert (step.shown, Step(chunk=0).shown) == (1, None)


def test_without_frames_the_action_is_what_is_told() -> None:
    assert Step(chunk=0, action=[0.5, 1]).told == ((0.5, 1.0),)
    assert Step(chunk=0).told is Step(chunk=0).frame_vectors is None


def test_an_action_overwritten_later_stays_as_it_was() -> None:
    action = torch.tensor([0.5])
    step = Step(chunk=0, action=action)
    action.fill_(0.9)
    assert step.action_vector == (0.5,)


def test_sigma_may_be_a_tensor() -> None:
    assert Step(chunk=0, sigma=torch.tensor(0.25)).sigma == 0.25


def test_unknown_fields_are_refused() -> None:
    with (
        holdover.attach(Stack(Scale()), EAGER) as cache,
        pytest.raises(TypeError, match="comits"),
    ):
        cache.step(chunk=0, comits=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commits": True}, "commits changed to True within chunk 0"),
        ({"action": [0.3]}, r"told changed from \(\(0.2,\),\) to \(\(0.3,\),\) within chunk 0"),
        ({"frame_actions": [[0.2], [0.3]]}, r"told changed from \(\(0.2,\),\) to \(\(0.2,\), \(0.3,\)\) within"),
        ({"num_steps": 3}, "num_steps changed from 2 to 3"),
    ],
)
def test_a_chunk_is_of_one_piece(change: dict[str, Any], message: str) -> None:
    model = Stack(Scale())
    fields: dict[str, Any] = {"chunk": 0, "num_steps": 2, "commits": False, "action": [0.2]}
    with holdover.attach(model, EAGER) as cache:
        with cache.step(**fields):
            model(ones())
        with pytest.raises(ValueError, match=message), cache.step(**{**fields, "index": 1, **change}):
            model(ones())
        with cache.step(**{**fields, "index": 1}):
            model(ones())
        # Branches may have actions of their own, and the clean pass needs none.
        with cache.step(**{**fields, "branch": "uncond", "action": None}):
            model(ones())
        with cache.step(chunk=0, role="kv_update"):
            model(ones())
    assert len(cache.trace) == 4


def test_warm_up_counts_distinct_chunks_in_any_order() -> None:
    model = Stack(Scale())
    with holdover.attach(model, holdover.xcache(warmup=2, front_anchors=0)) as cache:
        for chunk, index in [(7, 0), (3, 0), (7, 1), (3, 1), (9, 0), (7, 2)]:
            with cache.step(chunk=chunk, index=index, num_steps=3, commits=False):
                model(ones())
        assert reasons(cache) == ["warm-up"] * 4 + ["reuse", "warm-up"]
        cache.reset()
        with cache.step(chunk=10, commits=False):
            model(ones())
        assert reasons(cache)[-1] == "warm-up"


def test_a_long_stream_does_not_collect_chunks() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for chunk in range(200):
            with cache.step(chunk=chunk, commits=False):
                model(ones())
        stream = cache._runtimes[0].streams["default"]
        assert (len(stream.chunks), stream.count) == (64, 200)
