"""Holdover beside diffusers' own hooks and cache-dit: the same method, the same model, pass by pass in one process.

`make peers` installs cache-dit. The method is FBCache, which cache-dit calls DBCache with one computed block. The
models have random weights. Times are those of the code around the blocks. The counts tell which library serves the pass
that writes the KV cache from cache.
"""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress
from torch import nn

import holdover
from holdover.methods.fbcache import fbcache
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.report.tables import markdown
from holdover_world.cli.common import show
from holdover_world.measure.cards import about, write_card
from lab.cards import LAB, Out, run_script
from lab.peers_models import SUBJECTS, Subject, drift

#: The first passes are not counted: they warm up the process.
WARM_UP = 5
#: A threshold at which no pass is reused, and one at which all are. Not zero: cache-dit then takes no signal.
NEVER, ALWAYS = 1e-9, 1e9
#: The chunk loop: denoising passes of a chunk, before the pass over the clean latents; and chunks.
DENOISING, CHUNKS = 4, 12

#: The context of one pass, by its number and, in the chunk loop, its role.
Around = Callable[[int, str], AbstractContextManager[Any]]


def _unattached(model: Any, threshold: float) -> Around:
    return lambda index, role: nullcontext()


def _holdover(model: Any, threshold: float) -> Around:
    cache = holdover.attach(model, fbcache(threshold=threshold))
    steps = DENOISING + 1

    def around(index: int, role: str) -> AbstractContextManager[Any]:
        if role == "kv_update":
            return cache.step(chunk=index // steps, role="kv_update")
        return cache.step(chunk=index // steps, index=index % steps, num_steps=steps)

    return around


def _holdover_timed(model: Any, threshold: float) -> Around:
    """As `_holdover`, with all passes in one chunk: FBCache computes the first pass of each chunk."""
    cache = holdover.attach(model, fbcache(threshold=threshold))
    return lambda index, role: cache.step(chunk=0, index=index, num_steps=1_000_000)


def _diffusers(model: Any, threshold: float) -> Around:
    diffusers: Any = import_module("diffusers")
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    return lambda index, role: model.cache_context("cond")


def _cache_dit(model: Any, threshold: float) -> Around:
    cache_dit: Any = import_module("cache_dit")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=threshold,
        max_warmup_steps=0,
        num_inference_steps=1_000_000,
        enable_separate_cfg=False,
    )
    cache_dit.enable_cache(model, cache_config=config)
    return lambda index, role: nullcontext()


PEERS: dict[str, Callable[[Any, float], Around]] = {"diffusers": _diffusers, "cache-dit": _cache_dit}


def run_peers(out: Path, *, passes: int = 60, blocks: int = 30, progress: Progress) -> dict[str, Any]:
    """Time every subject under every library; writes ``peers.md`` and ``peers.json``.

    Args:
        passes: per subject and threshold; the first `WARM_UP` are not counted.
        blocks: of each model.

    Raises:
        ValueError: there are too few passes.
    """
    if passes <= WARM_UP:
        raise ValueError(f"passes={passes}: give more than the {WARM_UP} of warm-up")
    task = progress.add_task("peers", total=2 * len(SUBJECTS) + 1)
    rows = []
    for subject in SUBJECTS:
        for threshold in (NEVER, ALWAYS):
            rows += _race(subject, threshold, passes, blocks)
            progress.advance(task)
    served_passes = served(SUBJECTS[0], blocks)
    progress.advance(task)
    figures = {
        "passes": passes - WARM_UP,
        "blocks": blocks,
        "rows": rows,
        "served": served_passes,
        "chunks": CHUNKS,
        "environment": environment(),
    }
    write_card(out, "peers", card(figures), figures)
    return figures


def _attached(name: str, attach: Callable[[Any, float], Around], model: Any, threshold: float) -> Around | None:
    """A library on a model; None where a peer refuses the model. Holdover may not refuse it."""
    try:
        with _quiet():
            return attach(model, threshold)
    except (ValueError, NotImplementedError, AssertionError):  # cache-dit asserts what it supports
        if name not in PEERS:
            raise
        return None


@torch.no_grad()
def _race(subject: Subject, threshold: float, passes: int, blocks: int) -> list[dict[str, Any]]:
    """One pass of every library at a time. The order is drawn anew: a pass depends on what the last left in caches."""
    model = subject.make(blocks)
    libraries = {"unattached": _unattached, "holdover": _holdover_timed, **PEERS}
    runs: dict[str, tuple[nn.Module, Around]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}  # of passes, and outside of their blocks
    order = random.Random(0)
    with _clocked(type(model.get_submodule(f"{subject.blocks}.0"))) as blocks_clock:
        for name, attach in libraries.items():
            twin = copy.deepcopy(model)
            around = _attached(name, attach, twin, threshold)
            if around is not None:
                runs[name], seconds[name] = (twin, around), []
        for index, latents in zip(range(passes), drift(), strict=False):
            given = subject.inputs(latents, 500.0)
            for name in order.sample(list(runs), len(runs)):
                twin, around = runs[name]
                with _quiet():
                    blocks_clock.seconds, started = 0.0, perf_counter()
                    with around(index, "denoise"):
                        twin(**given, return_dict=False)
                    whole = perf_counter() - started
                    seconds[name].append((whole, whole - blocks_clock.seconds))
    bare, bare_outside = np.array(seconds["unattached"][WARM_UP:]).T
    rows = [{"model": subject.name, "reuse": threshold == ALWAYS, "library": name} for name in libraries]
    for row in rows:
        if row["library"] not in runs:
            continue
        taken, outside = np.array(seconds[str(row["library"])][WARM_UP:]).T
        row |= {"ms": 1e3 * float(np.median(taken)), "ratio": float(np.median(taken / bare))}
        row |= {"outside_us": 1e6 * float(np.median(outside - bare_outside))}
    return rows


@dataclass
class _Clock:
    seconds: float = 0.0


@contextmanager
def _clocked(kind: type[nn.Module]) -> Iterator[_Clock]:
    """Adds up the time within every forward of a class of blocks."""
    clock, forward = _Clock(), kind.forward

    @functools.wraps(forward)
    def clocked(*args: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        output = forward(*args, **kwargs)
        clock.seconds += perf_counter() - started
        return output

    kind.forward = clocked
    try:
        yield clock
    finally:
        kind.forward = forward


@torch.no_grad()
def served(subject: Subject, blocks: int) -> dict[str, int | None]:
    """How many passes over clean latents each library serves from cache; None where it refuses the model."""
    counts: dict[str, int | None] = {}
    for name, attach in {"holdover": _holdover, **PEERS}.items():
        model = subject.make(blocks)
        ran = [0]
        last = list(model.get_submodule(subject.blocks).children())[-1].get_submodule("ffn")
        around = _attached(name, attach, model, ALWAYS)
        if around is None:
            counts[name] = None
            continue
        last.register_forward_hook(lambda *_, ran=ran: ran.__setitem__(0, ran[0] + 1))
        served = 0
        for index, latents in zip(range(CHUNKS * (DENOISING + 1)), drift(), strict=False):
            clean = index % (DENOISING + 1) == DENOISING
            before = ran[0]
            with _quiet(), around(index, "kv_update" if clean else "denoise"):
                model(**subject.inputs(latents, 0.0 if clean else 500.0), return_dict=False)
            served += clean and ran[0] == before
        counts[name] = served
    return counts


@contextmanager
def _quiet() -> Iterator[None]:
    """The peers warn about thresholds and loops that are deliberate here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    rows = []
    for row in figures["rows"]:
        measured = "ms" in row
        rows.append(
            (
                f"`{row['model']}`",
                "all" if row["reuse"] else "none",
                row["library"],
                f"{row['ms']:.2f}" if measured else "refuses",
                f"{100 * (row['ratio'] - 1):+.1f} %" if measured else "",
                f"{row['outside_us']:+.0f}" if measured else "",
            )
        )
    columns = "model", "reused", "library", "ms per pass", "against unattached", "µs outside the blocks"
    served = [
        (name, "refuses" if count is None else f"{count} of {figures['chunks']}")
        for name, count in figures["served"].items()
    ]
    return f"""# Beside diffusers' own hooks and cache-dit

FBCache in each library on the same model of {figures["blocks"]} blocks with random weights, {figures["passes"]} passes
after the warm-up, all libraries interleaved pass by pass in one process. Times are medians. "Against unattached" and
the microseconds outside the blocks, which are the library's own, are medians of paired passes.

{markdown(columns, rows)}
A loop of {DENOISING} denoising passes and one pass over the clean latents, at a threshold at which everything that may
be reused is reused. In a chunk-causal model the clean pass writes the KV cache. The table counts how many clean passes
are served from cache.

{markdown(("library", "clean passes served from cache"), served)}
{about(figures["environment"])}
"""


def main(
    out: Out = LAB,
    passes: Annotated[
        int, typer.Option(help=f"Of each model under each library; the first {WARM_UP} are warm-up.")
    ] = 60,
    blocks: Annotated[int, typer.Option(help="Of each model; their weights are random.")] = 30,
) -> None:
    """FBCache beside diffusers' own hooks and cache-dit, on models of diffusers: what each library costs."""
    with bar() as progress:
        figures = run_peers(out, passes=passes, blocks=blocks, progress=progress)
    show(out / "peers.md", figures)


if __name__ == "__main__":
    run_script(main)
