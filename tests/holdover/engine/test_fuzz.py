"""Whatever is done to a cache, in any order: every stream gives what it would give alone.

What is right is told by running a stream's own history again, in a cache of its own on a model of its own. Nightly:
``HOLDOVER_FUZZ=400 pytest tests/holdover/engine/test_fuzz.py`` runs 400 examples of 40 steps.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import holdover

EXAMPLES = int(os.environ.get("HOLDOVER_FUZZ", "12"))
STEPS, BLOCKS = 3, 4
#: Every error of the cache's own names what to do.
FIXES = (
    "reset(",
    "stream=",
    "branch=",
    "number every chunk anew",
    "do it between passes",
    "step(",
    "attach(",
    "fork into",
)

POLICIES: dict[str, Callable[[], holdover.Policy]] = {
    "xcache": lambda: holdover.xcache(front_anchors=0, tau_floor=0.9, margin=0.05),
    "reactive": lambda: holdover.policy("xcache_reactive", scale=0.5),
    "fbcache": lambda: holdover.policy("fbcache", threshold=0.5),
    "dicache": lambda: holdover.policy("dicache", threshold=0.5, retain=1),
    "taylorseer": lambda: holdover.policy("taylorseer", every=2),
    "bwcache": lambda: holdover.policy("bwcache", threshold=0.6, run=1),
    "delta_dit": lambda: holdover.policy("delta_dit", every=2),
    "fixed": lambda: holdover.fixed_interval(over="steps", every=2),
    "never": holdover.never,
}


class Bend(nn.Module):
    """Bends what enters, and fails when it is told to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.error: type[BaseException] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error("told to fail")
        return x + torch.sin(x * (self.number + 1)) / 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Bend(number) for number in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def holdover_slots(self) -> list[nn.Module]:
        return list(self.blocks)


#: One pass: the fields of its step, its input, and where and how it fails, if it does.
Run = tuple[dict[str, Any], float, tuple[int, type[BaseException]] | None]


def perform(model: Model, cache: holdover.Cache, stream: str, run: Run) -> Tensor | None:
    """The output of a pass; None of one that was told to fail, and did."""
    fields, level, failing = run
    x = torch.linspace(0.5, 1.5, 12).view(1, 4, 3) * level
    if failing is not None:
        model.blocks[failing[0]].error = failing[1]
    try:
        with cache.step(**fields, stream=stream), torch.no_grad():
            return model(x)
    except (RuntimeError, KeyboardInterrupt, MemoryError):
        assert failing is not None
        return None
    finally:
        for block in model.blocks:
            block.error = None


class Histories(RuleBasedStateMachine):
    """Histories by stream, and those of snapshots."""

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def begin(self, policy: str) -> None:
        self.make = POLICIES[policy]
        self.model = Model()
        self.plain = Model()
        self.attach()

    def attach(self) -> None:
        self.cache = holdover.attach(self.model, self.make())
        self.histories: dict[str, list[Run]] = {}
        self.alone: dict[str, tuple[Model, holdover.Cache]] = {}
        self.snapshots: list[tuple[holdover.Snapshot, list[Run]]] = []

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.detach()
            assert all("forward" not in block.__dict__ for block in self.model.blocks)

    @rule(
        stream=st.sampled_from("ab"),
        branch=st.sampled_from(["", "uncond"]),
        level=st.sampled_from([1.0, 1.001, 1.2, -1.0]),
        action=st.sampled_from([(0.5, 0.0), (0.1, 0.0)]),
        condition=st.sampled_from([None, "rain"]),
        new=st.booleans(),
        failing=st.none()
        | st.tuples(st.integers(0, BLOCKS - 1), st.sampled_from([RuntimeError, KeyboardInterrupt, MemoryError])),
    )
    def denoise(
        self, stream: str, branch: str, level: float, action: Any, condition: Any, new: bool, failing: Any
    ) -> None:
        chunk, index, known = self._next(stream, branch, new)
        action = known.get("action", action)
        fields = {"chunk": chunk, "index": index, "num_steps": STEPS, "branch": branch, "action": action}
        fields |= {"condition": condition, "commits": chunk % 4 == 0}
        self._both(stream, (fields, level, failing))

    @rule(stream=st.sampled_from("ab"), level=st.sampled_from([1.0, 2.0]))
    def write_kv(self, stream: str, level: float) -> None:
        run: Run = {"chunk": 0, "role": "kv_update"}, level, None
        output = self._both(stream, run)
        assert output is not None
        x = torch.linspace(0.5, 1.5, 12).view(1, 4, 3) * level
        assert torch.equal(output, self.plain(x))

    @rule(stream=st.sampled_from("ab"))
    def repeat(self, stream: str) -> None:
        done = [run for run in self.histories.get(stream, []) if run[0].get("role") is None and run[2] is None]
        if done:
            before = len(self.cache.trace)
            with pytest.raises(ValueError, match="ran already") as error:
                perform(self.model, self.cache, stream, done[-1])
            self._names_the_fix(error.value)
            assert len(self.cache.trace) == before

    @rule(stream=st.sampled_from("ab"))
    def nest(self, stream: str) -> None:
        with self.cache.step(chunk=10**6, stream="nested"):
            for act in (
                lambda: self.cache.reset(stream),
                lambda: self.cache.snapshot(stream),
                lambda: self.cache.step(chunk=10**6 + 1, stream="nested").__enter__(),
            ):
                with pytest.raises(ValueError, match="within a step") as error:
                    act()
                self._names_the_fix(error.value)
        assert "nested" not in self.cache.streams  # no model ran in it

    @rule(stream=st.sampled_from("ab"))
    def reset(self, stream: str) -> None:
        self.cache.reset(stream)
        self.histories.pop(stream, None)

    @rule(src=st.sampled_from("ab"), dst=st.sampled_from("ab"))
    def fork(self, src: str, dst: str) -> None:
        if not self._known(src):
            with pytest.raises(ValueError, match=f"no stream '{src}'; streams since reset"):
                self.cache.fork(src, dst)
        elif not self._known(dst):
            self.cache.fork(src, dst)
            self._alone(dst, self.histories[src])
        else:
            with pytest.raises(ValueError, match="exists") as error:
                self.cache.fork(src, dst)
            self._names_the_fix(error.value)

    @rule(stream=st.sampled_from("ab"))
    def snapshot(self, stream: str) -> None:
        if self._known(stream):
            self.snapshots.append((self.cache.snapshot(stream), copy.copy(self.histories[stream])))

    @precondition(lambda self: self.snapshots)
    @rule(stream=st.sampled_from("ab"), which=st.integers(0, 99))
    def restore(self, stream: str, which: int) -> None:
        snapshot, history = self.snapshots[which % len(self.snapshots)]
        self.cache.restore(stream, snapshot)
        self._alone(stream, history)

    @rule()
    def detach_and_attach(self) -> None:
        self.cache.detach()
        with pytest.raises(ValueError, match="detached") as error:
            self.cache.step(chunk=0)
        self._names_the_fix(error.value)
        assert torch.equal(self.model(torch.ones(1, 2, 3)), self.plain(torch.ones(1, 2, 3)))
        self.attach()

    @invariant()
    def nothing_is_open(self) -> None:
        if hasattr(self, "cache"):
            assert not self.cache.in_step
            assert self.cache.nbytes == sum(self.cache.stats(stream).bytes_held for stream in ["a", "b", "nested"])

    def _known(self, stream: str) -> bool:
        """Whether a denoising pass of the stream ended well."""
        return any(run[0].get("role") is None and run[2] is None for run in self.histories.get(stream, []))

    def _next(self, stream: str, branch: str, new: bool) -> tuple[int, int, dict[str, Any]]:
        """The next pass of the stream's latest chunk, or the first of a new one."""
        runs = [fields for fields, _, _ in self.histories.get(stream, []) if fields.get("role") is None]
        if not runs:
            return 0, 0, {}
        chunk = max(fields["chunk"] for fields in runs)
        done = [f for f, _, fails in self.histories[stream] if fails is None and f.get("role") is None]
        own = [f for f in done if f["chunk"] == chunk and f["branch"] == branch]
        if new or len(own) == STEPS:
            return chunk + 1, 0, {}
        return chunk, len(own), own[0] if own else {}

    def _both(self, stream: str, run: Run) -> Tensor | None:
        """The pass in the cache, and in the stream's own."""
        if stream not in self.histories:
            self._alone(stream, [])
        self.histories[stream].append(run)
        model, alone = self.alone[stream]
        output, expected = perform(self.model, self.cache, stream, run), perform(model, alone, stream, run)
        assert (output is None) == (expected is None)
        if output is not None:
            assert expected is not None
            assert torch.equal(output, expected)
            last, right = (
                [(d.branch, d.chunk, d.index, d.block, d.reason) for d in cache.trace[-BLOCKS:]]
                for cache in (self.cache, alone)
            )
            assert last == right
        return output

    def _alone(self, stream: str, history: list[Run]) -> None:
        """Run a history in a cache of its own, from now on that of the stream."""
        model = Model()
        alone = holdover.attach(model, self.make())
        for run in history:
            perform(model, alone, stream, run)
        self.histories[stream], self.alone[stream] = copy.copy(history), (model, alone)

    @staticmethod
    def _names_the_fix(error: ValueError) -> None:
        assert any(fix in str(error) for fix in FIXES), error


quick = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    derandomize=EXAMPLES == 12,
    suppress_health_check=list(HealthCheck),
)
TestHistories = pytest.mark.filterwarnings("ignore:.* could reuse nothing", "ignore:no block was asked")(
    Histories.TestCase
)
TestHistories.settings = quick
