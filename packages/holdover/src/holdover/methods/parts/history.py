"""What goes on from what is held: earlier outputs, and the differences between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from holdover.engine.contract import Call
from holdover.engine.state import Held
from holdover.methods.parts.gates import Open
from holdover.methods.parts.predictors import Predictor


def before(call: Call) -> Held | None:
    """What is held of the span, if a history can go on from it: it is there, and of the kind that enters now."""
    held = call.held
    if held is None or held.void is not None:
        return None
    alike = (held.shape, held.dtype, held.device) == (call.x.shape, call.x.dtype, call.x.device)
    return held if alike else None


@dataclass(frozen=True)
class Dated(Open):
    """Reuses whatever no guard forbids, and notes the pass in which the span was computed."""

    def learn(self, call: Call, y: Tensor) -> Mapping[str, float]:
        return {"index": float(call.step.index)}


@dataclass(frozen=True)
class Taylor(Predictor):
    """Carries a span's output on from its differences, ``k`` passes after it was last computed, whatever enters.

    TaylorSeer (arXiv 2503.06923): ``y = y0 + d1·k + d2·k²/2``. The differences are divided by the passes between them,
    ``d1 = (y0 - y1) / n`` and ``d2 = (d1 - d1') / n``, which is the paper's ``Δⁱy / Nⁱ`` where all lie N apart. While
    fewer outputs are known than the order takes, the order is lower. Goes with `Dated`.
    """

    order: int

    def __post_init__(self) -> None:
        if self.order not in (0, 1, 2):
            raise ValueError(f"order={self.order!r}: give 0, 1 or 2")

    def remember(self, call: Call, y: Tensor, spare: Mapping[str, Tensor]) -> dict[str, Tensor]:
        now, held = [y.clone()], before(call)
        passes = call.step.index - held.numbers["index"] if held else 0
        if held is not None and passes > 0:  # a pass that runs again begins a new history
            for order in range(self.order):
                then = held.tensors.get(f"difference {order}")
                if then is None:
                    break
                now.append((now[order] - then) / passes)
        return {f"difference {order}": difference for order, difference in enumerate(now)}

    def predict(self, call: Call) -> Tensor:
        assert call.held is not None
        known, passes = call.held.tensors, call.step.index - call.held.numbers["index"]
        y = known["difference 0"].clone()  # the model may write into what it is given
        if "difference 1" in known:
            y = y + known["difference 1"] * passes
        if "difference 2" in known:
            y = y + known["difference 2"] * (passes * passes / 2)
        return y
