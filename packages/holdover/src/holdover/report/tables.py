"""Figures as tables: for the terminal (rich), for Markdown, and as text for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

#: The table of a run: the columns of the table in the X-Cache paper (arXiv 2604.20289), and more.
COLUMNS = (
    "scenario",
    "policy",
    "PSNR",
    "SSIM",
    "ST-LPIPS",
    "skip",
    "DiT ms",
    "whole ms",
    "speed-up",
    "bound",
    "MiB held",
    "brake",
    "steer",
)

#: With fewer timed cycles a median and its spread say nothing.
FEWEST = 3


def decibels(value: float | None) -> str:
    """PSNR in dB; None stands for equal videos."""
    return "equal" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def scientific(value: float | None) -> str:
    """A small positive number, such as LPIPS: 3.3e-4."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def enough(figures: Mapping[str, Any]) -> bool:
    """Whether so many cycles were timed that their median says something; true where nobody counted them."""
    return bool(figures.get("cycles_timed", FEWEST) >= FEWEST)


def speed(figures: Mapping[str, Any]) -> str:
    """A speed-up with its spread, "≈ 1" where 1 lies within it; a dash where too little was timed."""
    value, spread = figures.get("speedup"), figures.get("speedup_spread")
    if value is None or not enough(figures):
        return "–"
    if spread is None:
        return f"{value:.2f}×"
    low, high = spread
    return f"{'≈ 1' if low <= 1 <= high else f'{value:.2f}×'} ({low:.2f}–{high:.2f})"


def milliseconds(figures: Mapping[str, Any], key: str) -> str:
    """A time of a chunk with its spread, if it is known; a dash where too little was timed."""
    value, spread = figures.get(key), figures.get(f"{key}_spread")
    if value is None or not enough(figures):
        return "–"
    return f"{value:.0f}" if spread is None else f"{value:.0f} ({spread[0]:.0f}–{spread[1]:.0f})"


def row(scenario: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    """The figures of a rollout, in the order of `COLUMNS`. What was not measured, or too seldom, is a dash."""
    stitched, reaction = figures["stitched"], figures.get("reaction", {})
    cached = figures["policy"] is not None
    cells = (
        figures.get("drive", scenario),
        figures["name"],
        decibels(stitched["psnr_db"]) if cached else "reference",
        _or_dash(stitched["ssim"], "{:.4f}"),
        scientific(stitched["lpips"]),
        percent(figures.get("skip")),
        milliseconds(figures, "dit_ms_per_chunk"),
        milliseconds(figures, "end_to_end_ms_per_chunk"),
        speed(figures),
        _or_dash(figures.get("speedup_bound") if enough(figures) else None, "{:.2f}×"),
        _or_dash(figures.get("bytes_held", 0) / 2**20, "{:.1f}"),
        ratio(reaction.get("brake")),
        ratio(reaction.get("steer")),
    )
    times = COLUMNS.index("DiT ms"), COLUMNS.index("whole ms")
    return cells if cached else tuple(cell if i < 3 or i in times else "" for i, cell in enumerate(cells))


def published_row(scenario: str, published: Mapping[str, str]) -> tuple[str, ...]:
    """Published figures, given as text per column, in the order of `COLUMNS`. What was not published is a dash."""
    known = {"scenario": scenario, "policy": "published", **published}
    return tuple(known.get(column, "–") for column in COLUMNS)


def _or_dash(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[str] = ("",)) -> None:
    """Print a table for the terminal; the columns named in ``text`` are words, the others are figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table without cutting its cells, however narrow the terminal is."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(console.width, needed)).print(table)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    lines = [_line(columns), _line([":--"] + ["--:"] * (len(columns) - 1))]
    return "\n".join([*lines, *map(_line, rows)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
