"""The command line: quick help, one-line errors, options that arrive."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import holdover.world.record
import holdover.world.train
from holdover import cli
from holdover.world.recipe import Recipe
from tests.bench.small import world_model, write_clips


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(*arguments: str) -> str:
    """Run what must fail; returns the one line it says."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("holdover: ")
    assert result.stderr.count("\n") == 1
    message: str = result.stderr
    return message


def test_help_needs_none_of_the_heavy_modules() -> None:
    code = """
import sys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from holdover import cli
result = CliRunner().invoke(cli.app, ["--help"])
assert result.exit_code == 0 and "demo" in result.output, result.output
heavy = "av", "matplotlib", "skimage", "pyarrow", "jinja2", "holdover.bench", "holdover.world", "holdover.report"
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help() -> None:
    for command in (["demo"], ["methods"], ["world", "record"], ["world", "train"], ["bench", "ablation"]):
        result = run(*command, "--help")
        assert result.exit_code == 0, command


def test_the_methods_are_those_of_the_registry_and_of_the_docs() -> None:
    table = run("methods", "--markdown").output.strip()
    assert [line.split("`")[1] for line in table.splitlines()[2:]] == holdover.policies()
    assert "tau_floor=0.97" in table
    assert table in (Path(__file__).parents[1] / "docs" / "methods.md").read_text()  # else put this one there
    assert "relative change (L1) of the timestep-modulated input" in run("methods", "teacache").output
    assert "did you mean 'teacache'" in refused("methods", "teacahe")
    wide = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": "200"}).output
    assert wide.count("predictor: Residual()") == table.count("| `Residual()` |") >= 5


def test_a_missing_checkpoint_is_one_line(tmp_path: Path) -> None:
    assert "no checkpoint at" in refused("demo", "--model", str(tmp_path / "none.safetensors"))


def test_wrong_values_are_one_line(tmp_path: Path) -> None:
    assert "'town' is not one of" in refused("demo", "--scenario", "town")
    assert "town" in refused("world", "record", "--scenario", "town", "--out", str(tmp_path))
    assert "not a folder of clips" in refused("world", "train", "--data", str(tmp_path), "--out", str(tmp_path / "x"))
    train = "world", "train", "--data", str(tmp_path), "--out", str(tmp_path)
    assert "--start-from" in refused(*train, "--recipe", "sharpen")
    assert "'polish' is not one of" in refused(*train, "--recipe", "polish")
    assert "steps=0" in refused(*train, "--steps", "0")


@pytest.mark.parametrize(
    ("module", "extra"), [("matplotlib", "report"), ("av", "world"), ("panda3d.core", "simulator")]
)
def test_a_missing_extra_is_named(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(holdover.world.record, "record", missing)
    assert f"pip install 'holdover[{extra}]'" in refused("world", "record", "--scenario", "urban", "--out", "x")


def test_record_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []
    monkeypatch.setattr(holdover.world.record, "record", lambda *args, **kwargs: calls.append((args, kwargs)))
    options = ["--clips", "3", "--seed", "7", "--frames", "24", "--no-depth", "--workers", "2"]
    assert run("world", "record", "--scenario", "uturn", "--out", str(tmp_path), *options).exit_code == 0
    assert calls == [(("uturn", 3, tmp_path), {"seed": 7, "frames": 24, "depth": False, "workers": 2})]


def test_train_passes_the_recipe_on_and_draws_the_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipes = []

    def train(
        data: Path, out: Path, recipe: Recipe, *, heldout: Path | None, start_from: Path | None, device: str
    ) -> Path:
        recipes.append((data, recipe, heldout, start_from, device))
        (out / "log.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(3)))
        return out / "model.safetensors"

    monkeypatch.setattr(holdover.world.train, "train", train)
    result = run(
        *("world", "train", "--data", "d", "--out", str(tmp_path), "--heldout", "h", "--steps", "3", "--seed", "5"),
        *("--start-from", "s"),
    )
    assert result.exit_code == 0, result.output
    ((data, recipe, heldout, start_from, device),) = recipes
    assert (data, heldout, start_from, device) == (Path("d"), Path("h"), Path("s"), "cpu")
    assert asdict(recipe) == asdict(Recipe(steps=3, seed=5))
    assert (tmp_path / "curve.png").is_file()


def test_demo_and_benches_run_on_a_model_and_clips_of_one_s_own(tmp_path: Path) -> None:
    clips = write_clips(tmp_path / "clips", 1 + 2 * 16)
    world_model().save(tmp_path / "model.safetensors")
    own = ["--model", str(tmp_path / "model.safetensors"), "--clips", str(clips)]
    out = str(tmp_path / "demo")
    result = run("demo", *own, "--out", out, "--generations", "8", "--scenario", "urban", "--every", "16")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"page: {tmp_path / 'demo' / 'index.html'}"
    assert "3682 → 1392" in result.output
    assert json.loads((tmp_path / "demo" / "report.json").read_text())["environment"]["model"] == "model.safetensors"
    result = run("bench", "overhead", *own, "--out", str(tmp_path / "benchmarks"), "--generations", "8")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["generations"] == 4
    assert "no urban clip" in refused("demo", *own, "--out", out, "--generations", "99", "--scenario", "urban")


def test_a_checkpoint_of_another_version_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    world_model().save(path)
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    del tensors["head.bias"]
    save_file(tensors, path, metadata=metadata)
    assert "train it again" in refused("demo", "--model", str(path))
