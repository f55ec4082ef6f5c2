"""docs/engine.md names files and things as they are in the code."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import holdover
from holdover import method

SOURCE = Path(holdover.__file__).parent
PAGE = (Path(__file__).parents[3] / "docs" / "engine.md").read_text(encoding="utf-8")


def test_a_method_s_author_has_eight_concepts_in_one_module() -> None:
    concepts = {
        name for name, kind in vars(method).items() if inspect.isclass(kind) and kind.__module__ == method.__name__
    }
    assert len(concepts) == 8
    assert all(f"`{name}`" in PAGE for name in concepts)


def test_every_file_of_the_engine_is_on_the_page_and_short() -> None:
    named = set(re.findall(r"[\w/]+\.py", PAGE))
    files = {path.name for path in (SOURCE / "engine").glob("*.py") if path.stat().st_size}
    assert files <= {Path(name).name for name in named}
    top = [SOURCE / f"{name}.py" for name in ("method", "slot", "step", "decision")]
    for path in [*(SOURCE / "engine").glob("*.py"), *(SOURCE / "methods").rglob("*.py"), *top]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path


def test_every_name_on_the_page_is_in_the_code() -> None:
    modules = [path for path in (SOURCE / "engine").glob("*.py") if path.stem != "__init__"]
    known: dict[str, object] = {}
    for module in [
        *(import_module(f"holdover.engine.{path.stem}") for path in modules),
        *(import_module(f"holdover.{name}") for name in ("method", "slot", "step", "decision")),
        import_module("holdover.methods.parts.predictors"),
    ]:
        known |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    names = re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", PAGE)
    assert len(names) > 20
    for name, attribute in names:
        assert name in known, name
        fields = getattr(known[name], "__dataclass_fields__", {})
        assert not attribute or hasattr(known[name], attribute) or attribute in fields, f"{name}.{attribute}"
