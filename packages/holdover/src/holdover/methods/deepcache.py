"""DeepCache (arXiv 2312.00858): in a U-Net, the deep part is held over while the shallow one goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holdover.method import Policy, Span
from holdover.methods.parts.guards import Interval, Protection, for_steps
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.triggers import Open


def deepcache(*, every: int = 3, shallow: int = 1, retain: int | float = 0, protection: Protection = "pass") -> Policy:
    """Compute every N-th step in full; in between the outermost blocks, and repeat what those within them gave.

    Slots are the blocks of a U-Net in the order in which it runs them: down, middle, up. A down block that returns
    features for the skip connections as well says with `holdover.Slot`'s ``beside`` what it returns when held over.

    Left open and chosen here: what is held begins and ends with whole blocks, not within one; the steps 0, N, 2N, ...
    are computed.

    Args:
        every: N, how many steps apart those are that are computed in full.
        shallow: outer blocks at either end that are always computed.
        retain: first steps that are computed, by number or, as a float, as a share of the steps.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or no block lies within the outer ones.
    """
    return Policy(
        name="deepcache",
        spans=DeepPart(shallow),
        trigger=Open(guard=for_steps(retain=retain, last=False, protection=protection) | Interval(every, "steps")),
        predictor=Repeat(),
        lifetime="chunk",
    )


@dataclass(frozen=True)
class DeepPart:
    """Of a U-Net's blocks the outer ones, ``shallow`` at either end, are always computed; the others are one span."""

    shallow: int

    def __post_init__(self) -> None:
        if not isinstance(self.shallow, int) or self.shallow < 0:
            raise ValueError(f"shallow={self.shallow!r}: give a whole number of blocks, 0 or more")

    def __call__(self, blocks: int) -> Sequence[Span]:
        first, last = self.shallow, blocks - 1 - self.shallow
        if first > last:
            raise ValueError(f"shallow={self.shallow} leaves none of the model's {blocks} blocks to hold over")
        outer = [Span(block, block, "shallow") for block in (*range(first), *range(last + 1, blocks))]
        return [*outer[:first], Span(first, last), *outer[first:]]
