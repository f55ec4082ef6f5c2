"""What a cache can gain at most, and what of it the decisions of some passes saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from holdover.decision import WINDOW, Decision


def amdahl_bound(block_share: float, skip: float, *, rest_share: float = 0.0, idle: float = 0.0) -> float:
    """The speed-up that work which is left out allows at most: ``1 / (1 - block_share * skip - rest_share * idle)``.

    Args:
        block_share: of the time without a cache, what the skippable block calls take.
        skip: the share of those calls that is skipped.
        rest_share: of the time without a cache, what the denoising passes take beside these calls.
        idle: the share of that work that is left out, see `Saved`.

    Raises:
        ValueError: a share is not between 0 and 1, or they leave no time at all.
    """
    named = {"block_share": block_share, "skip": skip, "rest_share": rest_share, "idle": idle}
    for name, value in {**named, "block_share + rest_share": block_share + rest_share}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a share, between 0 and 1")
    remaining = 1 - block_share * skip - rest_share * idle
    if remaining <= 0:
        told = ", ".join(f"{name}={value}" for name, value in named.items() if value)
        raise ValueError(f"{told} leaves no time; a model does more than run its blocks")
    return 1 / remaining


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What some denoising passes did not do.

    Attributes:
        skip: the share of block calls that were not made: reused, or of a pass or a chunk that did not run. A call that
            computed some of its tokens counts for the others.
        idle: the same of what a pass does beside its blocks. A pass that ran did all of it, but where every block
            computed some tokens alone, as many were embedded and read out.
    """

    skip: float = 0.0
    idle: float = 0.0


def saved(decisions: Iterable[Decision]) -> Saved:
    """What denoising passes did not do. All passes count alike, warm-up and held chunks too; without any, nothing."""
    passes: dict[tuple[str, str, int, int], list[Decision]] = {}
    for d in decisions:
        if d.role == "denoise":
            passes.setdefault((d.stream, d.branch, d.chunk, d.index), []).append(d)
    found = [_of_pass(made) for made in passes.values()]
    if not found:
        return Saved()
    return Saved(skip=fmean(each.skip for each in found), idle=fmean(each.idle for each in found))


def _of_pass(made: Sequence[Decision]) -> Saved:
    """Of one pass. A slot without a name is the model as a whole."""
    if all(d.reason == WINDOW for d in made):
        return Saved(skip=1.0, idle=1.0)
    whole = [d for d in made if not d.slot]
    if any(not d.computed for d in whole):
        return Saved(skip=1.0, idle=1.0)
    left_out = [_left_out(d) for d in made if d.slot]
    if not left_out:
        return Saved()
    in_part = all("recomputed" in d.scores for d in made if d.slot)
    return Saved(skip=fmean(left_out), idle=min(left_out) if in_part else 0.0)


def _left_out(decision: Decision) -> float:
    """The share of a call's tokens that were not computed."""
    return 0.0 if decision.computed else 1.0 - decision.scores.get("recomputed", 0.0)
