"""The plots of a run. Each has a picture, its numbers as CSV, and a caption for those who do not see it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover.report import plots
from holdover.report.bound import saved
from holdover.report.decisions import cosine_by_step_and_block, skip_by_block
from holdover.report.fidelity import STITCHED
from holdover.report.files import write_text
from holdover.report.run_dir import ChunkRecord
from holdover.report.run_read import Recorded
from holdover.report.tables import enough

_Curve = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot as the page shows it. ``png`` and ``csv`` are relative to the folder of the run."""

    title: str
    caption: str
    png: str
    csv: str


class Sketchbook:
    """The plots in ``run_dir/plots``."""

    def __init__(self, run_dir: Path, prefix: str) -> None:
        self._run_dir, self._prefix = run_dir, prefix
        self.plots: list[Plot] = []

    def add(self, name: str, title: str, caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
        """Add a plot and write its CSV. Returns the path for its picture."""
        png, table = (f"plots/{self._prefix}{name}.{suffix}" for suffix in ("png", "csv"))
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        write_text(self._run_dir / table, text.getvalue())
        self.plots.append(Plot(title=title, caption=caption, png=png, csv=table))
        return self._run_dir / png


def draw_scenario(run_dir: Path, scenario: str, rollouts: Sequence[Recorded]) -> list[Plot]:
    """Draw what the rollouts of one scenario allow."""
    book = Sketchbook(run_dir, f"{scenario}-")
    _psnr(book, {r.about.name: r for r in rollouts if r.errors})
    decided = {r.about.name: r for r in rollouts if r.decisions}
    if decided:
        _decisions(book, decided)
    chunks = {r.about.name: r.chunks for r in rollouts if r.chunks}
    if chunks:
        _times(book, rollouts, chunks)
    held = {name: [(g.bytes_held or 0) / 2**20 for g in made] for name, made in chunks.items() if _holds(made)}
    if held:
        path = book.add(
            "held",
            "Memory held",
            "MiB of tensors that the cache holds after each chunk.",
            ("rollout", "chunk", "mebibytes"),
            [(name, i, value) for name, values in held.items() for i, value in enumerate(values)],
        )
        plots.plot_chunks(path, {n: np.array(v) for n, v in held.items()}, label="MiB held")
    reactions = {r.about.name: r.about.figures["reaction"] for r in rollouts if _reacts(r)}
    if reactions:
        _reactions(
            book,
            {name: {event: [ratio] for event, ratio in of.items()} for name, of in reactions.items()},
            "How much of an abrupt action shows in its own chunk: 1 is right, 0 drives on unchanged.",
        )
    return book.plots


def draw_run(run_dir: Path, rollouts: Sequence[Recorded], problems: list[str]) -> list[Plot]:
    """Draw the plots of all scenarios together: speed against fidelity, and the curves of ``reaction.json``, if any.

    Adds a line to ``problems`` if ``reaction.json`` is damaged.
    """
    book = Sketchbook(run_dir, "run-")
    points: dict[str, list[tuple[str, float, float]]] = {}
    for r in rollouts:
        speedup, decibels = r.about.figures.get("speedup"), r.about.figures.get("stitched", {}).get("psnr_db")
        if r.about.reference and speedup is not None and decibels is not None and enough(r.about.figures):
            points.setdefault(r.about.name, []).append((r.about.scenario, speedup, decibels))
    if points:
        path = book.add(
            "front",
            "Speed against fidelity",
            "Each point is one policy in one scenario. Further up is closer to the reference, further right is faster.",
            ("rollout", "scenario", "speedup", "psnr_db"),
            [(name, *point) for name, of in points.items() for point in of],
        )
        plots.plot_front(path, points)
    path = run_dir / "reaction.json"
    if path.is_file():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            curves: dict[str, dict[str, Sequence[float | None]]] = {}
            for row in rows:
                curves.setdefault(row["policy"], {})[row["event"]] = [
                    None if value is None else float(value) for value in row["ratio_by_chunk"]
                ]
        except (ValueError, KeyError, TypeError):
            problems.append("reaction.json is damaged: its rows are not policy, event and ratio_by_chunk")
        else:
            _reactions(book, curves, "How much of an abrupt action shows, from its own chunk on: 1 is right.")
    return book.plots


def decibels(errors: _Curve) -> _Curve:
    """PSNR of each frame ``[T]`` from its mean squared error in units of 1/255; infinite for equal frames."""
    with np.errstate(divide="ignore"):
        values: _Curve = 10 * np.log10(255**2 / errors)
    return values


def _psnr(book: Sketchbook, compared: Mapping[str, Recorded]) -> None:
    curves = {name: {v: decibels(e) for v, e in (r.errors or {}).items()} for name, r in compared.items()}
    if not curves:
        return
    views = list(next(iter(curves.values())))
    path = book.add(
        "psnr",
        "PSNR per camera",
        f"PSNR of each frame against the reference, per camera and, in grey, {STITCHED}. Equal frames leave a gap.",
        ("rollout", "frame", *views),
        [
            (name, t, *(f"{of[view][t]:.6g}" if view in of else "" for view in views))
            for name, of in curves.items()
            for t in range(len(next(iter(of.values()))))
        ],
    )
    plots.plot_psnr(path, curves, fps=next(iter(compared.values())).about.fps)


def _decisions(book: Sketchbook, decided: Mapping[str, Recorded]) -> None:
    """What is known of single blocks; a slot without a name is the model as a whole."""
    of = {name: [d for d in r.decisions or () if d.role == "denoise" and d.slot] for name, r in decided.items()}
    of = {name: found for name, found in of.items() if found}
    if not of:
        return
    blocks = {name: max(d.block + 1 for d in found) for name, found in of.items()}
    skips = {name: skip_by_block(found, blocks[name]) for name, found in of.items()}
    path = book.add(
        "block-skip",
        "Skip per block",
        "The share of each block's calls that was reused.",
        ("rollout", "block", "skip"),
        [(name, b, value) for name, skip in skips.items() for b, value in enumerate(skip)],
    )
    plots.plot_block_skip(path, skips)
    maps = {
        name: cosine_by_step_and_block(found, max(d.index + 1 for d in found), blocks[name])
        for name, found in of.items()
        if any("cosine" in d.scores for d in found)
    }
    if maps:
        path = book.add(
            "cosine",
            "Cosine per step and block",
            "The mean cosine that the gate saw. Grey: a guard decided every time.",
            ("rollout", "step", "block", "cosine"),
            [(name, *at, value) for name, cosines in maps.items() for at, value in np.ndenumerate(cosines)],
        )
        plots.plot_cosine_maps(path, maps)


def _times(book: Sketchbook, rollouts: Sequence[Recorded], made: Mapping[str, tuple[ChunkRecord, ...]]) -> None:
    """The time of each chunk, and the least that its skip allows where the share of block time was measured."""
    curves = {name: np.array([1e3 * _seconds(g) for g in chunks]) for name, chunks in made.items()}
    bounds = {}
    for r in rollouts:
        about = r.about
        if r.chunks and r.decisions and about.block_share is not None and about.reference in curves:
            by_chunk: dict[int, list[Any]] = {}
            for d in r.decisions:
                by_chunk.setdefault(d.chunk, []).append(d)
            rest = 0.0 if about.pass_share is None else about.pass_share - about.block_share
            found = [saved(by_chunk.get(g.chunk, ())) for g in r.chunks]
            least = [1 - about.block_share * each.skip - rest * each.idle for each in found]
            bounds[about.name] = float(np.median(curves[about.reference])) * np.array(least)
    path = book.add(
        "time",
        "Time per chunk",
        "Milliseconds in the transformer if measured, else in all. Dotted: the least that what each chunk left out "
        "allows, from the median of the reference.",
        ("rollout", "chunk", "milliseconds", "bound_milliseconds"),
        [(n, i, v, bounds[n][i] if n in bounds else "") for n, values in curves.items() for i, v in enumerate(values)],
    )
    plots.plot_chunks(path, curves, label="ms", bounds=bounds)


def _reactions(book: Sketchbook, curves: Mapping[str, Mapping[str, Sequence[float | None]]], caption: str) -> None:
    rows = [(n, event, i, r) for n, by in curves.items() for event, ratios in by.items() for i, r in enumerate(ratios)]
    path = book.add("reaction", "Reaction", caption, ("rollout", "event", "chunks_later", "ratio"), rows)
    plots.plot_reactions(path, curves)


def _seconds(chunk: ChunkRecord) -> float:
    return chunk.seconds if chunk.dit_seconds is None else chunk.dit_seconds


def _holds(chunks: Sequence[ChunkRecord]) -> bool:
    return any(g.bytes_held is not None for g in chunks)


def _reacts(r: Recorded) -> bool:
    """Whether a reaction of this cached rollout was measured."""
    found = r.about.figures.get("reaction", {}) if r.about.policy else {}
    return any(ratio is not None for ratio in found.values())
