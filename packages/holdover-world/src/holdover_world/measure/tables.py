"""The demo's figures as a table, beside those of the X-Cache paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from holdover.report.tables import COLUMNS, percent, published_row, row, scientific
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


def demo_table(report: Mapping[str, Any]) -> Table:
    """The figures of ``report.json`` and the published ones, for the terminal."""
    title = "Against full compute: same seed, actions, noise and committed windows"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("scenario", "policy") else "right", no_wrap=True)
    for number, (style, cells) in enumerate(_rows(report)):
        if number and not style:
            table.add_section()
        table.add_row(*cells, style=style)
    return table


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The rows with their styles: full compute is plain, cached runs are bold, published figures are dim."""
    for scenario in report["scenarios"]:
        for policy in scenario["policies"]:
            yield "bold" if policy["policy"] else "", row(scenario["name"], policy)
        published = published_figures(scenario["name"])
        if published:
            yield "dim", published_row(scenario["name"], published)
