"""What every registered policy must pass."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import holdover
from tests.holdover.registry import CLOSED, DEFAULTS, VARIED, Case
from tests.holdover.toy import Runner, StaggeredLoop, ToyLoop, ToyModel, cached, chunks_apart, drive, one_thread, plain

CHUNKS = 20

each = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.id)
#: A schedule has no gate to ask, and where it leaves nothing to reuse the engine says so.
closed = pytest.mark.filterwarnings("ignore:.* could reuse nothing")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> ToyModel:
    return ToyModel()


def condition(chunk: int) -> float:
    """Changes in the middle of a cycle."""
    return 0.0 if chunk < 17 else 0.3


def play(model: ToyModel, loop: ToyLoop, runner: Any, chunks: int = CHUNKS) -> list[Tensor]:
    start = loop.chunk
    return [loop.step(model, action, runner, condition(start + n)) for n, action in enumerate(drive(chunks, start))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def kv_tensors(loop: ToyLoop) -> list[Tensor]:
    return [tensor for kv in loop.kv.values() for pair in kv.values() for tensor in pair]


def decisions(cache: holdover.Cache, stream: str = "default") -> list[tuple[Any, ...]]:
    return [
        (d.branch, d.chunk, d.index, d.block, d.computed, d.reason, dict(d.scores))
        for d in cache.trace
        if d.stream == stream
    ]


def test_every_method_has_a_twin_and_every_golden_trace_a_case() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {case.id for case in GOLDEN_CASES}
    assert sorted(case.name for case in DEFAULTS) == holdover.policies()
    assert [case.name for case in CLOSED] == [case.name for case in DEFAULTS]


@closed
@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.id)
def test_a_gate_that_never_opens_changes_no_bit(case: Case, model: ToyModel) -> None:
    bare, attached = case.loop(), case.loop()
    expected = play(model, bare, plain)
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, attached, cached(cache))
    assert same(outputs, expected)
    assert same(kv_tensors(attached), kv_tensors(bare))
    assert cache.stats().reused == 0
    if "xcache" in case.name:
        assert cache.stats().reasons["cosine"] > 100  # the gate was asked, and said no


@each
def test_detach_restores_the_model(case: Case, model: ToyModel) -> None:
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    expected = play(model, case.loop(), plain, 6)
    cache = holdover.attach(model, case.policy())
    play(model, case.loop(), cached(cache), 2)
    with pytest.raises(RuntimeError), cache.step(chunk=2):
        model(torch.zeros(1, 7, 6), sigma=0.0, action=torch.zeros(1, 2))
    cache.detach()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes
    assert same(play(model, case.loop(), plain, 6), expected)


@closed
@pytest.mark.parametrize("case", DEFAULTS + CLOSED + VARIED, ids=lambda case: case.id)
def test_decisions_and_outputs_are_the_twins(case: Case, model: ToyModel) -> None:
    twin, loop, twin_loop = case.naive(), case.loop(), case.loop()
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, loop, cached(cache))
    expected = play(model, twin_loop, twin.runner)
    assert [(d.block, d.computed, d.reason) for d in cache.trace] == [
        (d["block"], d["computed"], d["reason"]) for d in twin.decisions
    ]
    for decision, naive in zip(cache.trace, twin.decisions, strict=True):
        assert decision.scores == pytest.approx(naive["scores"], rel=1e-4, abs=1e-5)
    for ours, theirs in ((outputs, expected), (kv_tensors(loop), kv_tensors(twin_loop))):
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours, theirs, rtol=case.tolerance, atol=case.tolerance)
    if case.name != "never" and case not in CLOSED:
        assert cache.stats().reused > 20


@each
def test_interleaved_streams_do_not_touch_each_other(case: Case, model: ToyModel) -> None:
    alone: dict[str, tuple[list[Tensor], list[tuple[Any, ...]]]] = {}
    for seed, stream in enumerate(("a", "b")):
        with holdover.attach(model, case.policy()) as cache:
            # Stream b runs four chunks behind, so that the two meet in different states.
            outputs = play(model, case.loop(seed=seed, stream=stream), cached(cache), CHUNKS - 4 * seed)
        alone[stream] = outputs, decisions(cache, stream)
    with holdover.attach(model, case.policy()) as cache:
        loops = {stream: case.loop(seed=seed, stream=stream) for seed, stream in enumerate(("a", "b"))}
        together: dict[str, list[Tensor]] = {"a": play(model, loops["a"], cached(cache), 4), "b": []}
        for _ in range(CHUNKS - 4):
            for stream, loop in loops.items():
                together[stream] += play(model, loop, cached(cache), 1)
    for stream, (outputs, trace) in alone.items():
        assert same(together[stream], outputs)
        assert decisions(cache, stream) == trace


in_flight = [case for case in DEFAULTS if case.policy().lifetime == "chunk"]


@pytest.mark.parametrize("case", in_flight, ids=lambda case: case.id)
def test_chunks_in_flight_do_not_touch_each_other(case: Case, model: ToyModel) -> None:
    """At staggered noise levels, taking turns, each decides as it would in a stream of its own."""

    def play_staggered(runner: Runner) -> list[Tensor]:
        loop = StaggeredLoop(branches=case.branches)
        return [loop.step(model, action, runner) for action in drive(5)]

    with holdover.attach(model, case.policy()) as alone:
        expected = play_staggered(chunks_apart(cached(alone)))
    with holdover.attach(model, case.policy()) as cache:
        outputs = play_staggered(cached(cache))
        assert len({key.chunk for key in cache._runtimes[0].streams["default"].entries}) == 3  # finished ones are freed
    assert same(outputs, expected)
    in_turn = sorted(decisions(cache), key=lambda decision: decision[1])
    assert in_turn == [decision for chunk in range(5) for decision in decisions(alone, str(chunk))]
    assert cache.stats().reused > 20


apart = [case for case in DEFAULTS if not case.policy().one_for_all_branches and len(case.branches) == 1]
together = [case for case in DEFAULTS + VARIED if case.policy().one_for_all_branches]


@pytest.mark.parametrize("case", apart, ids=lambda case: case.id)
def test_guidance_branches_do_not_touch_each_other(case: Case, model: ToyModel) -> None:
    """Each branch of a guided rollout decides as a branch of its own cache would, fed the same passes."""
    caches = []
    separate = {branch: ToyModel() for branch in ("cond", "uncond")}
    runners = {}
    for branch, own in separate.items():
        caches.append(holdover.attach(own, case.policy()))
        runners[branch] = cached(caches[-1])

    def runner(fields: dict[str, Any], run: Any) -> Tensor:
        return runners[fields["branch"]](fields, lambda: run(model=separate[fields["branch"]]))

    expected = play(model, case.loop(branches=("cond", "uncond")), runner)
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, case.loop(branches=("cond", "uncond")), cached(cache))
    assert same(outputs, expected)
    for own, branch in zip(caches, separate, strict=True):
        assert decisions(own) == [decision for decision in decisions(cache) if decision[0] == branch]
        own.detach()


@pytest.mark.parametrize("case", together, ids=lambda case: case.id)
def test_guidance_branches_share_a_decision(case: Case, model: ToyModel) -> None:
    """Histories stay apart; what the first branch of a pass computes, all compute."""
    twin, branches = case.naive(), ("cond", "uncond")
    expected = play(model, case.loop(branches=branches), twin.runner)
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, case.loop(branches=branches), cached(cache))
    assert [(d.block, d.computed, d.reason) for d in cache.trace] == [
        (d["block"], d["computed"], d["reason"]) for d in twin.decisions
    ]
    assert same(outputs, expected)
    first, second = ([d.computed for d in cache.trace if d.branch == branch] for branch in branches)
    assert first == second
    assert cache.stats().reasons["branch"] > 20


RESUME = """
import pickle, sys
import torch
import holdover
from pathlib import Path
from tests.holdover.registry import DEFAULTS
from tests.holdover.test_conformance import decisions, play
from tests.holdover.toy import ToyModel, cached

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for case in (case for case in DEFAULTS if (folder / f"{case.name}.loop").is_file()):
    loop = pickle.loads((folder / f"{case.name}.loop").read_bytes())
    model = ToyModel()
    with holdover.attach(model, case.policy()) as cache:
        cache.restore("default", holdover.Snapshot.load(folder / f"{case.name}.safetensors"))
        outputs = play(model, loop, cached(cache), 14)
    (folder / f"{case.name}.result").write_bytes(pickle.dumps((outputs, decisions(cache), loop)))
"""


@pytest.fixture(scope="module")
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Per policy: outputs, decisions and loop of a run, whole and continued in a fresh process after 6 chunks."""
    folder: Path = tmp_path_factory.mktemp("snapshots")
    mine = "test_a_snapshot_continues_in_a_fresh_process["
    wanted = {item.callspec.params["case"].name for item in request.session.items if item.name.startswith(mine)}
    whole = {}
    for case in (case for case in DEFAULTS if case.name in wanted):
        model, loop = ToyModel(), case.loop()
        with one_thread(), holdover.attach(model, case.policy()) as cache:
            play(model, loop, cached(cache), 6)
            cache.snapshot().save(folder / f"{case.name}.safetensors")
            (folder / f"{case.name}.loop").write_bytes(pickle.dumps(loop))
            cache.trace.clear()
            whole[case.name] = play(model, loop, cached(cache), 14), decisions(cache), loop
    subprocess.run([sys.executable, "-c", RESUME, str(folder)], check=True, cwd=Path(__file__).parents[2])
    return {name: (*run, *pickle.loads((folder / f"{name}.result").read_bytes())) for name, run in whole.items()}


@each
def test_a_snapshot_continues_in_a_fresh_process(case: Case, resumed: dict[str, tuple[Any, ...]]) -> None:
    outputs, trace, loop, resumed_outputs, resumed_trace, resumed_loop = resumed[case.name]
    assert same(resumed_outputs, outputs)
    assert resumed_trace == trace
    assert same(kv_tensors(resumed_loop), kv_tensors(loop))


@each
def test_a_fork_goes_its_own_way(case: Case, model: ToyModel) -> None:
    def run(turn: float | None, cache: holdover.Cache, loop: ToyLoop) -> list[Tensor]:
        actions = [action if turn is None else (0.5, turn) for action in drive(8, 6)]
        return [loop.step(model, action, cached(cache)) for action in actions]

    expected = []
    for turn in (None, -0.4):
        with holdover.attach(model, case.policy()) as cache:
            loop = case.loop()
            play(model, loop, cached(cache), 6)
            expected.append(run(turn, cache, loop))
    with holdover.attach(model, case.policy()) as cache:
        loop = case.loop()
        play(model, loop, cached(cache), 6)
        fork = copy.deepcopy(loop)
        fork.stream = "fork"
        cache.fork("default", "fork")
        forked = run(-0.4, cache, fork)  # first, so that it would spoil the original if they shared a tensor
        assert same(run(None, cache, loop), expected[0])
        assert same(forked, expected[1])


@pytest.mark.parametrize("case", DEFAULTS + VARIED, ids=lambda case: case.id)
def test_kv_updates_are_computed_in_full(case: Case, model: ToyModel) -> None:
    with holdover.attach(model, case.policy()) as cache:
        play(model, case.loop(), cached(cache))
    updates = [decision for decision in cache.trace if decision.role == "kv_update"]
    blocks = {(decision.branch, decision.block) for decision in cache.trace}
    assert len(updates) == len(blocks) * CHUNKS // 4
    assert all(decision.computed and decision.reason == "kv update" for decision in updates)


@each
def test_poison_never_reaches_the_kv_cache(case: Case, model: ToyModel) -> None:
    expected, policy = case.loop(), case.protected().policy()
    with holdover.attach(model, policy) as cache:
        play(model, expected, cached(cache), 8)
    loop = case.loop()
    with holdover.attach(model, policy) as cache:
        play(model, loop, cached(cache), 4)
        play(model, loop, poisoned(cache, everything=True), 1)  # protected: it uses none of the poison
        outputs = play(model, loop, poisoned(cache, everything=False), 3)
    assert all(tensor.isfinite().all() for tensor in kv_tensors(loop))
    assert same(kv_tensors(loop), kv_tensors(expected))
    if case.name in ("easycache", "bwcache"):  # their gates look at the outputs that the predictor holds
        assert all(output.isfinite().all() for output in outputs)
    elif case.name != "never":
        assert any(output.isnan().any() for output in outputs)  # the poison was real


@each
def test_a_poisoned_signal_is_computed_and_other_poison_shows(case: Case, model: ToyModel) -> None:
    with holdover.attach(model, case.policy()) as cache:
        loop = case.loop()
        play(model, loop, cached(cache), 5)
        before = cache.stats()
        outputs = play(model, loop, poisoned(cache, everything=True), 1)
        after = cache.stats()
    if case.policy().trigger.signal is not None:
        assert after.reused == before.reused
        assert after.reasons["nan"] > 0
    assert all(output.isfinite().all() for output in outputs) == (after.reused == before.reused)


def poisoned(cache: holdover.Cache, *, everything: bool) -> Any:
    """Runs every pass after poisoning all that is held."""

    def runner(fields: dict[str, Any], run: Any) -> Tensor:
        poison(cache, everything=everything)
        return cached(cache)(fields, run)

    return runner


def poison(cache: holdover.Cache, *, everything: bool) -> None:
    """Fill what is held with NaN: every tensor, or all but the signal, which is what a gate can see."""
    for stream in cache._runtimes[0].streams.values():
        for held in stream.entries.values():
            remembered = (item for own in held.memory.values() for item in own.items())
            for name, tensor in (*held.tensors.items(), *remembered):
                if tensor.is_floating_point() and (everything or name != "signal"):
                    tensor.fill_(float("nan"))


GOLDEN = Path(__file__).parent / "golden"
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
    """Rewrite golden traces: ``python -m tests.holdover.test_conformance [policy ...]``, then read the difference."""
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
