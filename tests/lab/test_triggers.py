"""WorldCache-HTC with other triggers, against what they are by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from holdover.methods.worldcache_htc import CHAOTIC, STABLE, TokenCurvature
from lab.methods_settings import TRIGGERS, Setting
from tests.holdover.methods.test_parts import call
from tests.holdover.methods.test_tokens import NUMBERS, Curve


def made(trigger: str = "", **options: Any) -> Any:
    return Setting(method="worldcache_htc", options=options, trigger=trigger).policy("plain", {})


def drift(part: TokenCurvature, *, shown: float) -> float:
    """Of a chaotic token that goes from (3, 0) to (3, 4) in the step after, and of one that is held."""
    v = torch.tensor([0.0, 4.0])
    y0 = torch.tensor([[[3.0, 0.0], [7.0, 7.0]]])
    outputs = {"y0": y0, "y1": y0 - 2 * v, "y2": y0 - 3 * v}
    group = torch.tensor([[CHAOTIC, STABLE]], dtype=torch.int8)
    held: Any = {
        "tensors": {**outputs, "kappa": torch.tensor([[0.25, 9.0]]), "group": group},
        "numbers": {**NUMBERS, "drift": 10.0, "shown": shown},
    }
    told = call(index=5, num_steps=9, held=held)
    return part.reused(told, part.predict(told))["drift"] - 10.0


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [("", 0.25 * 4), ("difference", 4 / 3), ("norm", (5 - 3) / 3), ("curvature", 0.25)],
)
def test_what_a_token_adds_to_the_drift(trigger: str, expected: float) -> None:
    assert drift(made(trigger).predictor, shown=NUMBERS["s0"]) == pytest.approx(expected)


def test_all_predict_alike_and_recompute_by_their_own() -> None:
    def run(policy: holdover.Policy) -> tuple[list[Tensor], list[bool]]:
        model = Curve()
        with holdover.attach(model, policy) as cache:
            shown = []
            for index in range(16):
                with cache.step(chunk=0, index=index, num_steps=16):
                    shown.append(model(torch.zeros(1, 20, 3), index / 16))
        return shown, [decision.computed for decision in cache.trace]

    options: dict[str, Any] = {"retain": 5, "n_max": 6, "eta": 1e9}
    expected, _ = run(made(**options))
    for trigger in TRIGGERS:
        shown, _ = run(made(trigger, **options))
        assert all(map(torch.equal, shown, expected))
        _, computed = run(made(trigger, **{**options, "eta": 1e-9}))
        assert computed[5:] == [False, True] * 5 + [True]  # every predicted step trips it, and the last is computed
    shown, computed = run(made("every 3", **{**options, "eta": 1e-9}))
    assert computed == [index < 5 or (index - 4) % 3 == 0 or index == 15 for index in range(16)]
    assert torch.equal(shown[5], expected[5])
    assert torch.equal(shown[6], expected[6])


def test_a_setting_names_its_trigger() -> None:
    names = [Setting(method="worldcache_htc", options={"eta": 1}, trigger=trigger).name for trigger in ("", "norm")]
    assert names == ["worldcache_htc(eta=1)", "worldcache_htc(eta=1, trigger=norm)"]
