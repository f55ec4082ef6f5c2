"""The passes of closed loops, several of which share each pass of their model.

Shape suffixes: B batch, F latent frames, N tokens of one latent frame, P values of one token, A dimensions of the
action.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from holdover.step import Step
from holdover_world.loop.cycle import ChunkInputs, Cycle
from holdover_world.loop.protocol import Drafts, Stacks
from holdover_world.loop.state import Piece
from holdover_world.model.sampler import denoise


@torch.inference_mode()
def advance(
    loops: Sequence[Cycle[Any]], actions: Sequence[Tensor], plans: Sequence[Tensor | None] | None = None
) -> list[Piece]:
    """Generate the next piece of every loop in one batch.

    Several loops must share a model that stacks histories, a cache and a cadence, have one row each, and hold equally
    many latent frames in their KV caches; `batches` sorts them so. They may stand at different positions of their
    cycles. Each gets what it would get alone, except for rounding. A loop whose window in hand is held takes no part in
    the denoising passes. If a pass raises, the loops are left in mid-chunk; assign their earlier `ClosedLoop.state`.

    Args:
        loops: the loops.
        actions: for each loop the newest normalised action, ``[B, A]`` or ``[A]``.
        plans: for each loop what is intended for the frames that are not yet commanded, see `ClosedLoop.step`.

    Raises:
        ValueError: the loops do not go together, or a plan does not fit; no loop has advanced.
    """
    if len(batches(loops)) > 1 or (len(loops) > 1 and any(loop.rows != 1 for loop in loops)):
        raise ValueError(
            "loops of one batch share a model that stacks histories, a cache, a cadence and a KV length, and have one "
            "row each; sort them by `batches`"
        )
    plans = [None] * len(loops) if plans is None else plans
    told = [loop.tell(action, plan) for loop, action, plan in zip(loops, actions, plans, strict=True)]
    inputs = [loop.begin(each) for loop, each in zip(loops, told, strict=True)]
    running = [(loop, each) for loop, each in zip(loops, inputs, strict=True) if not each.held]
    windows, denoising = _denoise([loop for loop, _ in running], [each for _, each in running])
    made = iter(windows)
    pieces = [loop.finish(each, None if each.held else next(made)) for loop, each in zip(loops, inputs, strict=True)]
    full, writing = [loop for loop in loops if loop.complete], 0.0
    committed = [loop.committed for loop in full if loop.committed is not None]
    if full and loops[0].config.kv == "clean":
        writing = write_history(full, committed, torch.cat([torch.stack(loop.actions, 1) for loop in full]))
    for loop, (latents, _) in zip(full, committed, strict=True):
        loop.last = latents[:, -1].clone()  # a view would keep the whole window in memory
        loop.begin_cycle()
    for loop in loops:
        loop.chunk += 1
    return [
        Piece(
            latents=latents,
            before=before,
            dit_seconds=denoising * (not each.held) + writing * (loop in full),
            exact=exact,
            held=each.held,
        )
        for loop, each, (latents, before, exact) in zip(loops, inputs, pieces, strict=True)
    ]


def batches(loops: Sequence[Cycle[Any]]) -> list[list[int]]:
    """The indices of the loops that can advance together, batch by batch."""
    found: dict[object, list[int]] = {}
    for n, loop in enumerate(loops):
        alone = None if isinstance(loop.model, Stacks) else n
        key = id(loop.model), id(loop.cache), loop.config, loop.history.length, alone
        found.setdefault(key, []).append(n)
    return list(found.values())


@torch.inference_mode()
def write_history(
    loops: Sequence[Cycle[Any]], committed: Sequence[tuple[Tensor, Tensor]], done_BFA: Tensor | None = None
) -> float:
    """The clean pass, which is the KV update. Returns its seconds."""
    latents, actions = torch.cat([each for each, _ in committed]), torch.cat([each for _, each in committed])
    fields: list[dict[str, Any]] = [{"role": "kv_update"} for _ in loops]
    _, took = _forward(loops, fields, latents, sigma=0.0, action_BFA=actions, write=True, done_BFA=done_BFA)
    return took


def _denoise(loops: Sequence[Cycle[Any]], inputs: Sequence[ChunkInputs]) -> tuple[Sequence[Tensor], float]:
    """The denoising passes of a chunk. Returns each loop's window, and the seconds in the model."""
    if not loops:
        return [], 0.0
    config, sigmas = loops[0].config, loops[0].sigmas
    actions_BFA = torch.cat([each.actions_BFA for each in inputs])
    stands = [_stand(loop, each) for loop, each in zip(loops, inputs, strict=True)]
    shown = _shown(loops, inputs)
    seconds = 0.0

    def predict(index: int, noisy: Tensor) -> Tensor:
        nonlocal seconds
        fields = [{**stand, "index": index, "sigma": sigmas[index]} for stand in stands]
        writes = config.kv == "last_pass" and index == config.steps - 1
        if writes:  # such a pass is never served from cache
            fields = [{"role": "kv_update", "sigma": sigmas[index]} for _ in loops]
        inside = {"write": writes} if shown is None or writes else {"shown": shown}
        output, took = _forward(loops, fields, noisy, sigma=sigmas[index], action_BFA=actions_BFA, **inside)
        seconds += took
        if config.guidance == 1:
            return output
        free = [{**each, "branch": "uncond", "frame_actions": None} for each in fields]
        unguided, took = _forward(loops, free, noisy, sigma=sigmas[index], action_BFA=None)
        seconds += took
        return unguided + config.guidance * (output - unguided)

    noise = torch.cat([each.noise_SBFNP for each in inputs], 1)
    known = [row for each in inputs for row in each.known_BFNP]
    window = denoise(predict, noise, sigmas, known, sampler=config.sampler)
    windows = window.split([loop.rows for loop in loops])
    if len(loops) > 1:  # a view would keep the whole batch in memory
        windows = tuple(window.clone() for window in windows)
    return windows, seconds


def _shown(loops: Sequence[Cycle[Any]], inputs: Sequence[ChunkInputs]) -> Sequence[int] | None:
    """Per row the latent frame to be shown, where the cache may leave the others."""
    cache = loops[0].cache
    may = isinstance(cache, Drafts) and cache.by_frame
    if not may or any(each.position == 0 or each.commits for each in inputs):  # of a cycle's first, all are computed
        return None
    return [each.position for loop, each in zip(loops, inputs, strict=True) for _ in range(loop.rows)]


def _stand(loop: Cycle[Any], inputs: ChunkInputs) -> dict[str, Any]:
    """What is the same in all passes of a chunk, of what the cache is told."""
    return {
        "num_steps": loop.config.steps - (loop.config.kv == "last_pass"),
        "action": inputs.actions_BFA[:, inputs.position],
        "frame_actions": inputs.actions_BFA.transpose(0, 1).flatten(1).tolist(),
        "shown": None if loop.config.cadence == "plain" else inputs.position,
        "commits": inputs.commits,
    }


def _forward(
    loops: Sequence[Cycle[Any]], fields: Sequence[Mapping[str, Any]], latents: Tensor, **inputs: Any
) -> tuple[Tensor, float]:
    """One pass of the model over all loops. Returns its output and its seconds."""
    first, alone = loops[0], len(loops) == 1
    steps = [{"stream": loop.stream, "chunk": loop.chunk, **each} for loop, each in zip(loops, fields, strict=True)]
    within: AbstractContextManager[Any] = nullcontext()
    if first.cache is not None:
        within = first.cache.step(**steps[0]) if alone else first.cache.step(rows=[Step(**step) for step in steps])
    with within:
        started = perf_counter()
        history = first.history if alone else first.model.stack([loop.history for loop in loops])
        output: Tensor = first.model(latents, history=history, **inputs)
        if output.is_cuda:
            torch.cuda.synchronize(output.device)
        return output, perf_counter() - started
