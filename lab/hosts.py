"""Holdover beside diffusers' own hooks and cache-dit: the same method, the same model, pass by pass in one process.

The method is FBCache (cache-dit calls it DBCache with one block computed). Weights are random: what is timed is the
machinery around the blocks, and who serves the pass that writes the KV cache from cache.
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
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

import holdover
from holdover.methods.fbcache import fbcache
from holdover.report.tables import markdown
from holdover_world.measure.measure import environment
from lab.cards import about, write_card

#: Passes left out: they warm up the process.
WARM_UP = 5
#: A threshold under which no pass is reused, and one under which all are. Not zero: cache-dit then takes no signal.
NEVER, ALWAYS = 1e-9, 1e9
#: The chunk loop: this many denoising passes, then one over the clean latents.
DENOISING, CHUNKS = 4, 12

FRAMES, ROWS, COLUMNS, TEXT = 3, 8, 12, 16


@dataclass(frozen=True)
class Subject:
    """A class of diffusers: where its blocks are, how it is made for a number of them, the arguments of a pass."""

    name: str
    blocks: str
    config: Callable[[int], dict[str, Any]]
    inputs: Callable[[Tensor, float], dict[str, Any]]

    def make(self, blocks: int) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(import_module("diffusers"), self.name)(**self.config(blocks))
        return model.eval().requires_grad_(False)


def _wan(blocks: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "num_layers": blocks}
    return {**sizes, "in_channels": 16, "out_channels": 16, "text_dim": 64, "freq_dim": 64, "rope_max_seq_len": 64}


def _wide(blocks: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": blocks}
    return {**sizes, "in_channels": 16, "out_channels": 16}


def _text(width: int = 64) -> Tensor:
    return torch.linspace(-1, 1, TEXT * width).reshape(1, TEXT, width)


SUBJECTS = (
    Subject(
        "WanTransformer3DModel",
        "blocks",
        _wan,
        lambda x, t: {"hidden_states": x, "timestep": torch.tensor([t]), "encoder_hidden_states": _text()},
    ),
    Subject(
        "LTXVideoTransformer3DModel",
        "transformer_blocks",
        lambda blocks: {**_wide(blocks), "cross_attention_dim": 128, "caption_channels": 64},
        lambda x, t: {
            "hidden_states": x[..., ::2, ::2].flatten(2).transpose(1, 2),
            "encoder_hidden_states": _text(),
            "timestep": torch.tensor([t]),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "num_frames": FRAMES,
            "height": ROWS,
            "width": COLUMNS,
        },
    ),
    Subject(
        "MochiTransformer3DModel",
        "transformer_blocks",
        lambda blocks: {
            **_wide(blocks),
            "pooled_projection_dim": 64,
            "text_embed_dim": 64,
            "max_sequence_length": TEXT,
        },
        lambda x, t: {
            "hidden_states": x,
            "encoder_hidden_states": _text(),
            "timestep": torch.tensor([t]),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
    ),
)

#: Around one pass: its number and, in the chunk loop, its role.
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
    """As above, all passes in one chunk: FBCache would compute the first of each."""
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


def run_hosts(out: Path, *, passes: int = 60, blocks: int = 30, progress: Progress) -> dict[str, Any]:
    """Time every subject under every library; writes ``hosts.md`` and ``hosts.json``.

    Args:
        passes: per subject and threshold; the first `WARM_UP` are not counted.
        blocks: of each model.

    Raises:
        ValueError: there are too few passes.
    """
    if passes <= WARM_UP:
        raise ValueError(f"passes={passes}: give more than the {WARM_UP} of warm-up")
    task = progress.add_task("hosts", total=2 * len(SUBJECTS) + 1)
    rows = []
    for subject in SUBJECTS:
        for threshold in (NEVER, ALWAYS):
            rows += _race(subject, threshold, passes, blocks)
            progress.advance(task)
    served = _served(SUBJECTS[0], blocks)
    progress.advance(task)
    figures = {
        "passes": passes - WARM_UP,
        "blocks": blocks,
        "rows": rows,
        "served": served,
        "chunks": CHUNKS,
        "environment": environment(),
    }
    write_card(out, "hosts", card(figures), figures)
    return figures


def _attached(name: str, attach: Callable[[Any, float], Around], model: Any, threshold: float) -> Around | None:
    """A library on a model; None where a peer refuses it. That we refuse one is an error."""
    try:
        with _quiet():
            return attach(model, threshold)
    except (ValueError, NotImplementedError, AssertionError):  # cache-dit asserts what it supports
        if name not in PEERS:
            raise
        return None


@torch.no_grad()
def _race(subject: Subject, threshold: float, passes: int, blocks: int) -> list[dict[str, Any]]:
    """One pass of every library, over and over, in an order drawn anew: who runs before leaves its traces in caches."""
    model = subject.make(blocks)
    libraries = {"unattached": _unattached, "holdover": _holdover_timed, **PEERS}
    lanes: dict[str, tuple[nn.Module, Around]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}  # of passes, and outside of their blocks
    order = random.Random(0)
    with _clocked(type(model.get_submodule(f"{subject.blocks}.0"))) as blocks_clock:
        for name, attach in libraries.items():
            twin = copy.deepcopy(model)
            around = _attached(name, attach, twin, threshold)
            if around is not None:
                lanes[name], seconds[name] = (twin, around), []
        for index, latents in zip(range(passes), _drift(), strict=False):
            given = subject.inputs(latents, 500.0)
            for name in order.sample(list(lanes), len(lanes)):
                twin, around = lanes[name]
                with _quiet():
                    blocks_clock.seconds, started = 0.0, perf_counter()
                    with around(index, "denoise"):
                        twin(**given, return_dict=False)
                    whole = perf_counter() - started
                    seconds[name].append((whole, whole - blocks_clock.seconds))
    bare, bare_outside = np.array(seconds["unattached"][WARM_UP:]).T
    rows = [{"model": subject.name, "reuse": threshold == ALWAYS, "library": name} for name in libraries]
    for row in rows:
        if row["library"] not in lanes:
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
    """While it lasts, the time within every forward of a class of blocks is added up."""
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
def _served(subject: Subject, blocks: int) -> dict[str, int | None]:
    """How many of the passes over clean latents each library serves from cache; None where it refuses the model."""
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
        for index, latents in zip(range(CHUNKS * (DENOISING + 1)), _drift(), strict=False):
            clean = index % (DENOISING + 1) == DENOISING
            before = ran[0]
            with _quiet(), around(index, "kv_update" if clean else "denoise"):
                model(**subject.inputs(latents, 0.0 if clean else 500.0), return_dict=False)
            served += clean and ran[0] == before
        counts[name] = served
    return counts


def _drift() -> Iterator[Tensor]:
    """Latents ``[1, 16, F, 2H, 2W]`` that change a little from pass to pass."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, FRAMES, 2 * ROWS, 2 * COLUMNS, generator=source)
    while True:
        yield latents.clone()
        latents = latents + 0.01 * torch.randn(latents.shape, generator=source)


@contextmanager
def _quiet() -> Iterator[None]:
    """The peers warn about what is deliberate here."""
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
after the warm-up, all libraries interleaved pass by pass in one process. Times are medians; "against unattached" and
the microseconds outside the blocks, which are what a library adds of its own, are medians of paired passes.

{markdown(columns, rows)}
In a loop of {DENOISING} denoising passes and one over the clean latents, which is the one that writes the KV cache of a
chunk-causal model, at a threshold under which all is reused that may be: how many of those passes are served from
cache.

{markdown(("library", "clean passes served from cache"), served)}
{about(figures["environment"])}
"""
