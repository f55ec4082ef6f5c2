"""The library with its core dependencies alone: nothing else can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.holdover.report import runs

#: Finds no module but those of the core: the dependencies of the package, and theirs.
BARE = """
import re, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

core, waiting = set(), ["holdover"]
while waiting:
    name = normal(waiting.pop())
    if name not in core:
        core.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        waiting += [re.match(r"[\\w.-]+", line)[0] for line in lines if "extra ==" not in line]
assert {"torch", "numpy", "safetensors", "typer"} <= core and "av" not in core, core
refused = {module for module, names in packages_distributions().items() if not core & {normal(n) for n in names}}
refused |= {"holdover_world", "holdover_world_weights", "lab"}

class Core:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in refused:
            found = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *context: ())(*context)

sys.meta_path[:] = [Core(list(sys.meta_path))]
"""
COMMAND = "from holdover.cli import main\nsys.argv = ['holdover', *sys.argv[1:]]\nmain()"
ATTACH = """
import holdover
from tests.holdover.tune.toys import many_chunks
model, loop = many_chunks()
with holdover.attach(model, holdover.xcache()) as cache:
    loop(cache)
print(cache.stats())
assert cache.stats().reused > 0
try:
    holdover.report.record
except ModuleNotFoundError as error:
    print(error)
"""


def bare(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", BARE + code, *arguments], capture_output=True, text=True, cwd=root)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--help", "calibrate"),
        ("--version", "holdover "),
        ("methods", "worldcache_pcd"),
        ("models", "CogVideoX"),
        ("inspect tests.holdover.models.unknown:with_inputs", "holdover.attach(model"),
        ("calibrate tests.holdover.tune.toys:few_chunks --degree 2 --out {out}", "polynomial"),
        ("overhead tests.holdover.tune.toys:one_chunk --rounds 1 --out {out}", "always-hit"),
        ("compare tests.holdover.tune.toys:one_chunk --method fbcache --rounds 1 --out {out}", "fbcache"),
        ("trace {run}", "skipped"),
        ("trace {run} --out {out}", "trace: "),
    ],
)
def test_commands_work_without_any_extra(arguments: str, said: str, run: Path, tmp_path: Path) -> None:
    done = bare(COMMAND, *arguments.format(run=run, out=tmp_path / "out.json").split())
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_page_names_its_extra(run: Path) -> None:
    done = bare(COMMAND, "report", str(run))
    assert done.returncode == 2
    assert done.stderr.endswith("is not installed: pip install 'holdover[report]'\n")
    assert done.stderr.count("\n") == 1


def test_a_cache_attaches_and_recording_names_its_extra() -> None:
    done = bare(ATTACH)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("is not installed: pip install 'holdover[report]'\n")
