"""The training loop: a run that was killed, averaged weights, number formats, the rates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from holdover_world.training import trainer
from holdover_world.training.trainer import Predict, Schedule, fit, muon_precision, read_log

SCHEDULE = Schedule(steps=8, batch=2, warmup=2)
Weights = dict[str, list[float]]
Draw = Callable[[int, np.random.Generator], Tensor]


class Small(nn.Module):
    """Matrices for Muon, the rest for AdamW; ``seldom`` has no part in every sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.seldom = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x.to(self.seldom.dtype)))
        y: Tensor = self.last(hidden * self.seldom if x[0, 0] > 0 else hidden)
        return y


def inputs(_: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal((2, 4), np.float32))


def squared(predict: Predict, x: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
    target = x.sum(1, keepdim=True) + float(rng.standard_normal()) / 9
    return (predict(x).float() - target).square().mean(), {"mean": float(x.mean())}


def run(
    out: Path,
    schedule: Schedule = SCHEDULE,
    *,
    kind: str = "small",
    draw: Draw = inputs,
    loss: Any = squared,
    cut_save: int = 0,
) -> Weights:
    """Train and return the averaged weights that were saved last; ``cut_save``: the save in which to be killed."""
    saved: Weights = {}
    saves = itertools.count(1)

    def save(average: Mapping[str, Tensor]) -> None:
        if next(saves) == cut_save:
            raise KeyboardInterrupt
        saved.update({name: value.flatten().tolist() for name, value in average.items()})

    def validate(predict: Predict) -> dict[str, Any]:
        return {"at_one": predict(torch.ones(1, 4)).item()}

    identity = {"kind": kind}
    fit(Small(), out, schedule, identity=identity, plan=draw, loss=loss, save=save, validate=validate, save_every=3)
    return saved


def curve(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(out)]


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    calls = 0

    def power_cut(*args: Any) -> tuple[Tensor, dict[str, Any]]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return squared(*args)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", loss=power_cut)
    assert len(curve(tmp_path / "cut")) == 5  # two more than were saved
    assert run(tmp_path / "cut") == whole
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert [line["step"] for line in curve(tmp_path / "cut") if "at_one" in line] == [2, 5, 7]
    with pytest.raises(ValueError, match=r"cut was trained with steps=8, not 9: use the same, or another folder"):
        run(tmp_path / "cut", Schedule(steps=9, batch=2, warmup=2))
    with pytest.raises(ValueError, match=r"cut was trained with kind=small, not large: use the same"):
        run(tmp_path / "cut", kind="large")


@pytest.mark.parametrize("cut_save", [2, 3])  # the last
def test_a_run_killed_while_it_saved_goes_on_as_if_nothing_had_been(tmp_path: Path, cut_save: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", cut_save=cut_save)
    assert run(tmp_path / "cut") == whole
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_run_that_was_never_saved_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 99}\n')
    run(tmp_path)
    assert [line["step"] for line in curve(tmp_path)] == list(range(8))


def test_the_average_is_an_exponential_one_of_the_weights(tmp_path: Path) -> None:
    """Without momentum to speak of at first: after n steps the decay is n / (n + 9), at most ``ema``."""
    model, seen = Small(), []

    def watch(predict: Predict, x: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        seen.append(model.seldom.detach().clone())
        return squared(predict, x, rng)

    saved: dict[str, Tensor] = {}
    schedule = Schedule(steps=8, batch=2, warmup=2, ema=0.3)
    fit(model, tmp_path, schedule, identity={}, plan=inputs, loss=watch, save=lambda average: saved.update(average))
    expected = seen[0]
    for n, weights in enumerate([*seen[1:], model.seldom.detach()], 1):
        decay = min(0.3, n / (n + 9))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(saved["seldom"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_used_in_what_is_fast_and_kept_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(trainer, "fast_dtype", lambda _device: dtype)
    kinds, updates = set(), set()
    step = torch.optim.Muon.step

    def watched_step(self: torch.optim.Muon) -> None:
        updates.add(torch.zeros(1).bfloat16().dtype)  # what Muon turns its update into
        step(self)

    monkeypatch.setattr(torch.optim.Muon, "step", watched_step)

    def watch(predict: Predict, x: Tensor, rng: np.random.Generator) -> tuple[Tensor, dict[str, Any]]:
        kinds.add(predict(x).dtype)
        return squared(predict, x, rng)

    saved = run(tmp_path, loss=watch)
    assert kinds == updates == {dtype}
    values = torch.tensor(saved["first.weight"])
    assert not torch.equal(values, values.bfloat16().float())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, (0, 1e-5)), (torch.bfloat16, (1e-4, 0.1))])
def test_muon_computes_in_what_is_fast(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: tuple[float, float]
) -> None:
    monkeypatch.setattr(trainer, "fast_dtype", lambda _device: dtype)
    gradient = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    matrix = nn.Parameter(torch.zeros(6, 16))
    matrix.grad = gradient.clone()
    with muon_precision(matrix.device):
        torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0).step()
    # Newton and Schulz's iteration leaves singular vectors as they are and takes singular values through a polynomial.
    left, values, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    wrong = (matrix.double() + left @ values.diag() @ right).abs().max()
    assert error[0] <= wrong <= error[1]
    torch.testing.assert_close(matrix.grad, gradient, rtol=0, atol=0)


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    schedule = Schedule(steps=100, batch=1, warmup=10, decay=0.5)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == schedule.rate(50) == 1
    assert schedule.rate(75) == pytest.approx(0.5)
    assert schedule.rate(99) == pytest.approx(0.02)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch": 0}, {"warmup": 0}, {"decay": 1.5}])
def test_impossible_schedules_are_refused(changes: dict[str, Any]) -> None:
    [(name, value)] = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Schedule(**{"steps": 1, "batch": 1, **changes})
