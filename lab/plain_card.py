"""The results of the plain cadence as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdover.report.tables import decibels, markdown, ratio, scientific
from holdover_world.measure.cards import about

#: A run is as near to the simulator as four passes if it is no farther by more than so many dB, at any horizon.
NEAR_DB = 0.1
#: A response that counts as right.
RESPONSE = 0.99


def card(figures: Mapping[str, Any]) -> str:
    """The Markdown of a result."""
    seconds, dtype = figures["chunks"] / 3, figures["environment"].get("dtype", "an unknown dtype")
    parts = [
        f"""# The plain cadence

The shipped world model in {dtype}, {figures["chunks"]} chunks ({seconds:.0f} seconds) of each scripted drive.
Every chunk denoises one latent frame in four passes and commits it in a clean pass. All runs of a heat are interleaved,
beside full compute; each heat is compared with its own. "Hold" is `step_hold` with these passes held;
"light_interaction" goes by the overlap of a camera that looks ahead; the others are choices of the loop: fewer steps,
and the last pass's keys and values in place of a clean pass.

Passes are those computed per chunk, the writing one included. DiT and end to end are speed-ups against four passes,
medians. The bound is what the passes that are left allow; denoising passes take
{100 * figures["denoising_share"]:.0f} % of the DiT's time. PSNR is of the stitched view against four passes; first and
last are those of the first and last five seconds. Against the simulator: PSNR from the start over the seconds named,
ST-LPIPS in the half second before, and the Fréchet distance of all cameras' pictures in a span, beside that between
halves of the simulator's. Detail is the mean difference of neighbouring pixels. Brake, steer and lane change are
response ratios in the event's own chunk.

![speed against fidelity](plain.png)
"""
    ]
    parts.append(_verdicts(figures["drives"]))
    for drive in figures["drives"]:
        rows = drive["rows"]
        parts += [
            f"## {drive['name']}, {drive['layout']}\n",
            markdown(_SPEED, [_speed(row) for row in rows]),
            _truth(rows),
        ]
    return "\n".join([*parts, about(figures["environment"])]) + "\n"


_SPEED = (
    "run",
    "passes",
    "DiT ms",
    "DiT",
    "bound",
    "of bound",
    "end to end",
    "its bound",
    "PSNR",
    "first",
    "last",
    "SSIM",
    "brake",
    "steer",
    "lane change",
)


def _speed(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        f"{_passes(row):.2f}",
        f"{row['dit_ms']:.0f}",
        f"{row['speedup']:.2f}×",
        f"{row['bound']:.2f}×",
        f"{100 * row['speedup'] / row['bound']:.0f} %",
        f"{row['end_to_end_speedup']:.2f}×",
        f"{row['end_to_end_bound']:.2f}×",
        *(decibels(row[name]) for name in ("psnr_db", "psnr_db_first", "psnr_db_last")),
        f"{row['ssim']:.4f}",
        *(ratio(row["reaction"][event]) for event in ("brake", "steer", "lane_change")),
    )


def _passes(row: Mapping[str, Any]) -> float:
    return float(row["passes"]["denoising"] + row["passes"]["writing"])


def _truth(rows: Sequence[Mapping[str, Any]]) -> str:
    """Four passes and the others, against the simulator and by horizon."""
    horizons = list(rows[0]["truth_db_by_horizon"])
    spans = ["–".join(map(str, span["seconds"])) for span in rows[0]["frechet"]]
    columns = (
        "run",
        *(f"simulator {seconds} s" for seconds in horizons),
        *(f"four passes {seconds} s" for seconds in horizons),
        *(f"ST-LPIPS {seconds} s" for seconds in horizons),
        *(f"Fréchet {span} s" for span in spans),
        "detail",
    )
    cells = [
        (
            row["name"],
            *(decibels(row["truth_db_by_horizon"][seconds]) for seconds in horizons),
            *(decibels(row["psnr_db_by_horizon"][seconds]) for seconds in horizons),
            *(f"{row['lpips_by_horizon'][seconds]:.3f}" for seconds in horizons),
            *(scientific(span["frechet"]) for span in row["frechet"]),
            f"{row['detail']:.2f}",
        )
        for row in rows
    ]
    halves = ["simulator, halves", *[""] * (3 * len(horizons))]
    halves += [scientific(span["simulator"]) for span in rows[0]["frechet"]]
    return markdown(columns, [*cells, (*halves, "")])


def _verdicts(drives: Sequence[Mapping[str, Any]]) -> str:
    """What four passes are worth, and where a run is farther from the simulator or slower to react than they are."""
    lines = ["## What four passes are worth\n"]
    for drive in drives:
        full, others = drive["rows"][0], drive["rows"][1:]
        gains = [(row, _gain(row, full)) for row in others]
        best = max(gains, key=lambda each: each[1])
        one = next((each for each in gains if each[0]["name"] == "1 step"), None)
        horizon = list(full["truth_db_by_horizon"])[-1]
        told = f"- {drive['name']}, {drive['layout']}: four passes {full['truth_db_by_horizon'][horizon]:.2f} dB"
        told += f" from the simulator over {horizon} s"
        if one is not None:
            told += f", one step {one[0]['truth_db_by_horizon'][horizon]:.2f}"
            told += f" (detail {one[0]['detail']:.2f} instead of {full['detail']:.2f})"
        lines.append(f"{told}; nearest of all: {best[0]['name']}, by {best[1]:+.2f} dB.")
    lines.append(
        "\nNo farther from the simulator than four passes by more than 0.1 dB at any horizon, responses 0.99 or"
    )
    lines.append("more, unless it says so here:\n")
    for drive in drives:
        full = drive["rows"][0]
        for row in drive["rows"][1:]:
            faults = _faults(row, full)
            if faults:
                lines.append(f"- {drive['name']}, {drive['layout']}, {row['name']}: {', '.join(faults)}.")
    return "\n".join([*lines, ""])


def _gain(row: Mapping[str, Any], full: Mapping[str, Any]) -> float:
    """How much nearer to the simulator than full compute over the longest horizon, in dB."""
    horizon = list(full["truth_db_by_horizon"])[-1]
    return float(row["truth_db_by_horizon"][horizon] - full["truth_db_by_horizon"][horizon])


def _faults(row: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    faults = [
        f"{full['truth_db_by_horizon'][seconds] - value:.2f} dB farther over {seconds} s"
        for seconds, value in row["truth_db_by_horizon"].items()
        if full["truth_db_by_horizon"][seconds] - value > NEAR_DB
    ]
    faults += [
        f"{event.replace('_', ' ')} {value:.3f}"
        for event, value in row["reaction"].items()
        if value is not None and value < RESPONSE
    ]
    return faults
