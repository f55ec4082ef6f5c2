"""Imports run one way, file by file: from the rooms above to the rooms below."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import holdover
import holdover_world

SOURCE = Path(holdover_world.__file__).parent
LIBRARY = Path(holdover.__file__).parent

#: The rooms, and the files beside them, from below upwards. A file imports from its own room and from lower lines.
LAYERS = (
    {"runtime", "scene"},
    {"config", "simulator"},
    {"codec"},
    {"conditioning"},
    {"model"},
    {"loop"},
    {"sessions", "training"},
    {"env", "measure", "server"},
    {"fleet"},
    {"cli"},
)
#: The simulator makes data. What runs a model does without it.
WITH_SIMULATOR = {"simulator", "training", "measure", "env", "cli"}


def module_of(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it, and the names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
#: Of each file of the package, the other files of it that it imports.
KNOWN = {module: imports(path) & FILES.keys() - {module} for module, path in FILES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def closure(*modules: str) -> set[str]:
    """These files, and all that they import, directly or through others."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += KNOWN[module]
    return found


def in_room(room: str) -> list[str]:
    return [module for module in FILES if room_of(module) == room]


def test_every_room_has_its_place() -> None:
    placed = [room for layer in LAYERS for room in layer]
    assert len(placed) == len(set(placed))
    assert {room_of(module) for module in FILES} - {""} == set(placed)


@pytest.mark.parametrize("module", [module for module in FILES if room_of(module)])
def test_a_file_imports_from_its_own_room_and_from_those_below(module: str) -> None:
    room = room_of(module)
    layer = next(n for n, rooms in enumerate(LAYERS) if room in rooms)
    below = {room}.union(*LAYERS[:layer])
    if room not in WITH_SIMULATOR:
        below -= {"simulator"}
    wrong = {name for name in KNOWN[module] if room_of(name) not in below}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    tuple(TopologicalSorter(KNOWN).static_order())  # a CycleError names the files of the circle


def test_a_room_brings_in_nothing_by_itself() -> None:
    """Importing a file runs the ``__init__.py`` of its room, which imports nothing."""
    assert not [module for module, path in FILES.items() if path.name == "__init__.py" and KNOWN[module]]


@pytest.mark.parametrize("room", ["scene", "codec", "conditioning", "model", "loop", "sessions", "server"])
def test_what_runs_a_model_does_not_reach_the_simulator(room: str) -> None:
    reached = closure(*in_room(room)) & set(in_room("simulator"))
    assert not reached, f"{room} reaches {', '.join(sorted(reached))}"


def test_the_simulator_needs_the_scene_alone() -> None:
    assert {room_of(module) for module in closure(*in_room("simulator"))} == {"simulator", "scene"}


def test_the_loop_knows_no_model() -> None:
    """It drives whatever satisfies its protocol."""
    reached = closure("holdover_world.loop.closed_loop", "holdover_world.loop.generator")
    assert reached == {
        *(f"holdover_world.loop.{file}" for file in ("batch", "closed_loop", "config", "cycle", "generator")),
        *("holdover_world.loop.protocol", "holdover_world.loop.state", "holdover_world.model.sampler"),
    }


def test_the_library_does_not_know_the_world() -> None:
    for path in LIBRARY.rglob("*.py"):
        wrong = {name for name in imports(path) if name.split(".")[0] in ("holdover_world", "holdover_world_weights")}
        assert not wrong, f"{path.relative_to(LIBRARY)} imports {', '.join(sorted(wrong))}"


def test_the_package_does_not_know_what_is_built_on_it() -> None:
    for module, path in FILES.items():
        assert not {name.split(".")[0] for name in imports(path)} & {"lab", "tests"}, module
