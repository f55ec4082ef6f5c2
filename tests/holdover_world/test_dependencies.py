"""The package declares every distribution that its modules import: in its dependencies, or in the extra of its room."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "packages" / "holdover-world"
SOURCE = ROOT / "src" / "holdover_world"
#: The extra of a room or a module; other files need only the dependencies.
EXTRAS = {"server": "serve", "env": "env", "fleet.py": "fleet", "simulator": "simulator"}
#: Modules whose distribution has another name.
NAMES = {"PIL": "pillow", "yaml": "pyyaml", "direct": "panda3d", "holdover_world_weights": "holdover-world-weights"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(extra: str | None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]
    names = {normal(re.split(r"[\[<>=~! ]", line)[0]) for line in lines}
    inner = [match[1] for line in lines if (match := re.match(r"holdover-world\[(.*)\]", line))]
    return names.union(*(declared(name) for name in inner))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_import_is_declared(path: Path) -> None:
    known = declared(EXTRAS.get(path.relative_to(SOURCE).parts[0]))
    modules = set(imported(path)) - set(sys.stdlib_module_names) - {"holdover_world", "__future__"}
    assert {module for module in modules if normal(NAMES.get(module, module)) not in known} == set()


def test_the_extras_are_those_of_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(project["optional-dependencies"])
