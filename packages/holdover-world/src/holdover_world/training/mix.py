"""Weighted means of checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from holdover_world.codec.checkpoints import write_difference
from holdover_world.model.transformer import WorldModel
from holdover_world.training.train import read_checkpoint


def mix(
    first: Path, second: Path, share: float, out: Path, *, since: Path | None = None, as_difference: bool = False
) -> None:
    """Write ``first + share * (second - since)``: by default the mean of two checkpoints, ``1 - share`` of the first.

    Args:
        first, second: checkpoints of the same sizes and autoencoders.
        share: between 0 and 1.
        out: the folder for the result.
        since: a checkpoint that ``second`` was trained from, so that what it learned is added to ``first``.
        as_difference: write the difference from the checkpoint in the folder above ``out``, half as large.

    Raises:
        ValueError: ``share`` is not between 0 and 1, or the checkpoints have other sizes or autoencoders.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not between 0 and 1")
    model = WorldModel.load(first, dtype=torch.float32)
    added, base = (read_checkpoint(path, model.codec, dtype=torch.float32) for path in (second, since or first))
    with torch.no_grad():
        for own, other, before in zip(model.parameters(), added.parameters(), base.parameters(), strict=True):
            own += share * (other - before)
    if as_difference:
        teacher = read_checkpoint(out.parent, model.codec, dtype=torch.float32)
        write_difference(model, teacher, out)
    else:
        model.save(out)
