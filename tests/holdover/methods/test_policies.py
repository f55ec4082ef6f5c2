"""The policies' options, and what sets each method apart."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import holdover
from holdover.methods.registry import method
from tests.holdover.engine.models import Scale, Stack, ones, reasons
from tests.holdover.registry import CLOSED, DEFAULTS, VARIED, Case


def test_policies_are_found_by_name() -> None:
    assert {"fixed_interval", "never", "xcache", "xcache_reactive"} <= set(holdover.policies())
    assert holdover.policy("xcache", tau_floor=0.95) == holdover.xcache(tau_floor=0.95) != holdover.xcache()
    assert holdover.policy("xcache_reactive", scale=0.1, warmup=2) == holdover.xcache_reactive(scale=0.1, warmup=2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("xcahce", {}, "no policy 'xcahce'; did you mean 'xcache'"),
        ("teapot", {}, r"no policy 'teapot'; holdover.policies\(\) lists them"),
        ("xcache", {"tau_flor": 0.9}, "xcache has no option 'tau_flor'; did you mean 'tau_floor'"),
        ("xcache_reactive", {"marign": 0.9}, "has no option 'marign'; did you mean 'margin'"),
        ("never", {"every": 2}, "never has no option 'every'; its options are: none"),
        ("xcache", {"tau_floor": 2.5}, "tau_floor=2.5 is not between -1 and 2"),
        ("xcache", {"margin": -0.1}, "margin=-0.1 is not between 0 and 2"),
        ("xcache", {"alpha": 1.1}, "alpha=1.1 is not between 0 and 1"),
        ("xcache", {"alpha": float("nan")}, "alpha=nan is not between 0 and 1"),
        ("xcache", {"tau_dev": -1}, "tau_dev=-1 is negative"),
        ("xcache", {"tokens": 0}, "tokens=0: give a whole number, 1 or more"),
        ("xcache", {"warmup": 1.5}, "warmup=1.5: give a whole number, 0 or more"),
        ("xcache", {"front_anchors": -1}, "front_anchors=-1: give a whole number"),
        ("xcache", {"back_anchors": -1}, "back_anchors=-1: give a whole number"),
        ("xcache", {"max_staleness": 0}, "max_staleness=0: give a whole number, 1 or more"),
        ("xcache", {"protection": "off"}, "protection='off' is not one of 'chunk', 'pass'"),
        ("xcache", {"step0": True}, "step0=True is not one of 'off', 'full', 'relaxed'"),
        ("xcache_reactive", {"scale": 0}, "scale=0 is not positive"),
        ("xcache_reactive", {"scale": ()}, r"scale=\(\) is not positive"),
        ("xcache_reactive", {"scale": [0.1, -1]}, r"scale=\(0.1, -1\) is not positive"),
        ("fixed_interval", {"every": 1}, r"every=1 reuses nothing; give 2 or more, or use never\(\)"),
        ("fixed_interval", {"over": "blocks"}, "over='blocks' is not one of 'steps', 'chunks'"),
        ("fixed_interval", {"span": "half"}, "span='half' is not one of 'block', 'all'"),
        ("fixed_interval", {"protection": None}, "protection=None is not one of"),
        ("easycache", {"threshold": -0.1}, "threshold=-0.1 is negative"),
        ("easycache", {"retain": 1.5}, "retain=1.5: give a whole number of first steps, or a share"),
        ("easycache", {"protection": "off"}, "protection='off' is not one of"),
        ("magcache", {}, "ratios is empty; give one magnitude ratio per step"),
        ("magcache", {"ratios": [1.0, -0.1]}, r"ratios=\(1.0, -0.1\) are not all positive numbers"),
        ("magcache", {"ratios": [1.0, float("nan")]}, "are not all positive numbers"),
        ("magcache", {"ratios": [1.0], "threshold": -1}, "threshold=-1 is negative"),
        ("magcache", {"ratios": [1.0], "max_skips": 0}, "max_skips=0: give a whole number, 1 or more"),
        ("magcache", {"ratios": [1.0], "retain": -1}, "retain=-1: give a whole number"),
        ("magcache", {"ratios": [1.0], "protection": "off"}, "protection='off' is not one of"),
        ("bwcache", {"threshold": float("nan")}, "threshold=nan is negative"),
        ("bwcache", {"run": 0}, "run=0: give a whole number of steps, 1 or more, or a share"),
        ("bwcache", {"run": 0.0}, "run=0.0: give a whole number"),
        ("bwcache", {"retain": -1}, "retain=-1: give a whole number"),
        ("bwcache", {"protection": "off"}, "protection='off' is not one of"),
        ("taylorseer", {"every": 1}, "every=1 reuses nothing"),
        ("taylorseer", {"order": 3}, "order=3: give 0, 1 or 2"),
        ("taylorseer", {"span": "half"}, "span='half' is not one of 'all', 'block'"),
        ("taylorseer", {"retain": 1.5}, "retain=1.5: give a whole number of first steps, or a share"),
        ("taylorseer", {"protection": "off"}, "protection='off' is not one of"),
        ("delta_dit", {"every": 0}, "every=0 reuses nothing"),
        ("delta_dit", {"early": 1.1}, "early=1.1 is not a share of the steps"),
        ("delta_dit", {"retain": -1}, "retain=-1: give a whole number"),
        ("delta_dit", {"protection": "off"}, "protection='off' is not one of"),
    ],
)
def test_wrong_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.policy(name, **options)


@pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.name)
def test_a_repr_tells_policies_apart(case: Case) -> None:
    assert repr(case.policy()) == repr(case.policy())
    assert repr(case.policy()).startswith(f"Policy(name='{case.name}'")
    if case.name != "never":
        others = [other for other in CLOSED + VARIED if other.name == case.name]
        options = {repr(other.options) for other in [case, *others]}
        assert len({repr(other.policy()) for other in [case, *others]}) == len(options) > 2


def chunk(cache: holdover.Cache, model: Stack, chunk: int, action: tuple[float, ...], **fields: Any) -> list[str]:
    """Two passes; what block 1 of each was told."""
    before = len(cache.trace)
    for index in range(2):
        step = {"chunk": chunk, "index": index, "num_steps": 2, "action": action, "commits": False}
        with cache.step(**{**step, **fields}):
            model(ones())
    return [decision.reason for decision in cache.trace[before:] if decision.block == 1]


def test_xcache_does_not_see_a_car_brake_and_xcache_reactive_does() -> None:
    for policy, seen in ((holdover.xcache(), "reuse"), (holdover.xcache_reactive(), "action")):
        model = Stack(Scale(), Scale())
        with holdover.attach(model, policy) as cache:
            chunk(cache, model, 0, (0.8, 0.0))
            assert chunk(cache, model, 1, (0.8, 0.0)) == ["reuse"] * 2
            assert chunk(cache, model, 2, (0.2, 0.0)) == [seen] * 2
            assert cache.exact() == (seen == "action")


def test_small_changes_of_the_action_add_up() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, holdover.xcache_reactive(scale=0.05)) as cache:
        told = [chunk(cache, model, n, (0.5 + 0.02 * n,))[0] for n in range(8)]
    # Compared with the latest full chunk, 0, then 3, then 6; not with the one before.
    assert told == ["warm-up", "reuse", "reuse", "action", "reuse", "reuse", "action", "reuse"]


def test_a_chunk_that_stopped_early_is_no_full_one() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, holdover.xcache_reactive()) as cache:
        chunk(cache, model, 0, (0.5,))
        with cache.step(chunk=1, index=0, num_steps=2, action=(0.9,), commits=False):
            model(ones())  # pass 1 of this chunk never runs, so its slots still hold action 0.5
        assert chunk(cache, model, 2, (0.9,)) == ["action"] * 2
        assert chunk(cache, model, 3, (0.9,)) == ["reuse"] * 2


def test_scales_are_per_dimension() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, holdover.xcache_reactive(scale=(0.5, 0.01))) as cache:
        told = [chunk(cache, model, n, action)[0] for n, action in enumerate([(0, 0), (0.4, 0), (0, 0.02), (0, 0.02)])]
    assert told == ["warm-up", "reuse", "action", "reuse"]


def test_fixed_interval_ties_with_xcache_on_steady_driving() -> None:
    """With the interval of the cadence, the control computes the very same blocks."""
    computed = []
    for policy in (holdover.xcache(), holdover.fixed_interval(every=4)):
        model = Stack(Scale(), Scale(), Scale())
        with holdover.attach(model, policy) as cache:
            for n in range(16):
                chunk(cache, model, n, (0.5,), commits=n % 4 == 0)
        computed.append([decision.computed for decision in cache.trace])
    assert computed[0] == computed[1]
    assert computed[0].count(False) == 12 * 2 * 2


def test_over_steps_nothing_outlives_its_chunk() -> None:
    model = Stack(Scale())
    policy = holdover.fixed_interval(over="steps", every=2, front_anchors=0, warmup=0)
    with holdover.attach(model, policy) as cache:
        for chunk, index in [(0, 0), (0, 1), (1, 1), (1, 3)]:  # chunk 1 starts late
            with cache.step(chunk=chunk, index=index, num_steps=4, commits=False):
                model(ones())
    assert reasons(cache) == ["interval", "reuse", "first", "reuse"]


def test_one_span_holds_one_residual() -> None:
    model = Stack(Scale(), Scale(3), Scale(5), Scale(7))
    policy = holdover.fixed_interval(span="all", back_anchors=1, every=3)
    with holdover.attach(model, policy) as cache:
        for chunk, value in enumerate((1, 10)):
            with cache.step(chunk=chunk, commits=False):
                output = model(ones(value))
        assert cache.nbytes == 3 * ones().nbytes  # each anchor's residual and the span's
    # Block 0 doubles, the span adds what it added to 2, that is 30 - 2, and block 3 multiplies by 7.
    assert torch.equal(output, (ones(20) + 28) * 7)
    assert reasons(cache)[4:] == ["anchor", "reuse", "reuse", "anchor"]
    assert [block.calls for block in model.blocks] == [2, 1, 1, 2]


def test_every_method_is_a_short_file_with_a_twin_and_a_row() -> None:
    root = Path(__file__).parents[3]
    rows = (root / "docs" / "methods.md").read_text()
    assert len(holdover.policies()) >= 16
    for name in holdover.policies():
        source = Path(inspect.getfile(method(name)))
        assert source.stem == name
        assert len(source.read_text().splitlines()) <= 300, name
        assert (root / "tests" / "holdover" / "naive" / f"{name}.py").is_file(), name
        assert f"| `{name}(" in rows, name
