"""The demo's figures as lines and as a table, beside those of the X-Cache paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdover.report.tables import (
    COLUMNS,
    FEWEST,
    decibels,
    enough,
    milliseconds,
    percent,
    published_row,
    row,
    scientific,
    speed,
)
from holdover_world.measure.published import X_CACHE


def published_figures(scenario: str) -> Mapping[str, str]:
    """The paper's figures for a scenario, as text for each column, and their source. Empty if the paper has none.

    The paper gives LPIPS, not ST-LPIPS. Its times are of the DiT, with full compute and with X-Cache.
    """
    if scenario not in X_CACHE:
        return {}
    published = X_CACHE[scenario]
    return {
        "scenario": published.split,
        "PSNR": f"{published.psnr_db:.2f}",
        "SSIM": f"{published.ssim:.4f}",
        "ST-LPIPS": f"LPIPS {scientific(published.lpips)}",
        "skip": percent(published.skip),
        "DiT ms": f"{1e3 * published.full_seconds:.0f} → {1e3 * published.cached_seconds:.0f}",
        "speed-up": f"{published.speedup:.2f}×",
        "source": "the X-Cache paper (arXiv 2604.20289), with its own model of 30 blocks, LPIPS instead of ST-LPIPS, "
        "and seconds on its GPU given as milliseconds",
    }


def result_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A line on each drive of ``report.json``, its fastest recipe first, and what the lines leave unsaid."""
    dtype = report["environment"]["dtype"]
    few = False
    for drive in report["scenarios"]:
        parts = []
        for figures in drive["policies"]:
            few |= not enough(figures)
            if figures["policy"] is None:
                parts.append(f"full compute {milliseconds(figures, 'dit_ms_per_chunk')} ms a chunk")
            else:
                picture = figures["stitched"]["psnr_db"]
                at = "equal pictures" if picture is None else f"{decibels(picture)} dB"
                parts.append(f"{figures['name']} {speed(figures)}, {at}, {percent(figures['skip'])} skipped")
        yield f"{drive['title']}, {dtype}: {'; '.join(parts)}"
    if any("step_hold" in figures["name"] for drive in report["scenarios"] for figures in drive["policies"]):
        yield "step_hold holds passes of committed chunks as well."
    if few:
        yield f"No times: fewer than {FEWEST} cycles of a drive were timed. Give more --chunks."


def demo_table(report: Mapping[str, Any]) -> Table:
    """The figures of ``report.json`` and the published ones, for the terminal."""
    title = (
        f"In {report['environment']['dtype']}, against full compute that is told the same, with the same seed, noise "
        "and committed windows. In brackets: the middle half of the timed cycles."
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("scenario", "policy") else "right", no_wrap=True)
    for drive in report["scenarios"]:
        for figures in drive["policies"]:
            table.add_row(*row(drive["title"], figures), style="bold" if figures["policy"] else "")
        published = published_figures(drive["scenario"])
        if published:
            table.add_row(*published_row(drive["title"], published), style="dim")
        table.add_section()
    return table
