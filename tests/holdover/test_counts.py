"""What each method costs besides the blocks, counted: host synchronisations, launches, bytes held. None may grow.

``counts.txt`` holds the figures. Where one falls, write it anew: ``python -m tests.holdover.test_counts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover.method import Call, Trigger, Verdict
from holdover.tune.counts import Counts, count
from tests.holdover.case import Case
from tests.holdover.engine.models import EAGER, Stack
from tests.holdover.registry import DEFAULTS
from tests.holdover.toy import FEW, ToyModel, cached, drive, one_thread

GOLDEN = Path(__file__).parent / "counts.txt"
HEADER = f"{'method':18} {'passes':>8} {'syncs':>8} {'launches':>8} {'bytes':>8}"


def counted(case: Case) -> Counts:
    """Three cycles of four chunks, or two chunks of many steps."""

    def loop(cache: holdover.Cache) -> list[Tensor]:
        running = case.loop()
        chunks = 12 if case.sigmas is FEW else 2
        return [running.step(model, action, cached(cache)) for action in drive(chunks)]

    model = ToyModel()
    with one_thread():
        return count(model, loop, case.policy())


def line(case: Case, found: Counts) -> str:
    return f"{case.name:18} {found.passes:8} {found.syncs:8} {found.launches:8} {found.bytes_held:8}"


def stored() -> dict[str, list[int]]:
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    assert lines[0] == HEADER
    return {name: [int(number) for number in numbers] for name, *numbers in map(str.split, lines[1:])}


def test_every_method_is_counted() -> None:
    assert sorted(stored()) == holdover.policies()


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_nothing_grows(case: Case) -> None:
    passes, *most = stored()[case.name]
    found = counted(case)
    assert found.passes == passes
    for name, limit in zip(("syncs", "launches", "bytes_held"), most, strict=True):
        number = getattr(found, name)
        assert number <= limit, f"{name}: {number}, and {limit} before"


def test_a_reused_pass_of_x_cache_waits_for_the_device_once() -> None:
    """A run of blocks is decided at once."""
    model = Stack(*(Doubling() for _ in range(6)))

    def loop(cache: holdover.Cache, chunks: int) -> None:
        for chunk in range(chunks):
            with cache.step(chunk=chunk, commits=False):
                model(torch.ones(1, 3, 2))

    syncs = [count(model, lambda cache, n=n: loop(cache, n), EAGER).syncs for n in (6, 7)]  # type: ignore[misc]
    assert syncs[1] - syncs[0] == 1


class Doubling(nn.Module):
    """Two launches and a synchronisation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        assert float(x.sum()) != 0
        return x * 2


class Counted(Trigger):
    """A guard that does what is to be counted, and lets nothing be reused."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def guard(self, call: Call) -> str:
        self.work(call.x)
        return "counted"

    def judge(self, call: Call, metrics: Mapping[str, float]) -> Verdict:
        raise AssertionError("the guard lets nothing pass")


@pytest.mark.parametrize(
    ("work", "syncs", "launches"),
    [
        (lambda x: x.sum().item(), 1, 1),
        (lambda x: x.tolist(), 1, 0),
        (lambda x: bool((x > 0).all()), 1, 2),
        (lambda x: float(x.mean()), 1, 1),
        (lambda x: x[x > 2], 1, 2),
        (lambda x: torch.equal(x, x), 1, 0),
        (lambda x: x.numpy(), 1, 0),
        (lambda x: (x.view(-1)[1:], x.transpose(0, 1), x.detach()), 0, 0),
        (lambda x: x + x * 2, 0, 2),
        (lambda x: None, 0, 0),
    ],
)
def test_what_is_counted(work: Any, syncs: int, launches: int) -> None:
    """Beyond what a policy that does nothing costs; what blocks do is theirs."""
    model = Stack(Doubling(), Doubling())

    def loop(cache: holdover.Cache) -> Tensor:
        with cache.step(chunk=0):
            output: Tensor = model(torch.ones(1, 3, 2))
        return output

    def measured(work: Any) -> Counts:
        return count(model, loop, replace(EAGER, trigger=Counted(work), look_ahead=1))

    plain, found = measured(lambda x: None), measured(work)
    assert (found.syncs - plain.syncs, found.launches - plain.launches) == (2 * syncs, 2 * launches)
    assert found.bytes_held > 0
    assert all("forward" not in block.__dict__ for block in model.blocks)


if __name__ == "__main__":
    GOLDEN.write_text("\n".join([HEADER, *(line(case, counted(case)) for case in DEFAULTS)]) + "\n", encoding="utf-8")
