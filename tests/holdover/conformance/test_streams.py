"""Streams, chunks in flight, branches, forks and snapshots do not touch each other."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import holdover
from tests.holdover.conformance.runs import decisions, each, kv_tensors, play, same
from tests.holdover.registry import DEFAULTS, VARIED, Case
from tests.holdover.toy import Runner, StaggeredLoop, ToyLoop, ToyModel, cached, chunks_apart, drive, one_thread


@each
def test_interleaved_streams_do_not_touch_each_other(case: Case, model: ToyModel) -> None:
    alone: dict[str, tuple[list[Tensor], list[tuple[Any, ...]]]] = {}
    for seed, stream in enumerate(("a", "b")):
        with holdover.attach(model, case.policy()) as cache:
            # Stream b runs four chunks behind, so that the two meet in different states.
            outputs = play(model, case.loop(seed=seed, stream=stream), cached(cache), case.length - 4 * seed)
        alone[stream] = outputs, decisions(cache, stream)
    with holdover.attach(model, case.policy()) as cache:
        loops = {stream: case.loop(seed=seed, stream=stream) for seed, stream in enumerate(("a", "b"))}
        together: dict[str, list[Tensor]] = {"a": play(model, loops["a"], cached(cache), 4), "b": []}
        for _ in range(case.length - 4):
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

    expected = play(model, case.loop(branches=("cond", "uncond")), runner, case.length)
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, case.loop(branches=("cond", "uncond")), cached(cache), case.length)
    assert same(outputs, expected)
    for own, branch in zip(caches, separate, strict=True):
        assert decisions(own) == [decision for decision in decisions(cache) if decision[0] == branch]
        own.detach()


@pytest.mark.parametrize("case", together, ids=lambda case: case.id)
def test_guidance_branches_share_a_decision(case: Case, model: ToyModel) -> None:
    """Histories stay apart; what the first branch of a pass computes, all compute."""
    twin, branches = case.naive(), ("cond", "uncond")
    expected = play(model, case.loop(branches=branches), twin.runner, case.length)
    with holdover.attach(model, case.policy()) as cache:
        outputs = play(model, case.loop(branches=branches), cached(cache), case.length)
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
from tests.holdover.conformance.runs import decisions, play
from tests.holdover.toy import ToyModel, cached

torch.set_num_threads(1)
folder = Path(sys.argv[1])
for case in (case for case in DEFAULTS if (folder / f"{case.name}.loop").is_file()):
    loop = pickle.loads((folder / f"{case.name}.loop").read_bytes())
    model = ToyModel()
    with holdover.attach(model, case.policy()) as cache:
        cache.restore("default", holdover.Snapshot.load(folder / f"{case.name}.safetensors"))
        outputs = play(model, loop, cached(cache), case.length - 6)
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
            whole[case.name] = play(model, loop, cached(cache), case.length - 6), decisions(cache), loop
    subprocess.run([sys.executable, "-c", RESUME, str(folder)], check=True, cwd=Path(__file__).parents[3])
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
        actions = [action if turn is None else (0.5, turn) for action in drive(case.length - 6, 6)]
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
