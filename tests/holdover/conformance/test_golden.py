"""Decisions of every method as text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import holdover
from tests.holdover.conformance.runs import play
from tests.holdover.registry import CLOSED, DEFAULTS, VARIED, Case
from tests.holdover.toy import ToyModel, cached, one_thread

GOLDEN = Path(__file__).parents[1] / "golden"
LETTERS = {"reuse": "r", "kv cycle": "K", "warm-up": "W", "anchor": "A", "cosine": "c", "deviation": "d", "action": "!"}
LETTERS |= {
    "probe": "P",
    "retained": "R",
    "last step": "L",
    "history": "h",
    "led": "l",
    "change": "/",
    "drift": "+",
    "condition": "?",
    "interval": "i",
    "half": "H",
    "guide": "g",
    "kind": "m",
    "shallow": "S",
    "never": "n",
    "kv update": "U",
    "stale": "s",
    "step 0": "0",
    "first": "f",
    "new window": "w",
}

#: A method without a golden trace is compared with its twin alone; `write_golden` makes one.
GOLDEN_CASES = [case for case in DEFAULTS + VARIED if (GOLDEN / f"{case.id}.txt").is_file()]


def test_every_method_has_a_twin_and_every_golden_trace_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {case.id for case in GOLDEN_CASES}
    assert sorted(case.name for case in DEFAULTS) == holdover.policies()
    assert [case.name for case in CLOSED] == [case.name for case in DEFAULTS]


def golden_lines(cache: holdover.Cache) -> Iterator[tuple[str, list[float]]]:
    """Per pass a line of decisions, a letter per block, and the cosines behind them."""
    count = len({decision.block for decision in cache.trace})
    for start in range(0, len(cache.trace), count):
        blocks = cache.trace[start : start + count]
        letters = "".join(LETTERS[block.reason] for block in blocks)
        scores = [block.scores[name] for block in blocks for name in ("cosine", "change") if name in block.scores]
        yield f"{blocks[0].chunk:2} {blocks[0].index} {letters}", scores


@pytest.mark.parametrize("case", GOLDEN_CASES, ids=lambda case: case.id)
def test_golden_decisions(case: Case, model: ToyModel) -> None:
    """Decisions match the text exactly, scores to three decimals; none of them is on a knife's edge."""
    with holdover.attach(model, case.policy()) as cache:
        play(model, case.loop(), cached(cache), case.chunks)
    for decision in cache.trace:
        for name in {"drift", "change"} & decision.scores.keys():
            assert abs(decision.scores[name] - decision.scores["threshold"]) > 1e-5
        if "cosine" in decision.scores:
            assert abs(decision.scores["cosine"] - decision.scores["threshold"]) > 1e-3
            assert abs(decision.scores["deviation"] - case.options.get("tau_dev", 2.0)) > 1e-3
    golden = [line.split("|") for line in (GOLDEN / f"{case.id}.txt").read_text().splitlines()]
    lines = list(golden_lines(cache))
    assert [line for line, _ in lines] == [line.rstrip() for line, *_ in golden]
    for (_, scores), (_, *stored) in zip(lines, golden, strict=True):
        assert scores == pytest.approx([float(number) for text in stored for number in text.split()], abs=5e-4)


def write_golden(names: Sequence[str]) -> None:
    """Rewrite them: ``python -m tests.holdover.conformance.test_golden [policy ...]``, then read the difference."""
    for case in GOLDEN_CASES if not names else (case for case in DEFAULTS if case.name in names):
        model = ToyModel()
        with one_thread(), holdover.attach(model, case.policy()) as cache:
            play(model, case.loop(), cached(cache), case.chunks)
        lines = [
            f"{line} | {' '.join(f'{score:.4f}' for score in scores)}" if scores else line
            for line, scores in golden_lines(cache)
        ]
        (GOLDEN / f"{case.id}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_golden(sys.argv[1:])
