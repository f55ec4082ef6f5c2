"""TeaCache (arXiv 2411.19108): the timestep-modulated input tells how far the output has moved."""

from __future__ import annotations

from collections.abc import Sequence

from holdover.engine.snapshot import Snapshot
from holdover.methods.parts.changes import MeasureChanges
from holdover.methods.parts.gates import Accumulate
from holdover.methods.parts.guards import AnyOf, Protection, for_steps
from holdover.methods.parts.predictors import Repeat, Residual
from holdover.methods.parts.signals import RelativeChange
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.policy import Policy


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
        guard=for_steps(retain=1, last=True, protection=protection),
        gate=Accumulate(metric="change", threshold=threshold, polynomial=tuple(polynomial)),
        signal=RelativeChange("modulated", follows=True),
        predictor=Residual(),
        lifetime="chunk",
    )


def measure_changes() -> Policy:
    """Compute everything and note what `changes` reads."""
    return Policy(
        name="measure_changes",
        spans=ProbeAndTail(0),
        guard=AnyOf(()),
        gate=MeasureChanges(),
        signal=RelativeChange("modulated"),
        predictor=Repeat(),
    )


def changes(snapshot: Snapshot, branch: str = "") -> list[tuple[float, float]]:
    """Per pair of successive steps the relative changes (L1) of the modulated input and of what all blocks gave.

    Of all the stream's chunks, measured under `measure_changes`; a pair of which one is not finite is left out.

    Raises:
        ValueError: the snapshot has none of this branch.
    """
    measured = {held["key"][0]: held["numbers"] for held in snapshot.stream["held"]}
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
