"""Which extra of which package brings a module that is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires

#: Modules whose name is not that of their distribution.
_DISTRIBUTIONS = {"direct": "panda3d", "skimage": "scikit-image", "yaml": "pyyaml"}
_REQUIREMENT = re.compile(r"""([\w.-]+).*extra == ['"]([\w.-]+)['"]""")


def missing(error: ModuleNotFoundError) -> str:
    """What to install for a module that is missing, in one line.

    Looks in the extras of holdover, then in those of the packages that add commands to it.
    """
    module = (error.name or "").partition(".")[0]
    wanted = _normal(_DISTRIBUTIONS.get(module, module))
    for package in _packages():
        for needed, extra in _extras(package):
            if _normal(needed) == wanted:
                return f"{module} is not installed: pip install '{package}[{extra}]'"
    return str(error)


def _packages() -> Iterator[str]:
    yield "holdover"
    yield from sorted({point.dist.name for point in entry_points(group="holdover.commands") if point.dist})


def _extras(package: str) -> Iterator[tuple[str, str]]:
    """The distributions that a package's extras bring, each with its extra."""
    try:
        lines = requires(package) or []
    except PackageNotFoundError:
        return
    for line in lines:
        found = _REQUIREMENT.match(line)
        if found:
            yield found[1], found[2]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
