"""TaylorSeer (arXiv 2503.06923): at fixed intervals compute, in between carry the output on by its differences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from holdover.method import Call, Policy, Predictor
from holdover.methods.parts.guards import First, Interval, Protection, at_least, for_steps, one_of
from holdover.methods.parts.predictors import before
from holdover.methods.parts.spans import EachBlock, ProbeAndTail
from holdover.methods.parts.triggers import Open


def taylorseer(
    *,
    every: int = 5,
    start: int = 0,
    order: Literal[0, 1, 2] = 1,
    span: Literal["all", "block", "sublayer", "model"] = "all",
    retain: First = 0,
    protection: Protection = "pass",
) -> Policy:
    """Compute every N-th step of a chunk; in between, forecast the output from the backward differences.

    ``k`` steps after the last computed one, ``y = y0 + Σ Δⁱy·kⁱ / (i!·Nⁱ)`` for i up to the order: exact on lines, not
    on parabolas, because the second backward difference belongs to a point one interval back.

    Left open and chosen here: the steps 0, N, 2N, ... are computed; until enough of them are known, the order is lower;
    where a step is computed out of turn, the differences are divided by the true distance. The presets are the settings
    of the released code, which forecasts each attention module and MLP of the blocks by itself, and what the single
    blocks of HunyuanVideo and FLUX add as a whole.

    Args:
        every: N, how many steps apart the computed ones are.
        start: the first step of that schedule, such as the last of the ``retain`` ones.
        order: how many differences are used; 0 repeats the output.
        span: forecast what ``"all"`` blocks together give, each ``"block"`` by itself, each attention module and MLP in
            the blocks (``"sublayer"``), which the model declares as slots of these kinds, or the whole ``"model"``.
        retain: first steps that are computed: how many, a share of the steps, or a share and a number more.
        protection: ``"chunk"`` computes chunks whose latents are committed; ``"pass"`` the clean pass alone.

    Raises:
        ValueError: an option is out of range.
    """
    one_of("span", span, ("all", "block", "sublayer", "model"))
    return Policy(
        name="taylorseer",
        spans=EachBlock() if span in ("block", "sublayer") else ProbeAndTail(0),
        trigger=Dated(guard=for_steps(retain=retain, last=False, protection=protection) | EveryFrom(every, start)),
        predictor=Taylor(order),
        lifetime="chunk",
        level="block" if span == "all" else span,
    )


#: The released code's settings by model.
PRESETS = {
    "released-wan": {"every": 5, "order": 1, "span": "sublayer"},
    "released-hunyuan": {"every": 5, "order": 1, "span": "sublayer"},
    "released-flux": {"every": 6, "start": 2, "order": 1, "span": "sublayer", "retain": 3},
}


@dataclass(frozen=True)
class EveryFrom:
    """Computes the steps ``start``, ``start + every``, ``start + 2·every``, ... of a chunk."""

    every: int
    start: int

    def __post_init__(self) -> None:
        Interval(self.every, "steps")  # refuses what reuses nothing
        at_least("start", self.start, 0)

    def __call__(self, call: Call) -> str | None:
        after = call.step.index - self.start
        return "interval" if after >= 0 and after % self.every == 0 else None


@dataclass(frozen=True, kw_only=True)
class Dated(Open):
    """Reuses whatever the guard does not forbid, and notes the pass in which the span was computed."""

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
        known, passes = call.known.tensors, call.step.index - call.known.numbers["index"]
        y = known["difference 0"].clone()  # the model may write into what it is given
        if "difference 1" in known:
            y = y + known["difference 1"] * passes
        if "difference 2" in known:
            y = y + known["difference 2"] * (passes * passes / 2)
        return y
