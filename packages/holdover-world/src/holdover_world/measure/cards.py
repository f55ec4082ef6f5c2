"""Results as files: a readable card and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdover.report.files import write_json, write_text


def write_card(out: Path, name: str, text: str, figures: dict[str, Any]) -> None:
    """Write ``out/name.md`` and ``out/name.json``."""
    write_text(out / f"{name}.md", text)
    write_json(out / f"{name}.json", figures)


def about(environment: dict[str, Any]) -> str:
    """One line on the machine and the software of a card."""
    gpu = f"{environment['gpu']}, " if "gpu" in environment else ""
    dtype = f"in {environment['dtype']}, " if "dtype" in environment else ""
    return (
        f"Measured on {gpu}{environment['processor']} ({environment['system']}), {environment['threads']} threads, "
        f"{dtype}PyTorch {environment['torch']}, Python {environment['python']}."
    )
