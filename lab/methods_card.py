"""The methods' results as Markdown."""

from __future__ import annotations

from typing import Any

from holdover.report.tables import decibels, markdown, percent, scientific
from holdover_world.measure.cards import about
from holdover_world.measure.fidelity import FAR

_COLUMNS = (
    "method",
    "PSNR",
    "SSIM",
    "ST-LPIPS",
    "depth",
    "FULL",
    "skip",
    "DiT",
    "bound",
    "end to end",
    "MiB held",
    "interval: skip",
    "its PSNR",
    "its DiT",
    "gain",
)

_FEW = """Both cadences are driven. `window` generates a window of four pieces once for each piece, with the same noise,
and every method computes in full the chunk whose window is committed. `plain` generates and commits each piece once, so
a method's errors enter the KV cache."""

_MANY = """Methods that reuse from step to step run in the plain cadence, which commits every piece, so their errors
enter the KV cache. Methods that reuse from chunk to chunk run in the window cadence, in which they compute in full the
chunk whose window is committed."""

_NOISE = """The sampler draws new noise at every step, so inputs change far more from step to step than in samplers
without noise, for which thresholds are published. Only looser thresholds are tried here."""

_FLOW = """The sampler takes Euler steps, without new noise. Published thresholds stand beside looser ones."""


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    steps, seconds = figures["steps"], figures["chunks"] / 3
    parts = [
        f"""# Every method, {steps} steps

The shipped world model on urban driving, {figures["chunks"]} chunks ({seconds:.1f} seconds).
{_FEW if steps == 4 else _MANY}

PSNR, SSIM and ST-LPIPS are of the stitched view against the uncached output of the same seed and cadence, over all
chunks; SSIM and ST-LPIPS are taken of every {figures["every"]}th frame; depth is the mean relative error of depth
nearer than {FAR:g} m. The other columns leave the first cycle out.
FULL counts the passes per chunk, of {steps}, in which everything was computed. Skip is the share of calls that were
not: calls of blocks, of attention modules and MLPs, or of the model. DiT and end to end are speed-ups, medians of whole
cycles against full compute in the same race. The bound is what Amdahl's law allows the DiT for that skip. ToCa's calls
in which only a share of the tokens was computed count as skipped. Beside each method stands the fixed interval along
its own axis, over steps or over chunks, with as many FULL passes, interpolated between the intervals with the next
fewer and the next more; gain is the method's PSNR minus the interval's.

{_NOISE if steps == 4 else _FLOW} `calibrated` settings were measured on another clip
with another seed.

![speed against fidelity](methods-{steps}.png)
"""
    ]
    for cadence, result in figures["cadences"].items():
        parts += [
            f"## {cadence} cadence\n",
            f"Full compute takes {result['full_dit_ms']:.0f} ms in the DiT per chunk.\n",
            markdown(_COLUMNS, [_row(row) for row in result["rows"]]),
            verdict(result["rows"]),
        ]
    parts += ["## Left out\n", *(f"- `{name}` {reason}." for name, reason in figures["left_out"].items()), ""]
    return "\n".join([*parts, about(figures["environment"])]) + "\n"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    control = row["control"]
    beside = ("",) * 4
    if control:
        beside = (
            percent(control["skip"]),
            decibels(control["psnr_db"]),
            f"{control['speedup']:.2f}×",
            "–" if control["gain_db"] is None else f"{control['gain_db']:+.2f}",
        )
    return (
        f"`{row['name']}`",
        decibels(row["psnr_db"]),
        f"{row['ssim']:.4f}",
        scientific(row["lpips"]),
        percent(row["depth"]["abs_rel"]) if row["depth"] else "",
        f"{row['full_per_chunk']:.2f}",
        percent(row["skip"]),
        f"{row['speedup']:.2f}×",
        "–" if row["speedup_bound"] is None else f"{row['speedup_bound']:.2f}×",
        f"{row['end_to_end_speedup']:.2f}×",
        f"{row['bytes_held'] / 2**20:.1f}",
        *beside,
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """Which methods beat the interval with as many FULL passes."""
    found: dict[str, list[str]] = {title: [] for title in VERDICTS}
    for row in rows:
        if (control := row["control"]) is not None and control["gain_db"] is not None:
            found[_judge(control["gain_db"], row["skip"] - control["skip"])].append(f"`{row['name']}`")
    head = "Against the fixed interval with as many FULL passes:\n"
    return "\n".join([head, *(f"- {title}: {', '.join(names) or 'none'}" for title, names in found.items()), ""])


VERDICTS = ("better", "better, but skips less in the other passes", "equal within 0.01 dB", "worse")


def _judge(gain_db: float, skips_more: float) -> str:
    better, less, equal, worse = VERDICTS
    if abs(gain_db) < 0.01:
        return equal
    if gain_db < 0:
        return worse
    return better if skips_more > -0.01 else less
