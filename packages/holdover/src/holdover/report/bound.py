"""What a cache can gain at most."""

from __future__ import annotations


def amdahl_bound(block_share: float, skip: float) -> float:
    """The speed-up that skipping a share of the blocks' time allows at most: ``1 / (1 - block_share * skip)``.

    Args:
        block_share: of the time without a cache, what the skippable block calls take.
        skip: the share of those calls that is skipped.

    Raises:
        ValueError: a share is not between 0 and 1, or the two leave no time at all.
    """
    for name, value in (("block_share", block_share), ("skip", skip)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a share, between 0 and 1")
    remaining = 1 - block_share * skip
    if remaining == 0:
        raise ValueError("block_share=1 with skip=1 leaves no time; a model does more than run its blocks")
    return 1 / remaining
