"""What TeaCache's polynomial is fitted to: how far the output goes for each change of the input (arXiv 2411.19108)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from holdover.engine.contract import Call
from holdover.methods.parts.gates import Never
from holdover.methods.parts.history import before
from holdover.methods.parts.signals import mean_change, relative


@dataclass(frozen=True)
class MeasureChanges(Never):
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
