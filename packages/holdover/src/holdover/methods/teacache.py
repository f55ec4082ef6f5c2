"""TeaCache (arXiv 2411.19108): the timestep-modulated input tells how far the output has moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.engine.snapshot import Snapshot
from holdover.method import Call, Policy
from holdover.methods.parts.guards import Protection, for_steps
from holdover.methods.parts.predictors import Repeat, Residual, before
from holdover.methods.parts.signals import RelativeChange, mean_change, relative
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Accumulate, Measure


def teacache(*, threshold: float = 0.1, polynomial: Sequence[float] = (), protection: Protection = "pass") -> Policy:
    """Reuse the residual of all blocks while the first one's modulated input has changed little since it was computed.

    From step to step the relative change (L1) of the timestep-modulated input is mapped by a polynomial fitted to the
    model, and summed; the backbone is computed once the sum reaches the threshold. First and last step are computed.
    The model declares the tap ``modulated`` (`holdover.Slot`). ``holdover calibrate`` fits the polynomial; by hand::

        with holdover.attach(model, measure_changes()) as cache:
            ...                                                # some chunks
            moved, output_moved = zip(*changes(cache.snapshot()))

    Args:
        threshold: of the sum.
        polynomial: its coefficients, highest power first; identity if there are none.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    return Policy(
        name="teacache",
        spans=ProbeAndTail(0),
        trigger=Accumulate(
            guard=for_steps(retain=1, last=True, protection=protection),
            signal=RelativeChange("modulated", follows=True),
            metric="change",
            threshold=threshold,
            polynomial=tuple(polynomial),
        ),
        predictor=Residual(),
        lifetime="chunk",
    )


def measure_changes() -> Policy:
    """Compute everything and note what `changes` reads."""
    return Policy(
        name="measure_changes",
        spans=ProbeAndTail(0),
        trigger=MeasureChanges(signal=RelativeChange("modulated")),
        predictor=Repeat(),
    )


def changes(snapshot: Snapshot, branch: str = "") -> list[tuple[float, float]]:
    """Per pair of successive steps the relative changes (L1) of the modulated input and of what all blocks gave.

    Of all the stream's chunks, measured under `measure_changes`; a pair of which one is not finite is left out.

    Raises:
        ValueError: the snapshot has none of this branch.
    """
    measured = {entry["key"][0]: entry["numbers"] for entry in snapshot.streams[0]["entries"]}
    pairs = [
        (moved, measured[branch]["output " + name.removeprefix("input ")])
        for name, moved in measured.get(branch, {}).items()
        if name.startswith("input ")
    ]
    if not pairs:
        known = ", ".join(map(repr, measured)) or "none"
        raise ValueError(
            f"no changes of branch {branch!r}, branches that ran are: {known}; attach measure_changes() and run "
            f"chunks of two steps or more"
        )
    return pairs


@dataclass(frozen=True, kw_only=True)
class MeasureChanges(Measure):
    """Keeps, by chunk and pass index, the relative change of the signal and of the output since the pass before.

    Goes with a predictor that holds the output.
    """

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        held, index = before(call), call.step.index
        numbers = {**(held.numbers if held else {}), "chunk": float(call.chunk), "index": float(index)}
        if held is None or (held.numbers["chunk"], held.numbers["index"] + 1) != (call.chunk, index):
            return numbers
        assert call.signal is not None
        sizes = []
        for now, then in ((call.signal, held.tensors["signal"]), (y.float(), held.tensors["output"].float())):
            sizes += [mean_change(now, then), then.abs().mean(dtype=torch.float32)]
        moved_in, size_in, moved_out, size_out = torch.stack(sizes).tolist()
        pair = relative(moved_in, size_in), relative(moved_out, size_out)
        if all(map(math.isfinite, pair)):
            name = f"{call.chunk} {index}"
            numbers |= {f"input {name}": pair[0], f"output {name}": pair[1]}
        return numbers
