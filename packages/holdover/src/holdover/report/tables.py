"""Figures as tables: for the terminal (rich), for Markdown, and as text for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from holdover_world.measure.published import X_CACHE, Published

#: Columns of the paper's table and what it leaves out.
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


def decibels(value: float | None) -> str:
    """PSNR; None is that of equal videos."""
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


def row(scenario: str, policy: Mapping[str, Any]) -> tuple[str, ...]:
    """One policy of a report, or a recorded rollout's figures, in the order of `COLUMNS`; unmeasured is a dash."""
    stitched, reaction = policy["stitched"], policy.get("reaction", {})
    cached = policy["policy"] is not None
    cells = (
        scenario,
        policy["name"],
        decibels(stitched["psnr_db"]) if cached else "reference",
        _or_dash(stitched["ssim"], "{:.4f}"),
        scientific(stitched["lpips"]),
        percent(policy.get("skip")),
        _or_dash(policy.get("dit_ms_per_chunk"), "{:.0f}"),
        _or_dash(policy.get("end_to_end_ms_per_chunk"), "{:.0f}"),
        _or_dash(policy.get("speedup"), "{:.2f}×"),
        _or_dash(policy.get("speedup_bound"), "{:.2f}×"),
        _or_dash(policy.get("bytes_held", 0) / 2**20, "{:.1f}"),
        ratio(reaction.get("brake")),
        ratio(reaction.get("steer")),
    )
    times = COLUMNS.index("DiT ms"), COLUMNS.index("whole ms")
    return cells if cached else tuple(cell if i < 3 or i in times else "" for i, cell in enumerate(cells))


def _or_dash(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def published_row(published: Published) -> tuple[str, ...]:
    """The paper's figures in the order of `COLUMNS`; its LPIPS is not ST-LPIPS, and it times seconds."""
    return (
        published.split,
        "published",
        f"{published.psnr_db:.2f}",
        f"{published.ssim:.4f}",
        f"LPIPS {scientific(published.lpips)}",
        percent(published.skip),
        f"{1e3 * published.full_seconds:.0f} → {1e3 * published.cached_seconds:.0f}",
        "–",
        f"{published.speedup:.2f}×",
        "–",
        "–",
        "–",
        "–",
    )


def demo_rows(report: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """All rows of a demo report, each with its kind: "full", "cached" or "published"."""
    rows = []
    for scenario in report["scenarios"]:
        for policy in scenario["policies"]:
            rows.append(("cached" if policy["policy"] else "full", row(scenario["name"], policy)))
        if scenario["name"] in X_CACHE:
            rows.append(("published", published_row(X_CACHE[scenario["name"]])))
    return rows


def demo_table(report: dict[str, Any]) -> Table:
    """The paper's table with one's own figures and the published ones, for the terminal."""
    title = "Against full compute: same seed, actions, noise and committed windows"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("scenario", "policy") else "right", no_wrap=True)
    previous = None
    for kind, cells in demo_rows(report):
        if previous is not None and kind == "full":
            table.add_section()
        table.add_row(*cells, style={"published": "dim", "full": ""}.get(kind, "bold"))
        previous = kind
    return table


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
