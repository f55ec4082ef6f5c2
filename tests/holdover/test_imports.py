"""Imports run one way, the core needs little, and importing does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "holdover"

#: What each room may import of the others. `__init__.py` stands above them all.
ALLOWED = {
    "engine": set(),
    "policies": {"engine"},
    "hosts": {"engine"},
    "world": {"engine"},
    "rollout": {"engine", "policies", "hosts", "world"},
    "report": {"engine", "policies", "hosts", "world", "rollout"},
    "bench": {"engine", "policies", "hosts", "world", "rollout", "report"},
    "serve": {"engine", "policies", "hosts", "world", "rollout", "report"},
    "cli": {"engine", "policies", "hosts", "world", "rollout", "report", "bench", "serve"},
}

#: Rooms that `import holdover` brings in, and what they may need.
CORE_ROOMS = ("engine", "policies", "hosts")
CORE_PACKAGES = {"torch", "numpy", "safetensors"}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms(path: Path) -> set[str]:
    """The rooms that a file imports from; the package itself stands for those it brings in."""
    names = imports(path)
    parts = [name.split(".") for name in names]
    found = {part[1] for part in parts if part[0] == "holdover" and len(part) > 1} & ALLOWED.keys()
    return found | set(CORE_ROOMS) if "holdover" in names else found


def test_every_room_is_known() -> None:
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= ALLOWED.keys()


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_one_way(room: str) -> None:
    for path in (SOURCE / room).rglob("*.py"):
        wrong = rooms(path) - ALLOWED[room] - {room}
        assert not wrong, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(wrong))}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    paths = {path.relative_to(SOURCE.parent).with_suffix(""): path for path in SOURCE.rglob("*.py")}
    modules = {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}
    known = {module: imports(path) & modules.keys() - {module, "holdover"} for module, path in modules.items()}
    tuple(TopologicalSorter(known).static_order())  # a CycleError names the modules of the circle


def test_the_core_needs_three_packages() -> None:
    files = [SOURCE / "__init__.py", *(path for room in CORE_ROOMS for path in (SOURCE / room).rglob("*.py"))]
    needed = {name.split(".")[0] for path in files for name in imports(path)}
    assert needed - set(sys.stdlib_module_names) - {"holdover"} == CORE_PACKAGES


QUIET = """
import sys, threading, warnings
warnings.simplefilter("error")
import torch
before = torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()
import holdover
assert before == (torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist())
assert threading.active_count() == 1
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("holdover.")}
assert loaded == {"engine", "policies", "hosts"}, loaded
assert "torch._dynamo" not in sys.modules
"""


def test_importing_has_no_side_effects() -> None:
    result = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
