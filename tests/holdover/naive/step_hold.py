"""Step hold, slowly: keep the chunk's latest clean prediction; where it is held, say what the model would for it."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.holdover.case import Case
from tests.holdover.naive.steps import StepTwin
from tests.holdover.toy import BLOCKS, FEW, MANY


class StepHold(StepTwin):
    """``memory["clean"]`` is the chunk's latest computed prediction, ``changed[branch, index]`` what a pass changed."""

    def __init__(
        self,
        *,
        hold: Any = (1, 2),
        tolerance: float = 0.06,
        refresh: int = 16,
        last: bool = True,
        prediction: str = "clean",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.hold, self.tolerance, self.refresh = hold, tolerance, refresh
        self.computes_last, self.prediction = last, prediction
        self.lasts = hold == "auto"
        self.changed: dict[tuple[str, int], float] = {}
        self.chunks: list[int] = []

    def runner(self, fields: dict[str, Any], run: Any) -> Any:
        """The whole model is one block, number 0, and its hidden state the noisy latents."""
        if fields.get("role") != "kv_update" and fields["chunk"] not in self.chunks:
            self.chunks.append(fields["chunk"])
        x = run(model=lambda x, **_: x)
        return super().runner(fields, lambda apply: apply(0, x, lambda _: run()))

    def block(self, number: int, x: Any, compute: Any) -> Any:
        fields, memory = self.now["fields"], self.now["memory"]
        reason, scores = self.decide(fields, memory)
        if reason == "reuse":
            return self.note(number, reason, self.returned(memory["clean"], x, fields["sigma"]), scores)
        y = compute(x)
        now = self.clean(y, x, fields["sigma"])
        if "clean" in memory:
            moved = math.sqrt(sum(each**2 for each in (now - memory["clean"]).flatten().tolist()))
            self.changed[fields["branch"], fields["index"]] = moved / float(now.norm())
        memory["clean"] = now
        return self.note(number, reason, y, scores)

    def decide(self, fields: dict[str, Any], memory: dict[Any, Any]) -> tuple[str, dict[str, float]]:
        if self.protection == "chunk" and fields["commits"]:
            return "kv cycle", {}
        if self.computes_last and fields["index"] == fields["num_steps"] - 1:
            return "last step", {}
        if self.hold == "auto":
            if self.chunks.index(fields["chunk"]) % self.refresh == 0:
                return "interval", {}
            if not memory:
                return "first", {}
        elif fields["index"] not in self.hold:
            return "interval", {}
        if self.now["renewed"]:
            return "condition", {}
        if not memory:
            return "first", {}
        if self.hold != "auto":
            return "reuse", {}
        known = fields["branch"], fields["index"]
        if known not in self.changed:
            return "history", {}
        scores = {"change": self.changed[known], "threshold": self.tolerance}
        return "reuse" if self.changed[known] < self.tolerance else "change", scores

    def clean(self, y: Any, x: Any, sigma: float) -> Any:
        """Solve the two equations of the prediction for the clean latents, in float64."""
        x, y, rest = x.double(), y.double(), math.sqrt(1 - sigma * sigma)
        if self.prediction == "clean":
            return y
        if self.prediction == "flow":  # x = (1 - sigma) c + sigma e, y = e - c
            return (x - sigma * y) / torch.tensor((1 - sigma) + sigma, dtype=torch.float64)
        if self.prediction == "noise":  # x = rest c + sigma e, y = e
            return (x - sigma * y) / rest
        return (rest * x - sigma * y) / (rest * rest + sigma * sigma)  # y = rest e - sigma c

    def returned(self, clean: Any, x: Any, sigma: float) -> Any:
        """What the model returns if the clean latents are these: first the noise that then is in x."""
        dtype, x, rest = x.dtype, x.double(), math.sqrt(1 - sigma * sigma)
        if self.prediction == "clean":
            return clean.to(dtype)
        share = 1 - sigma if self.prediction == "flow" else rest
        noise = (x - share * clean) / sigma
        if self.prediction == "flow":
            return (noise - clean).to(dtype)
        return (noise if self.prediction == "noise" else rest * noise - sigma * clean).to(dtype)


def case(sigmas: tuple[float, ...] = FEW, within: float = 0.0, **options: Any) -> Case:
    return Case("step_hold", StepHold, options, sigmas, {"blocks": BLOCKS}, tolerance=within)


#: The toy's levels from the second on: at σ = 1 predicted noise tells nothing.
BELOW = tuple(0.98 * sigma for sigma in FEW)

#: Of the default, (1, 2), many steps have too few to see anything.
DEFAULT = case(MANY, hold=(1, 2, 4, 5, 7, 8, 10, 11, 13, 14))
#: Options under which the trigger always computes.
CLOSED = case(MANY, hold=(24,))
#: Every option away from its default.
VARIED: list[Case] = [
    case(),
    case(hold=(1, 2, 3), last=False, protection="chunk"),
    case(hold="auto", tolerance=0.57, refresh=5),
    case(MANY, hold="auto", tolerance=0.1, protection="chunk", last=False),
    *(case(BELOW, 1e-5, prediction=kind) for kind in ("flow", "noise", "v")),
    case(BELOW, 1e-5, prediction="flow", hold="auto", tolerance=2.0, refresh=3),
]
