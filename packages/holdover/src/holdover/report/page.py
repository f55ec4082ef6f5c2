"""The page of a run: ``index.html`` and ``plots/`` beside its videos. It opens from disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from holdover.report import tables
from holdover.report.bound import saved
from holdover.report.decisions import CATEGORIES, LETTERS, category, ribbon, skip_rate
from holdover.report.files import write_text
from holdover.report.run_dir import GAIN
from holdover.report.run_plots import Plot, draw_run, draw_scenario
from holdover.report.run_read import Recorded, read_run

#: What the categories of a decision mean.
LEGEND = {
    "computed": "computed: the gate or a guard asked for it",
    "reused": "reused, not computed",
    "anchor": "anchor: a block that is always computed",
    "protected": "KV-protected: what enters the KV cache is computed",
    "warm-up": "warm-up: there is nothing to reuse yet",
    "part": "computed in part: the frame that is shown, or some of the tokens",
    "held": "held window: the frame is right in the window in hand, and no pass ran",
}
_DIGITS = 6  # significant ones of a score


def build_page(run_dir: Path) -> tuple[Path, list[str]]:
    """Write ``index.html`` and ``plots/`` of a run's folder.

    Returns:
        The path of the page, and a line on each file of the run that is missing or damaged. The page shows the rest.

    Raises:
        FileNotFoundError: the folder holds no rollout.
    """
    rollouts, problems = read_run(run_dir)
    _check_report(run_dir, problems)
    by_scenario: dict[str, list[Recorded]] = {}
    for rollout in rollouts:
        by_scenario.setdefault(rollout.about.scenario, []).append(rollout)
    overall = draw_run(run_dir, rollouts, problems)
    scenarios = [_scenario(run_dir, name, found) for name, found in by_scenario.items()]
    page = (
        _environment()
        .get_template("page.html")
        .render(
            problems=problems,
            columns=tables.COLUMNS,
            measured_in=_measured_in(rollouts),
            rows=[row for scenario in by_scenario.values() for row in _rows(scenario)],
            plots=overall,
            scenarios=scenarios,
            reacted=any(rollout.about.figures.get("reaction") for rollout in rollouts),
            sources=list(dict.fromkeys(r.about.published["source"] for r in rollouts if "source" in r.about.published)),
            legend=[(LETTERS[name], LEGEND[name]) for name in CATEGORIES],
            made_by=_made_by(rollouts),
            data=_script_json({"gain": GAIN, "scenarios": [scenario["player"] for scenario in scenarios]}),
            report=(run_dir / "report.json").is_file(),
        )
    )
    path = run_dir / "index.html"
    write_text(path, page)
    return path, problems


def _rows(rollouts: Sequence[Recorded]) -> list[tuple[str, tuple[str, ...]]]:
    """The rows of one scenario in the table, each with its kind: "full", "cached" or "published"."""
    rows = []
    for about in (rollout.about for rollout in rollouts):
        if about.figures:
            rows.append(("cached" if about.policy else "full", tables.row(about.scenario, about.figures)))
    for about in (rollout.about for rollout in rollouts):
        if about.published:
            rows.append(("published", tables.published_row(about.scenario, about.published)))
    return rows


def _check_report(run_dir: Path, problems: list[str]) -> None:
    path = run_dir / "report.json"
    try:
        if path.is_file():
            json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        problems.append("report.json is damaged: it is not JSON; the page does not need it")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("holdover.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "decibels": tables.decibels,
        "percent": tables.percent,
        "ratio": tables.ratio,
        "scientific": tables.scientific,
        "enough": tables.enough,
    }
    environment.globals["source"] = lambda name: Markup(
        (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
    )
    return environment


def _scenario(run_dir: Path, name: str, rollouts: Sequence[Recorded]) -> dict[str, Any]:
    """What the template shows of a scenario; ``player`` is what its script needs."""
    plots: list[Plot] = draw_scenario(run_dir, name, rollouts)
    return {
        "name": name,
        "title": next((r.about.figures["drive"] for r in rollouts if "drive" in r.about.figures), name),
        "frames": max(r.frames for r in rollouts),
        "fps": rollouts[0].about.fps,
        "plots": plots,
        "simulated": any(r.about.figures.get("truth") for r in rollouts),
        "rollouts": [_shown(run_dir, r) for r in rollouts],
        "player": {"name": name, "rollouts": [_playable(run_dir, r) for r in rollouts]},
    }


def _shown(run_dir: Path, r: Recorded) -> dict[str, Any]:
    return {
        "name": r.about.name,
        "reference": r.about.reference,
        "policy": r.about.policy,
        "video": _video(run_dir, r, "video.mp4", r.video),
        "figures": r.about.figures,
    }


def _playable(run_dir: Path, r: Recorded) -> dict[str, Any]:
    return {
        "name": r.about.name,
        "reference": r.about.reference,
        "fps": r.about.fps,
        "frames": r.frames,
        "size": [r.canvas.width, r.canvas.height],
        "cameras": r.canvas.rects,
        "video": _video(run_dir, r, "video.mp4", r.video),
        "difference": _video(run_dir, r, "difference.mp4", r.difference),
        "chunks": _chunks(r),
        "ribbon": _ribbon(r),
    }


def _video(run_dir: Path, r: Recorded, name: str, whole: bool) -> str | None:
    return (r.folder / name).relative_to(run_dir).as_posix() if whole else None


def _chunks(r: Recorded) -> list[dict[str, Any]]:
    by_chunk: dict[int, list[Any]] = {}
    for decision in r.decisions or ():
        by_chunk.setdefault(decision.chunk, []).append(decision)
    rows, first = [], 0
    for g in r.chunks or ():
        found = by_chunk.get(g.chunk, [])
        rows.append(
            {
                "chunk": g.chunk,
                "first": first,
                "frames": g.frames,
                "ms": _short(1e3 * (g.seconds if g.dit_seconds is None else g.dit_seconds)),
                "action": None if g.action is None else [_short(a) for a in g.action],
                "skip": None if skip_rate(found) is None else saved(found).skip,  # None: warm-up, or no pass ran
            }
        )
        first += g.frames
    return rows


def _ribbon(r: Recorded) -> dict[str, Any] | None:
    """The decisions of each chunk, cell by cell, row by row; -1 for a cell without a decision."""
    if not r.decisions or not r.chunks:
        return None
    laid = ribbon(r.decisions)
    reasons = sorted({(d.reason, category(d)) for d in r.decisions})
    scores = sorted({name for d in r.decisions for name in d.scores})
    places = [(row, block) for row in range(len(laid.passes)) for block in range(laid.blocks)]
    number = {reason: i for i, reason in enumerate(reasons)}
    cells, values = [], []
    for g in r.chunks:
        found = [laid.cells.get(g.chunk, {}).get(place) for place in places]
        cells.append([-1 if d is None else number[d.reason, category(d)] for d in found])
        values.append([None if d is None or not d.scores else [_short(d.scores.get(n)) for n in scores] for d in found])
    return {
        "passes": laid.passes,
        "blocks": laid.blocks,
        "reasons": [{"reason": reason, "category": CATEGORIES.index(kind)} for reason, kind in reasons],
        "scores": scores,
        "cells": cells,
        "values": values,
    }


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{_DIGITS}g}")


def _measured_in(rollouts: Sequence[Recorded]) -> str:
    """The dtypes and processors of the rollouts, where they are known."""
    said = (r.about.environment for r in rollouts)
    told = [", ".join(str(each[key]) for key in ("dtype", "processor") if key in each) for each in said]
    return "; ".join(dict.fromkeys(filter(None, told)))


def _made_by(rollouts: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Every command, seed and environment once, with the rollouts that share it."""
    found: list[dict[str, Any]] = []
    for r in rollouts:
        made = {"command": r.about.command, "seed": r.about.seed, "environment": r.about.environment}
        same = next((entry for entry in found if entry["made"] == made), None)
        if same is None:
            same = {"made": made, "rollouts": []}
            found.append(same)
        same["rollouts"].append(f"{r.about.scenario} / {r.about.name}")
    return found


def _script_json(content: Any) -> Markup:
    """JSON that may stand in a script element."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))
