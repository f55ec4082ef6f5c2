"""The ablation's results as Markdown."""

from __future__ import annotations

from typing import Any

from holdover.report.tables import decibels, markdown, percent, ratio, scientific
from holdover_world.measure.cards import about
from holdover_world.measure.figures import HORIZONS

_COLUMNS = (
    "run",
    "PSNR",
    "SSIM",
    "ST-LPIPS",
    "skip",
    "DiT ms",
    "speed-up",
    "bound",
    "first",
    "last",
    "committed as shown",
    "brake",
    "steer",
    "lane change",
)
#: The runs whose PSNR is shown window by window.
_BY_WINDOW = (
    "default",
    "commit last full",
    "commit emitted",
    "commit emitted − KV protection",
    "last protected",
    "reactive",
)


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    parts = [_head(figures)]
    for scenario in figures["ablation"]:
        rows = scenario["rows"]
        parts += [f"## {scenario['name']}\n", markdown(_COLUMNS, [_row(row) for row in rows]), _windows(rows)]
    parts += [_control_head(), *(_control(scenario) for scenario in figures["control"]), about(figures["environment"])]
    return "\n".join(parts) + "\n"


def _head(figures: dict[str, Any]) -> str:
    seconds = figures["chunks"] / 3
    return f"""# X-Cache, part by part

The shipped world model, {figures["chunks"]} chunks ({seconds:.0f} seconds), all runs interleaved. PSNR, SSIM
and ST-LPIPS are of the stitched view against full compute *of the same cadence that commits the same windows*; SSIM and
ST-LPIPS are taken of every {figures["every"]}th frame. "Committed as shown" is the PSNR of what entered the KV cache
against what had been shown. First and last are the PSNR of the windows of at least five seconds at either end. Brake,
steer and lane change are response ratios in the event's own chunk (1 is right).
`default` is X-Cache with the paper's settings: floor 0.97, first chunk of a cycle protected and committed.
"""


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    if row["policy"] is None:
        return (row["name"], "reference", "", "", "", f"{row['dit_ms_per_chunk']:.0f}", *[""] * 8)
    return (
        row["name"],
        decibels(row["stitched"]["psnr_db"]),
        f"{row['stitched']['ssim']:.4f}",
        scientific(row["stitched"]["lpips"]),
        percent(row["skip"]),
        f"{row['dit_ms_per_chunk']:.0f}",
        f"{row['speedup']:.2f}×",
        f"{row['speedup_bound']:.2f}×",
        decibels(row["psnr_db_first"]),
        decibels(row["psnr_db_last"]),
        decibels(row["committed_as_emitted_db"]),
        *(ratio(row["reaction"][event]) for event in ("brake", "steer", "lane_change")),
    )


def _windows(rows: list[dict[str, Any]]) -> str:
    followed = [row for row in rows if row["name"] in _BY_WINDOW]
    count = max(len(row["psnr_db_by_window"]) for row in followed)
    columns = ["PSNR by window", *(str(i + 1) for i in range(count))]
    cells = [(row["name"], *map(_short, row["psnr_db_by_window"])) for row in followed]
    return markdown(columns, cells)


def _short(value: float | None) -> str:
    return "equal" if value is None else f"{value:.0f}"


def _control_head() -> str:
    return """## The control: one piece per chunk

The window cadence generates four overlapping windows for four pieces. X-Cache saves part of that work. The plain
cadence does not do it: it generates each piece once, with a quarter of the tokens, and reacts just as fast. PSNR here
is against the simulator under the same actions, from the start of the drive over the seconds named.
"""


def _control(scenario: dict[str, Any]) -> str:
    columns = (scenario["name"], "DiT ms", "whole ms", *(f"{s} s" for s in HORIZONS), "SSIM", "brake", "steer")
    rows = []
    for row in scenario["rows"]:
        truth = row["truth"]
        horizons = truth["psnr_db_by_horizon"]
        rows.append(
            (
                row["name"],
                f"{row['dit_ms_per_chunk']:.0f}",
                f"{row['end_to_end_ms_per_chunk']:.0f}",
                *(decibels(horizons[str(s)]) if str(s) in horizons else "–" for s in HORIZONS),
                f"{truth['ssim']:.3f}",
                ratio(row["reaction"]["brake"]),
                ratio(row["reaction"]["steer"]),
            )
        )
    return markdown(columns, rows)
