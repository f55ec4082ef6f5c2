"""The demo's page: a folder that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from holdover.report import tables
from holdover.report.files import write_text


def write_page(out: Path, report: dict[str, Any]) -> Path:
    """Write ``index.html`` beside the videos and plots that a demo report names; returns its path.

    Args:
        out: the folder with the report's files.
        report: the content of ``report.json``.
    """
    environment = Environment(
        loader=PackageLoader("holdover.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "decibels": tables.decibels,
        "percent": tables.percent,
        "ratio": tables.ratio,
        "scientific": tables.scientific,
    }
    template = environment.get_template("demo.html")
    path = out / "index.html"
    write_text(path, template.render(report=report, columns=tables.COLUMNS, rows=tables.demo_rows(report)))
    return path
