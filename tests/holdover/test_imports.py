"""Who imports whom, file by file; and what importing the library does."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import holdover

SOURCE = Path(holdover.__file__).parent

#: What everybody may speak of: the words of a caching method.
CONCEPTS = {"step", "slot", "decision", "method"}
#: What the files of each room, and each file outside of one, may import of other rooms and files.
ALLOWED = {
    "step": set(),
    "slot": set(),
    "decision": {"step"},
    "method": {"step", "slot"},
    "engine": CONCEPTS,
    "methods": CONCEPTS | {"engine"},
    "models": CONCEPTS | {"engine", "factories"},
    "diffusers": CONCEPTS | {"engine", "models"},
    "pipelines": CONCEPTS | {"diffusers", "models"},
    "report": CONCEPTS | {"engine", "lazy"},
    "tune": CONCEPTS | {"engine", "factories", "methods", "models"},
    "cli": {"extras", "methods", "models", "report", "tune"},
    "extras": set(),
    "factories": set(),
    "lazy": {"extras"},
    "version": set(),
    "__main__": {"cli"},
}
#: Single files that may import more than the rest of their room.
MORE = {"report/methods": {"methods"}, "cli/__init__": {"version"}}

#: The packages that a room may import; they are the core's.
PACKAGES = {
    "step": {"torch", "numpy"},
    "slot": {"torch"},
    "method": {"torch"},
    "engine": {"torch", "numpy", "safetensors"},
    "methods": {"torch"},
    "models": {"torch"},
    "diffusers": {"torch"},
    "report": {"torch", "numpy", "pyarrow", "rich"},
    "tune": {"torch", "numpy"},
    "cli": {"typer", "rich"},
}
#: The files that need the extra `report`, with the packages that come with it. No other file but the page's and the
#: recording's own imports them.
EXTRA = {
    "report/fidelity": {"skimage"},
    "report/page": {"jinja2", "markupsafe"},
    "report/plots": {"matplotlib"},
    "report/recording": set(),
    "report/run_plots": set(),
    "report/run_write": set(),
    "report/style": {"matplotlib"},
    "report/video": {"av"},
}

FILES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))
#: Their imports are lazy: `test_lazy_names_are_where_they_are_said_to_be` looks at them.
LAZY = ("__init__", "report/__init__")


def imported(nodes: list[ast.stmt]) -> Iterator[str]:
    """Every module that statements name in an import, wherever in them."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def statements(file: str) -> list[ast.stmt]:
    return ast.parse((SOURCE / f"{file}.py").read_text(encoding="utf-8")).body


def at_once(file: str) -> list[ast.stmt]:
    """The statements that run when a file is imported."""
    return [node for node in statements(file) if not isinstance(node, ast.FunctionDef | ast.ClassDef)]


def room(file: str) -> str:
    return file.partition("/")[0]


def files(names: Iterator[str]) -> set[str]:
    """The files of the library among modules; names in a module are left out."""
    known = {file.replace("/", ".").removesuffix(".__init__"): file for file in FILES}
    found = {name.removeprefix("holdover.") for name in names if name.startswith("holdover.")}
    return {known[name] for name in found if name in known}


def test_every_file_is_in_a_room() -> None:
    assert {room(file) for file in FILES} - {"__init__"} == ALLOWED.keys()
    assert {*MORE, *EXTRA} <= {*FILES}


@pytest.mark.parametrize("file", [file for file in FILES if file not in LAZY])
def test_a_file_imports_what_its_room_may(file: str) -> None:
    allowed = ALLOWED[room(file)] | MORE.get(file, set()) | {room(file)}
    assert {room(other) for other in files(imported(statements(file)))} <= allowed
    outside = {name.partition(".")[0] for name in imported(statements(file))}
    packages = PACKAGES.get(room(file), set()) | EXTRA.get(file, set())
    assert outside - set(sys.stdlib_module_names) - {"holdover"} <= packages


@pytest.mark.parametrize("file", [file for file in FILES if file not in EXTRA])
def test_what_needs_an_extra_is_imported_late(file: str) -> None:
    assert not files(imported(at_once(file))) & EXTRA.keys() or file in LAZY


def test_commands_import_the_library_when_they_run() -> None:
    for file in FILES:
        if room(file) in ("cli", "lazy", "extras"):
            assert {room(other) for other in files(imported(at_once(file)))} <= {"cli", "extras"}, file


def test_no_file_imports_itself_by_way_of_others() -> None:
    known = {file: files(imported(statements(file))) - {file, *LAZY} for file in FILES if file not in LAZY}
    tuple(TopologicalSorter(known).static_order())  # a CycleError names the files of the circle


@pytest.mark.parametrize("file", LAZY)
def test_lazy_names_are_where_they_are_said_to_be(file: str) -> None:
    """The table, what type checkers are told, and what there is, are the same."""
    package = importlib.import_module(".".join(["holdover", *file.split("/")[:-1]]))
    told = {}
    for node in ast.walk(ast.Module(statements(file), [])):
        if isinstance(node, ast.ImportFrom) and node.module not in ("typing", "holdover.lazy"):
            for alias in node.names:
                assert alias.asname == alias.name
                whole = f"{node.module}.{alias.name}"
                told[alias.name] = whole if whole == f"{package.__name__}.{alias.name}" else node.module
    assert told == package._WHERE
    assert sorted(package.__all__) == sorted(told)
    for name, module in told.items():
        found, defined = getattr(package, name), sys.modules[module]
        assert found is (defined if module == f"{package.__name__}.{name}" else getattr(defined, name))
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'absent'"):
        _ = package.absent


QUIET = """
import sys, threading, warnings
warnings.simplefilter("error")
import holdover
loaded = sorted(name for name in sys.modules if name.startswith("holdover"))
assert loaded == ["holdover", "holdover.lazy"], loaded
assert not {"torch", "numpy", "importlib.metadata"} & sys.modules.keys()
import torch
before = torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist()
for name in holdover.__all__:
    getattr(holdover, name)
assert before == (torch.get_num_threads(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist())
assert threading.active_count() == 1
loaded = {name.split(".")[1] for name in sys.modules if name.startswith("holdover.")}
assert not {"cli", "tune"} & loaded, loaded
assert not {"diffusers", "torch._dynamo", "pyarrow", "rich", "typer", "av"} & sys.modules.keys()
"""


def test_importing_has_no_side_effects() -> None:
    result = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
