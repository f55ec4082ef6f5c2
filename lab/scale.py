"""What caching saves at sizes that were never trained: random weights, and decisions that are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile

from holdover.engine.attach import attach
from holdover.method import Call, Policy, Trigger, Verdict
from holdover.methods.xcache import xcache
from holdover.report.bound import amdahl_bound
from holdover.report.environment import environment
from holdover.report.progress import bar
from holdover.report.tables import markdown, percent
from holdover_world.cli.common import Seed, keep_memory, show
from holdover_world.config import CONFIGS
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.config import LoopConfig
from holdover_world.measure.cards import about, write_card
from holdover_world.measure.timing import block_share
from holdover_world.model.transformer import WorldModel
from holdover_world.runtime import fast_dtype
from lab.cards import LAB, Out, run_script

Arrangement = Literal["runs", "scattered"]

#: Shares of block calls that are skipped; X-Cache's published runs skip about the middle one.
SHARES = (0.51, 0.71, 0.90)


@dataclass(frozen=True, kw_only=True)
class Replay(Trigger):
    """Decides by a pattern, whatever the signal says; ``pattern[pass][block]`` is whether to reuse."""

    pattern: tuple[tuple[bool, ...], ...]

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        return Verdict(None if self.pattern[call.step.index][call.span.first] else "pattern")


def replay(pattern: NDArray[np.bool_], *, fingerprint: bool) -> Policy:
    """X-Cache with a `Replay` for its trigger and no anchor; without ``fingerprint`` no signal is taken."""
    policy = xcache(front_anchors=0, protection="pass")
    guard, signal = policy.trigger.guard, policy.trigger.signal if fingerprint else None
    trigger = Replay(guard=guard, signal=signal, pattern=tuple(tuple(map(bool, row)) for row in pattern))
    return replace(policy, trigger=trigger, look_ahead=policy.look_ahead if fingerprint else 1)


def decision_pattern(
    share: float, steps: int, blocks: int, arrangement: Arrangement, *, seed: int = 0
) -> NDArray[np.bool_]:
    """Which block calls of a chunk are reused, ``[steps, blocks]``. The first block never is.

    Args:
        share: of all block calls, rounded to whole calls.
        arrangement: one run of blocks in each pass, or blocks drawn at random.
        seed: of the drawn blocks, and of where the runs begin.

    Raises:
        ValueError: the share is larger than the calls without the first block.
    """
    count, most = round(share * steps * blocks), steps * (blocks - 1)
    if not 0 <= count <= most:
        raise ValueError(
            f"share={share} of {steps} x {blocks} calls: at most {most / (steps * blocks):.3f} can be reused"
        )
    rng = np.random.default_rng(seed)
    pattern = np.zeros((steps, blocks), bool)
    for index, reused in enumerate(np.diff(np.linspace(0, count, steps + 1).round().astype(int))):
        if arrangement == "runs":
            first = 1 + int(rng.integers(blocks - reused))
            pattern[index, first : first + reused] = True
        else:
            pattern[index, 1 + rng.permutation(blocks - 1)[:reused]] = True
    return pattern


def run_scale(
    out: Path,
    *,
    size: str = "small",
    device: str = "cpu",
    compiled: bool = False,
    repeats: int = 5,
    seed: int = 0,
    progress: Progress,
) -> dict[str, Any]:
    """Time a size of the world model under given decisions; writes ``scale-<size>-<device>.md`` and ``.json``.

    The runs are interleaved. Each attaches its policy, generates one chunk to fill the cache, and is timed over the
    next cycle.

    Args:
        size: a name in `holdover_world.config.CONFIGS`; the weights are random.
        device: "cpu" or "cuda".
        compiled: compile the blocks.
        repeats: timed cycles of every run.

    Raises:
        ValueError: the size or the device is unknown.
    """
    if size not in CONFIGS:
        raise ValueError(f"size {size!r} is not one of {', '.join(CONFIGS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch finds no CUDA GPU; give device='cpu'")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    bench = _Bench.build(size, device, compiled=compiled, seed=seed)
    steps, blocks = LoopConfig().steps, bench.model.sizes.layers
    arms: dict[str, tuple[float, Arrangement, Policy]] = {}
    for share in SHARES:
        for arrangement in get_args(Arrangement):
            pattern = decision_pattern(share, steps, blocks, arrangement, seed=seed)
            for fingerprint in (False, True):
                name = f"{share:.0%} {arrangement}" + (", scored" if fingerprint else "")
                arms[name] = share, arrangement, replay(pattern, fingerprint=fingerprint)
    task = progress.add_task(f"scale: {size} on {device}", total=repeats * (len(arms) + 1) + 1)
    share_of_blocks, _ = block_share(bench.loop(), bench.action)
    progress.advance(task)
    seconds: dict[str, list[float]] = {name: [] for name in ["unattached", *arms]}
    measured: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats):
        order = list(seconds)
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            policy = arms[name][2] if name in arms else None
            time, rest = bench.cycle(policy, profiled=repeat == repeats - 1)
            seconds[name].append(time)
            measured[name] = rest
            progress.advance(task)
    full = np.array(seconds["unattached"])
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        bound = amdahl_bound(share_of_blocks, measured[name]["skip"])
        faster = float(np.median(full / np.array(times)))
        rows.append(
            {
                "name": name,
                "dit_ms_per_chunk": 1e3 * float(np.median(times)),
                "speedup": faster,
                "speedup_bound": bound,
                "share_of_bound": faster / bound,
                **measured[name],
            }
        )
    figures: dict[str, Any] = {
        "name": f"scale-{size}-{device}" + ("-compiled" if compiled else ""),
        "size": size,
        "device": device,
        "compiled": compiled,
        "repeats": repeats,
        "weights": sum(p.numel() for p in bench.model.parameters()),
        "tokens_per_pass": bench.model.sizes.window * bench.model.sizes.tokens,
        "block_share": share_of_blocks,
        "rows": rows,
        "environment": environment(bench.model),
    }
    write_card(out, figures["name"], card(figures), figures)
    return figures


@dataclass(frozen=True)
class _Bench:
    """A model with random weights, and the start of its runs."""

    model: WorldModel
    start: torch.Tensor
    actions: torch.Tensor

    @classmethod
    def build(cls, size: str, device: str, *, compiled: bool, seed: int) -> _Bench:
        torch.manual_seed(seed)
        config = CONFIGS[size]
        with torch.device(device):
            model = WorldModel.of(config).to(fast_dtype(device)).eval().requires_grad_(False)
            start = torch.randn(1, config.context, config.tokens, config.patch_values) * 0.5
            actions = torch.zeros(1, config.context, config.action_dims)
        if compiled:
            for block in model.blocks:
                block.compile()
        return cls(model, start, actions)

    @property
    def action(self) -> torch.Tensor:
        return self.actions[0, 0]

    def loop(self, **options: Any) -> ClosedLoop[WorldModel]:
        return ClosedLoop(self.model, self.start, self.actions, **options)

    def cycle(self, policy: Policy | None, *, profiled: bool) -> tuple[float, dict[str, Any]]:
        """Mean seconds of a chunk in the cycle after a first chunk, and what else is counted in that cycle."""
        cache = attach(self.model, policy) if policy else None
        try:
            loop = self.loop(cache=cache)
            loop.step(self.action)
            chunks = loop.window_frames
            total = sum(loop.step(self.action).dit_seconds for _ in range(chunks))
            rest: dict[str, Any] = {"skip": 0.0, "bytes_held": 0}
            if cache:
                # The first chunk fills the cache.
                decisions = [d for d in cache.trace if d.role == "denoise" and d.chunk > 0]
                rest["skip"] = sum(not d.computed for d in decisions) / len(decisions)
                rest["bytes_held"] = cache.stats().bytes_held
            if profiled and self.start.is_cuda:
                rest |= _cuda_calls(loop, self.action)
        finally:
            if cache:
                cache.detach()
        return total / chunks, rest


def _cuda_calls(loop: ClosedLoop[WorldModel], action: torch.Tensor) -> dict[str, int]:
    """Kernel launches, and how often the host waits for the device, in one chunk without a KV update."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        loop.step(action)
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {
        "kernel_launches": sum(n for name, n in counts.items() if name.startswith("cudaLaunchKernel")),
        "host_waits": sum(
            n for name, n in counts.items() if name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")
        ),
    }


def card(figures: dict[str, Any]) -> str:
    """The Markdown of a result."""
    columns = ["decisions", "skip", "DiT ms per chunk", "speed-up", "bound", "of bound", "MiB held"]
    counted = "kernel_launches" in figures["rows"][0]
    if counted:
        columns += ["kernel launches", "host waits"]
    rows = []
    for row in figures["rows"]:
        cells = [
            row["name"],
            percent(row["skip"]),
            f"{row['dit_ms_per_chunk']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['speedup_bound']:.2f}x",
            percent(row["share_of_bound"]),
            f"{row['bytes_held'] / 2**20:.1f}",
        ]
        if counted:
            cells += [str(row["kernel_launches"]), str(row["host_waits"])]
        rows.append(tuple(cells))
    return f"""# At scale: {figures["size"]} on {figures["device"]}{", compiled" if figures["compiled"] else ""}

The world model with {figures["weights"] / 1e6:,.0f} million random weights, {figures["tokens_per_pass"]:,}
tokens a pass. A given pattern says which block calls are skipped, in one run of blocks a pass or scattered; "scored"
takes and compares X-Cache's fingerprint of every block as well, so the difference is the cost of gate and fingerprint.
Medians of {figures["repeats"]} interleaved cycles of four chunks, KV update included; blocks take
{percent(figures["block_share"])} of the time without a cache, from which the bound follows.

{markdown(tuple(columns), rows)}
{about(figures["environment"])}
"""


def main(
    out: Out = LAB,
    size: Annotated[str, typer.Option(help="tiny, small, base or xworld-5b; the weights are random.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed cycles of every run.")] = 5,
    seed: Seed = 0,
) -> None:
    """DiT time at given shares of skipped blocks, at sizes up to X-World's, against the bound."""
    keep_memory()
    with bar() as progress:
        figures = run_scale(
            out, size=size, device=device, compiled=compiled, repeats=repeats, seed=seed, progress=progress
        )
    show(out / f"{figures['name']}.md", figures)


if __name__ == "__main__":
    run_script(main)
