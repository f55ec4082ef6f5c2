"""TeaCache (arXiv 2411.19108): the timestep-modulated input tells how far the output has moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from holdover.engine.snapshot import Snapshot
from holdover.method import Call, Policy
from holdover.methods.parts.guards import First, Protection, for_steps, one_of
from holdover.methods.parts.predictors import Repeat, Residual, before
from holdover.methods.parts.signals import RelativeChange, mean_change, relative
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Accumulate, Measure

#: The tensors that a polynomial may be fitted to, as slots declare them: the first block's timestep-modulated input,
#: the embedding of the timestep, or the projection of that embedding which modulates the blocks.
Tap = Literal["modulated", "time embedding", "time projection"]


def teacache(
    *,
    threshold: float = 0.1,
    polynomial: Sequence[float] = (),
    of: Tap = "modulated",
    retain: First = 1,
    last: bool = True,
    protection: Protection = "pass",
) -> Policy:
    """Reuse the residual of all blocks while the first one's modulated input has changed little since it was computed.

    From step to step the relative change (L1) of the timestep-modulated input is mapped by a polynomial fitted to the
    model, and summed; the backbone is computed once the sum reaches the threshold. First and last step are computed.
    The model declares the tap ``modulated`` (`holdover.Slot`). ``holdover calibrate`` fits the polynomial; by hand::

        with holdover.attach(model, measure_changes()) as cache:
            ...                                                # some chunks
            moved, output_moved = zip(*changes(cache.snapshot()))

    The presets have the polynomials and thresholds of the released code. Those for Wan and CogVideoX are fitted to the
    embedding of the timestep, or to its projection, and take a model that declares that tap.

    Args:
        threshold: of the sum.
        polynomial: its coefficients, highest power first; identity if there are none.
        of: the tap that is looked at, and that the polynomial was fitted to.
        retain: first steps that are computed: how many, a share of the steps, or a share and a number more.
        last: compute the last step.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range, or a preset's polynomial was fitted to another tap.
    """
    one_of("of", of, get_args(Tap))
    for name, preset in PRESETS.items():
        if tuple(polynomial) == preset["polynomial"] and of != preset["of"]:
            raise ValueError(
                f"of={of!r}, but the polynomial of preset {name!r} was fitted to {preset['of']!r}; give that, or a "
                f"polynomial that was fitted to {of!r}"
            )
    return Policy(
        name="teacache",
        spans=ProbeAndTail(0),
        trigger=Accumulate(
            guard=for_steps(retain=retain, last=last, protection=protection),
            signal=RelativeChange(of, follows=True),
            metric="change",
            threshold=threshold,
            polynomial=tuple(polynomial),
        ),
        predictor=Residual(),
        lifetime="chunk",
    )


def _preset(of: Tap, threshold: float, *polynomial: float) -> dict[str, Any]:
    ends = {"retain": 5, "last": False} if of == "time projection" else {"retain": 1, "last": True}
    return {"of": of, "threshold": threshold, "polynomial": polynomial, **ends}


#: The released code's, at its faster setting: for Wan by size and resolution, "retained" with five first steps.
PRESETS = {
    "hunyuan": _preset("modulated", 0.15, 733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "cogvideox-2b": _preset("time embedding", 0.2, -31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": _preset("time embedding", 0.2, -1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "wan-t2v-1.3b": _preset("time embedding", 0.08, 2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan-t2v-14b": _preset(
        "time embedding", 0.2, -5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404
    ),
    "wan-i2v-480p": _preset("time embedding", 0.26, -302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan-i2v-720p": _preset("time embedding", 0.3, -114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "wan-t2v-1.3b-retained": _preset(
        "time projection", 0.1, -52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664
    ),
    "wan-t2v-14b-retained": _preset(
        "time projection", 0.2, -303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525
    ),
    "wan-i2v-480p-retained": _preset(
        "time projection", 0.3, 257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977
    ),
    "wan-i2v-720p-retained": _preset(
        "time projection", 0.3, 8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401
    ),
}


def measure_changes(of: Tap = "modulated") -> Policy:
    """Compute everything and note what `changes` reads of a tap and of the output."""
    return Policy(
        name="measure_changes",
        spans=ProbeAndTail(0),
        trigger=MeasureChanges(signal=RelativeChange(of)),
        predictor=Repeat(),
    )


def changes(snapshot: Snapshot, branch: str = "") -> list[tuple[float, float]]:
    """Per pair of successive steps the relative changes (L1) of the tap and of what all blocks gave.

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
