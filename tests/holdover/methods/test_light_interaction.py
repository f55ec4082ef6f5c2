"""Light Interaction: what makes a chunk familiar, in closed form and against points counted one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from holdover import Step
from holdover.methods.light_interaction import CameraOverlap
from tests.holdover.engine.models import Scale, Stack, ones, reasons
from tests.holdover.naive.light_interaction import overlap


def pose(x: float = 0, y: float = 0, z: float = 0, *, yaw: float = 0, pitch: float = 0, roll: float = 0) -> Tensor:
    """Camera to world: degrees, first roll about the axis, then pitch (down is positive), then yaw (to the right)."""
    a, b, c = (math.radians(angle) for angle in (yaw, pitch, roll))
    turn = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    nod = torch.tensor([[1, 0, 0], [0, math.cos(b), math.sin(b)], [0, -math.sin(b), math.cos(b)]])
    tilt = torch.tensor([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    made = torch.eye(4, dtype=torch.float64)
    made[:3, :3] = turn @ nod @ tilt
    made[:3, 3] = torch.tensor([x, y, z])
    return made


def of(*poses: Tensor, **options: Any) -> CameraOverlap:
    known = torch.stack(poses) if poses else torch.zeros(0, 4, 4)
    return CameraOverlap(poses=lambda step: known, **options)


def test_a_camera_that_turns_sees_less_by_the_angle() -> None:
    """Around one place, points are spread evenly over azimuth: of 60 degrees, those that both see."""
    score = of()
    for angle in (0, 15, 30, 45, 60, 180):
        expected = max(0.0, (60 - angle) / 60)
        assert score.overlap(pose(yaw=20), pose(yaw=20 + angle)) == pytest.approx(expected, abs=0.02)
        assert score.overlap(pose(yaw=-170), pose(yaw=-170 - angle)) == pytest.approx(expected, abs=0.02)


def test_a_camera_that_nods_sees_less_by_the_sine() -> None:
    """Points are spread evenly over the sine of elevation: of ``2·sin 17.5°`` those above ``sin(φ - 17.5°)``."""
    half = math.radians(17.5)
    for angle in (5, 15, 30):
        expected = (math.sin(half) - math.sin(math.radians(angle) - half)) / (2 * math.sin(half))
        assert of().overlap(pose(), pose(pitch=angle)) == pytest.approx(expected, abs=0.02)


def test_roll_is_ignored_and_what_lies_beyond_the_radius_is_not_seen() -> None:
    assert of().overlap(pose(), pose(roll=40)) == 1
    assert of().overlap(pose(), pose(z=-16.1)) == 0  # nothing within 8 of one is within 8 of the other
    assert of(view=(170.0, 170.0)).overlap(pose(), pose(z=-4)) < 0.9


@pytest.mark.parametrize(
    "other",
    [pose(1, 0.3, -2, yaw=12, pitch=-5), pose(-3, 0, 1, yaw=-25), pose(0.5, -1, -4, yaw=8, pitch=10)],
    ids=["near", "aside", "behind"],
)
def test_the_overlap_is_that_of_points_counted_one_by_one(other: Tensor) -> None:
    q = pose(10, 2, -4, yaw=70, pitch=-6, roll=3)
    h = q @ other
    counted = overlap(q.tolist(), h.tolist())
    assert 0.05 < counted < 0.95
    assert of().overlap(q, h) == pytest.approx(counted, abs=0.03)


def test_the_score_is_that_of_the_best_clip() -> None:
    """Frames look to the side by these angles; the chunk is the last four."""
    yaws = [0.0] * 4 + [30.0, 30, 36, 36] + [90.0] * 4 + [180.0] * 4 + [0.0, 0, 0, 0]
    score = of(*(pose(yaw=yaw) for yaw in yaws))
    step = Step(chunk=5)
    # Clip 4 is seen from frames 4 and 6; clip 12 begins within the recent four, and the first four do not count.
    assert score(step) == pytest.approx((0.5 + 0.4) / 2, abs=0.02)
    assert of(*(pose(yaw=yaw) for yaw in yaws), recent=0, frames=2)(step) == 1  # the clip just before
    assert of(*(pose() for _ in range(15)))(step) == 0  # of 11 frames before the chunk all are context
    assert of(*(pose() for _ in range(16)))(step) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: of(radius=0), "radius=0, view=.*: give a radius above 0"),
        (lambda: of(view=(60.0, 200.0)), "angles of 0 to 180"),
        (lambda: of(frames=0), "frames=0: give a whole number, 1 or more"),
        (lambda: of(pose())(Step(chunk=0)), r"poses are \[1, 4, 4\]; give \[T, 4, 4\], at least the 4 of the chunk"),
        (lambda: holdover.policy("light_interaction"), "familiar=None: give a function of a step"),
        (lambda: policy(1.0, threshold=1.5), "threshold=1.5 is not between 0 and 1"),
        (lambda: policy(1.0, protection="off"), "protection='off' is not one of"),
    ],
)
def test_wrong_options_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def policy(*scores: float, **options: Any) -> holdover.Policy:
    return holdover.policy("light_interaction", familiar=lambda step: scores[step.chunk], **options)


def test_middle_passes_repeat_the_first_output_where_the_chunk_is_familiar() -> None:
    model = Stack(Scale())
    with holdover.attach(model, policy(0.7, 0.69)) as cache:
        outputs = []
        for chunk in range(2):
            for index in range(4):
                with cache.step(chunk=chunk, index=index, num_steps=4):
                    outputs.append(float(model(ones(index + 1))[0, 0, 0]))
    assert outputs == [2, 2, 2, 8, 2, 4, 6, 8]
    assert reasons(cache) == ["first", "reuse", "reuse", "last step", "first", "unfamiliar", "unfamiliar", "last step"]


def test_the_function_is_asked_once_per_chunk_and_branch_with_the_first_step() -> None:
    asked = []

    def familiar(step: Step) -> float:
        asked.append((step.chunk, step.branch, step.index))
        return 1.0 if step.branch == "cond" else 0.0

    model = Stack(Scale())
    with holdover.attach(model, holdover.policy("light_interaction", familiar=familiar)) as cache:
        for chunk in range(2):
            for index in range(3):
                for n, branch in enumerate(("cond", "uncond")):
                    with cache.step(chunk=chunk, index=index, num_steps=3, branch=branch):
                        y = model(ones(index + 10 * n + 1))
                    if (chunk, index, branch) == (0, 1, "cond"):
                        assert torch.equal(y, ones(2))  # of its own branch
    assert asked == [(chunk, branch, 0) for chunk in range(2) for branch in ("cond", "uncond")]
    assert [d.branch for d in cache.trace if d.reason == "reuse"] == ["cond"] * 2


def test_a_score_beyond_its_range_is_an_error() -> None:
    model = Stack(Scale())
    with (
        holdover.attach(model, policy(1.2)) as cache,
        pytest.raises(ValueError, match=r"familiar gave 1\.2 for chunk 0"),
        cache.step(chunk=0, num_steps=4),
    ):
        model(ones())


def test_a_functions_name_stands_for_it_in_a_snapshot() -> None:
    assert repr(holdover.policy("light_interaction", familiar=of)) == repr(
        holdover.policy("light_interaction", familiar=of)
    )
    assert "test_light_interaction.of'" in repr(holdover.policy("light_interaction", familiar=of))
