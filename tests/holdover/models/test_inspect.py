"""`holdover inspect`: a model never seen before, to a line that attaches to it."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import holdover
from holdover.cli import app
from tests.holdover.models.unknown import bare


def inspect(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["tests.holdover.models.unknown:with_inputs"],
        ["tests.holdover.models.unknown:bare", "--shape", "video=1,6,8", "--shape", "strength="],
    ],
    ids=["inputs", "shapes"],
)
def test_what_it_prints_attaches_to_the_model(arguments: list[str]) -> None:
    said = inspect(*arguments)
    assert "inside.layers: 3 x Layer, work as slots" in said
    assert "idle: 2 x Linear, cannot be slots: never ran" in said
    assert "writes kv in place" in said
    assert 'blocks=("inside.layers",), hidden="video", returns=1, writes_kv=True' in said
    line = next(line.strip() for line in said.splitlines() if line.strip().startswith("holdover.attach"))
    model, video = bare(), torch.ones(1, 6, 8)
    expected = model(video, 1.0)
    policy = holdover.fixed_interval(over="steps", every=2, front_anchors=0, warmup=0, protection="pass")
    with eval(line, {"holdover": holdover, "model": model, "policy": policy}) as cache:
        for index in range(2):
            with cache.step(chunk=0, index=index, num_steps=2):
                output = model(video, 1.0)
    assert cache.stats().reused == 3
    assert torch.allclose(output, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.holdover.models.unknown"], "names no function"),
        (["tests.holdover.models.unknown:absent"], "no function 'absent'"),
        (["tests.holdover.models.unknown:nothing"], "returned a str"),
        (["tests.holdover.models.unknown:bare", "--shape", "video:1"], "is no shape"),
    ],
)
def test_what_cannot_be_inspected_is_explained(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert result.exit_code == 2
    assert message in result.output
