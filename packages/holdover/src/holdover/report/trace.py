"""The decisions of a run in the terminal, as a table, and as a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
from rich.console import Console
from rich.table import Table
from rich.text import Text

from holdover.decision import Decision
from holdover.report.decisions import CATEGORIES, LETTERS, category, ribbon, skip_rate
from holdover.report.files import whole, write_json
from holdover.report.run_dir import ChunkRecord, decision_table, write_table
from holdover.report.run_read import Recorded
from holdover.report.tables import percent

_arrow: Any = pyarrow
_csv: Any = pyarrow.csv

SUFFIXES = (".parquet", ".csv", ".json")
STYLES = {
    "computed": "dark_orange3",
    "reused": "green",
    "anchor": "grey50",
    "protected": "blue",
    "warm-up": "magenta",
    "part": "yellow3",
    "held": "cyan",
}
#: Colour names of chrome://tracing. Perfetto colours a slice by its name, which is its reason.
_CHROME = {
    "computed": "bad",
    "reused": "good",
    "anchor": "grey",
    "protected": "vsync_highlight_color",
    "warm-up": "yellow",
    "part": "bad",
    "held": "good",
}
#: In the trace a reused block is drawn this long, as a share of a computed one, so that it can be seen.
_REUSED_WIDTH = 0.1


def print_ribbons(rollouts: Sequence[Recorded], console: Console) -> None:
    """Print every chunk of every rollout: one coloured letter for each block of each step."""
    console.print(*(Text(f"{LETTERS[name]} {name} ", STYLES[name]) for name in CATEGORIES))
    for rollout in _decided(rollouts):
        decisions = rollout.decisions or ()
        console.print(f"\n{rollout.about.scenario} / {rollout.about.name}: {percent(skip_rate(decisions))} skipped")
        laid = ribbon(decisions)
        wide = len(laid.passes) * (laid.blocks + 1) + 12 > console.width
        for chunk, cells in laid.cells.items():
            line = Text(f"{chunk:5} ")
            for row in range(len(laid.passes)):
                line.append("\n      " if wide and row else " ")
                for block in range(laid.blocks):
                    decision = cells.get((row, block))
                    kind = category(decision) if decision else None
                    line.append(LETTERS[kind] if kind else " ", STYLES[kind] if kind else "")
            console.print(line, soft_wrap=True)


def print_chunk(rollouts: Sequence[Recorded], chunk: int, console: Console) -> None:
    """Print every decision of one chunk with its reason and scores.

    Raises:
        ValueError: no rollout has such a chunk.
    """
    found = [(r, [d for d in r.decisions or () if d.chunk == chunk]) for r in _decided(rollouts)]
    if not any(decisions for _, decisions in found):
        raise ValueError(f"chunk={chunk}: no decision was recorded for it; leave it out to see all chunks")
    for rollout, decisions in found:
        scores = sorted({name for d in decisions for name in d.scores})
        table = Table("role", "branch", "step", "block", "reason", *scores, title_justify="left")
        table.title = f"{rollout.about.scenario} / {rollout.about.name}, chunk {chunk}"
        for d in decisions:
            values = (f"{d.scores[name]:.6g}" if name in d.scores else "" for name in scores)
            reason = Text(d.reason, STYLES[category(d)])
            table.add_row(d.role, d.branch, str(d.index), str(d.block), reason, *values)
        console.print(table)


def export(rollouts: Sequence[Recorded], path: Path) -> None:
    """Write the decisions to a file: ``.parquet`` or ``.csv``, a row each, or ``.json``, a Chrome trace.

    Raises:
        ValueError: the suffix is another.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} does not end in {', '.join(SUFFIXES)}; name the format by the suffix")
    decided = list(_decided(rollouts))
    if path.suffix == ".json":
        write_json(path, {"traceEvents": list(_events(decided)), "displayTimeUnit": "ms"})
        return
    tables = []
    for rollout in decided:
        table = decision_table(rollout.decisions or ())
        for column, value in (("rollout", rollout.about.name), ("scenario", rollout.about.scenario)):
            table = table.add_column(0, column, [[value] * len(table)])
        tables.append(table)
    joined = _arrow.concat_tables(tables, promote_options="default")
    if path.suffix == ".parquet":
        write_table(path, joined)
    else:
        with whole(path) as partial:
            _csv.write_csv(joined, partial)


def _decided(rollouts: Sequence[Recorded]) -> Iterator[Recorded]:
    """Rollouts with decisions.

    Raises:
        ValueError: there is none.
    """
    found = [rollout for rollout in rollouts if rollout.decisions]
    if not found:
        raise ValueError("no rollout has decisions; record one with a cache")
    yield from found


def _events(rollouts: Sequence[Recorded]) -> Iterator[dict[str, Any]]:
    """Chrome trace events. A rollout is a process; a chunk holds its passes, a pass its blocks.

    The times of chunks are measured. The times of single blocks are not: computed blocks share the time of their chunk
    equally, and a reused block is drawn a tenth as long.
    """
    for pid, rollout in enumerate(rollouts):
        name = f"{rollout.about.scenario} / {rollout.about.name}"
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        by_chunk: dict[int, list[Decision]] = {}
        for decision in rollout.decisions or ():
            by_chunk.setdefault(decision.chunk, []).append(decision)
        known = {record.chunk: record for record in rollout.chunks or ()}
        start = 0.0
        for chunk, decisions in by_chunk.items():
            record = known.get(chunk, ChunkRecord(chunk=chunk, frames=0, seconds=1e-3 * len(decisions)))
            length = 1e6 * record.seconds
            args = {"action": list(record.action or ()), "skip": skip_rate(decisions)}
            yield _slice(pid, f"chunk {chunk}", start, length, args)
            yield from _passes(pid, decisions, start, length)
            start += length


def _passes(pid: int, decisions: Sequence[Decision], start: float, length: float) -> Iterator[dict[str, Any]]:
    weights = [1.0 if d.computed else _REUSED_WIDTH for d in decisions]
    unit = length / sum(weights)
    passes: dict[tuple[str, str, int], list[tuple[Decision, float]]] = {}
    for decision, weight in zip(decisions, weights, strict=True):
        passes.setdefault((decision.role, decision.branch, decision.index), []).append((decision, weight * unit))
    for (role, branch, index), blocks in passes.items():
        name = f"step {index}" if role == "denoise" else role.replace("_", " ")
        yield _slice(pid, f"{branch} {name}".strip(), start, sum(width for _, width in blocks), {})
        for decision, width in blocks:
            args = {"block": decision.block, "slot": decision.slot, **decision.scores}
            yield {**_slice(pid, decision.reason, start, width, args), "cname": _CHROME[category(decision)]}
            start += width


def _slice(pid: int, name: str, start: float, length: float, args: dict[str, Any]) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    return {"ph": "X", "name": name, "cat": "cache", "pid": pid, "tid": 0, "ts": start, "dur": length, "args": args}
