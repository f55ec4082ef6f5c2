"""What one pass does to what is held: failures, changes of kind, roles, budgets."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons


def run(cache: holdover.Cache, model: nn.Module, x: Tensor, chunk: int, **fields: Any) -> Tensor:
    with cache.step(**{"chunk": chunk, "commits": False, **fields}):
        return model(x)


class Fragile(nn.Module):
    """Fails while told to."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise OSError("out of order")
        return x * 3


def test_a_failed_pass_leaves_nothing_half_written() -> None:
    model = Stack(Scale(), Fragile(), Scale())
    never_open = holdover.xcache(front_anchors=0, warmup=0, tau_floor=1.5)
    with holdover.attach(model, never_open) as cache:
        run(cache, model, ones(1), 0)
        before = cache.stats(), len(cache.trace), cache.nbytes
        numbers = dict(cache._runtimes[0].streams["default"].entries)
        model.blocks[1].broken = True
        with pytest.raises(OSError, match="out of order"):
            run(cache, model, ones(7), 1)
        assert (cache.stats().reasons, len(cache.trace)) == (before[0].reasons, before[1])
        assert cache.nbytes == before[2] * 2 // 3  # block 0's tensors were overwritten, hence given up
        assert cache.exact()
        model.blocks[1].broken = False
        run(cache, model, ones(1), 1)
        assert reasons(cache)[3:] == ["interrupted", "cosine", "cosine"]
        held = cache._runtimes[0].streams["default"].entries
        assert {key.block: entry.chunk for key, entry in held.items()} == {0: 1, 1: 1, 2: 1}
        assert numbers.keys() == held.keys()


def test_a_first_pass_that_fails_does_not_count_as_a_chunk() -> None:
    model = Stack(Fragile())
    with holdover.attach(model, holdover.xcache(front_anchors=0)) as cache:
        model.blocks[0].broken = True
        with pytest.raises(OSError):
            run(cache, model, ones(), 0)
        assert not cache.exact()
        model.blocks[0].broken = False
        run(cache, model, ones(), 1)
        run(cache, model, ones(), 2)
    assert reasons(cache) == ["warm-up", "reuse"]


def test_a_failed_reuse_keeps_what_is_held() -> None:
    model = Stack(Scale(), Fragile())
    with holdover.attach(model, EAGER, slots=["blocks.0"]) as cache:
        run(cache, model, ones(1), 0)
        model.blocks[1].broken = True
        with pytest.raises(OSError):
            run(cache, model, ones(5), 1)
        assert cache.exact()  # the failed chunk never was
        model.blocks[1].broken = False
        assert run(cache, model, ones(5), 1)[0, 0, 0] == 3 * 6
    assert reasons(cache) == ["first", "reuse"]


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (ones(5, tokens=4), "shape"),
        (ones(5, batch=2), "shape"),
        (ones(5).double(), "dtype"),
        (ones(5).bfloat16(), "dtype"),
    ],
)
def test_another_kind_of_hidden_state_is_computed(x: Tensor, reason: str) -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, ones(1), 0)
        output = run(cache, model, x, 1)
        assert torch.equal(output, x * 2)
        assert output.dtype == (x * 2).dtype
        assert torch.equal(run(cache, model, x + 1, 2), x + 1 + x)  # held anew
    assert reasons(cache) == ["first", reason, "reuse"]


def test_a_block_that_changes_the_shape_is_computed() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, ::2]

    model = Stack(Half())
    with holdover.attach(model, EAGER) as cache:
        for chunk in range(3):
            assert run(cache, model, ones(chunk), chunk).shape == (1, 2, 2)
        assert cache.nbytes == 0
    assert reasons(cache) == ["first", "shape", "shape"]


def test_a_block_that_changes_the_dtype_returns_it_when_reused() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).bfloat16()

    model = Stack(Narrow())
    with holdover.attach(model, EAGER) as cache:
        outputs = [run(cache, model, ones(value), chunk) for chunk, value in enumerate((1, 5))]
    assert outputs[1].dtype == torch.bfloat16
    assert outputs[1][0, 0, 0] == 6
    assert reasons(cache) == ["first", "reuse"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_signal_that_is_not_finite_is_computed(value: float) -> None:
    """One bad element is enough, wherever it lies: the mean sees every token."""
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        x = torch.ones(1, 100, 2)
        run(cache, model, x, 0)
        bad = x.clone()
        bad[0, 50, 1] = value
        torch.testing.assert_close(run(cache, model, bad, 1), bad * 2, equal_nan=True)
        assert torch.equal(run(cache, model, x * 5, 2), x * 10)  # what is held now is not finite either
        assert torch.equal(run(cache, model, x * 6, 3), x * 6 + x * 5)
    assert reasons(cache) == ["first", "nan", "nan", "reuse"]


def test_kv_updates_and_prefills_neither_read_nor_write_what_is_held() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        assert run(cache, model, ones(9), 0, role="prefill")[0, 0, 0] == 18
        assert cache.nbytes == 0
        run(cache, model, ones(1), 0)
        held = cache.nbytes
        assert run(cache, model, ones(9), 0, role="kv_update", commits=True, action=[1.0])[0, 0, 0] == 18
        assert (cache.nbytes, cache.exact()) == (held, True)
        assert run(cache, model, ones(5), 1)[0, 0, 0] == 6
        assert not cache.exact()
    assert reasons(cache) == ["prefill", "first", "kv update", "reuse"]
    assert cache.stats().skip == 0.5  # of the denoising passes


def test_a_block_runs_once_per_step() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        with pytest.raises(ValueError, match=r"'blocks\.0' ran twice within one step"), cache.step(chunk=0):
            model(model(ones()))
        with cache.step(chunk=0, role="kv_update"):
            assert model(model(ones()))[0, 0, 0] == 4


WHOLE = holdover.fixed_interval(span="all", front_anchors=0, warmup=0, every=2)


@pytest.mark.parametrize("policy", [holdover.never(), WHOLE], ids=["never", "fixed_interval"])
@pytest.mark.parametrize("chunk", [1, 2])  # of the interval, reused and computed
def test_blocks_that_need_no_decision_are_counted_and_checked_all_the_same(policy: holdover.Policy, chunk: int) -> None:
    """Those within a span, from the second chunk on."""
    model = Stack(Scale(), Fragile(), Scale(), Scale())
    computed, next_computed = policy is not WHOLE or chunk == 2, policy is not WHOLE or chunk == 1
    with holdover.attach(model, policy) as cache:
        for before in range(chunk):
            run(cache, model, ones(), before)
        known = len(cache.trace)
        assert run(cache, model, ones(2), chunk)[0, 0, 0] == (48 if computed else 25)
        assert [(d.block, d.slot, d.computed) for d in cache.trace][known:] == [
            (n, f"blocks.{n}", computed) for n in range(4)
        ]
        with pytest.raises(ValueError, match=r"'blocks\.1' ran twice within one step"), cache.step(chunk=chunk + 2):
            x = model.blocks[1](model.blocks[1](model.blocks[0](ones())))
        if next_computed:
            model.blocks[1].broken = True
            with pytest.raises(OSError, match="out of order"):
                run(cache, model, ones(), chunk + 2)
            model.blocks[1].broken = False
        assert len(cache.trace) == known + 4  # passes that failed are not told
        with pytest.raises(ValueError, match=r"'blocks\.2' ran outside any step"):
            model.blocks[2](ones())
        if not next_computed:
            with (
                pytest.raises(ValueError, match=r"left out block 'blocks\.1'"),
                cache.step(chunk=chunk + 2, commits=False),
            ):
                model.blocks[3](model.blocks[0](ones()))
            return
        with cache.step(chunk=chunk + 2, commits=False):
            x = model.blocks[3](model.blocks[0](ones()))  # a model that leaves out layers
        assert [d.block for d in cache.trace][known + 4 :] == [0, 3]
        assert x[0, 0, 0] == 4


def test_a_span_needs_the_order_of_its_slots() -> None:
    model = Stack(Scale(), Scale())
    policy = holdover.fixed_interval(span="all", front_anchors=0)
    with (
        holdover.attach(model, policy, slots=["blocks.1", "blocks.0"]) as cache,
        pytest.raises(ValueError, match="model's order"),
    ):
        run(cache, model, ones(), 0)


def test_steps_do_not_nest_and_streams_change_between_passes_only() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, ones(), 0)
        with cache.step(chunk=1, commits=False):
            for forbidden in (cache.reset, cache.snapshot, lambda: cache.fork("default", "b")):
                with pytest.raises(ValueError, match="within a step"):
                    forbidden()
            with pytest.raises(ValueError, match="within a step"), cache.step(chunk=2):
                pass
            assert model(ones(5))[0, 0, 0] == 6  # and none of it disturbed the open one


def test_a_step_in_which_the_model_does_not_run_changes_nothing() -> None:
    model = Stack(Scale())
    with holdover.attach(model, holdover.xcache(front_anchors=0)) as cache:
        with pytest.warns(UserWarning, match="no block was asked"), cache.step(chunk=0):
            pass
        run(cache, model, ones(), 1)
    assert reasons(cache) == ["warm-up"]


def test_max_bytes_caps_each_stream() -> None:
    model = Stack(Scale(), Scale(), Scale())
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, ones(), 0)
        per_slot = cache.nbytes // 3
    with holdover.attach(model, EAGER, max_bytes=2 * per_slot + 1) as cache:
        for chunk in range(3):
            for stream in ("a", "b"):
                output = run(cache, model, ones(chunk + 1), chunk, stream=stream)
                assert cache.stats(stream).bytes_held == 2 * per_slot
        assert cache.nbytes == 4 * per_slot
        # Two blocks add what they added at first, 1 and 2; the third is computed.
        assert output[0, 0, 0] == (3 + 1 + 2) * 2
        assert reasons(cache)[-3:] == ["reuse", "reuse", "bytes"]
        cache.reset("a")
        assert cache.nbytes == 2 * per_slot


def test_a_slot_computed_again_takes_its_own_place_under_the_cap() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, ones(), 0)
        per_slot = cache.nbytes
    never_open = holdover.xcache(front_anchors=0, warmup=0, tau_floor=1.5)
    with holdover.attach(model, never_open, max_bytes=per_slot) as cache:
        for chunk in range(3):
            run(cache, model, ones(), chunk)
            assert cache.nbytes == per_slot
    assert reasons(cache) == ["first", "cosine", "cosine"]


def test_a_cap_that_a_growing_slot_outgrows() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER, max_bytes=ones().nbytes * 3) as cache:
        run(cache, model, ones(1), 0)
        assert run(cache, model, ones(5), 1)[0, 0, 0] == 6
        run(cache, model, ones(1, tokens=30), 2)
        assert cache.nbytes == 0
        assert run(cache, model, ones(5), 3)[0, 0, 0] == 10
    assert reasons(cache) == ["first", "reuse", "shape", "bytes"]


def test_what_did_not_fit_under_a_cap_is_held_where_there_is_none() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, EAGER, max_bytes=1) as cache:
        run(cache, model, ones(), 0)
        snapshot = cache.snapshot()
    with holdover.attach(model, EAGER) as cache:
        cache.restore("default", snapshot)
        for chunk in range(1, 3):
            run(cache, model, ones(), chunk)
    assert reasons(cache) == ["bytes", "bytes", "reuse", "reuse"]


def test_reset_forgets_one_stream_or_all() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for stream in ("a", "b"):
            run(cache, model, ones(1), 0, stream=stream)
        cache.reset("a")
        assert run(cache, model, ones(5), 1, stream="a")[0, 0, 0] == 10
        assert run(cache, model, ones(5), 1, stream="b")[0, 0, 0] == 6
        cache.reset()
        assert cache.nbytes == 0
        assert run(cache, model, ones(5), 2, stream="b")[0, 0, 0] == 10


def test_fork_refuses_unknown_and_existing_streams() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, ones(1), 0, stream="a")
        with pytest.raises(ValueError, match="no stream 'b'; streams since reset: 'a'"):
            cache.fork("b", "c")
        with pytest.raises(ValueError, match="stream 'a' exists"):
            cache.fork("a", "a")


def test_exact_follows_the_latest_chunk_of_a_branch() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, holdover.xcache(front_anchors=0)) as cache:
        assert not cache.exact("default")
        for chunk, index, commits, expected in [
            (0, 0, True, True),
            (1, 0, False, False),
            (1, 1, False, False),
            (2, 0, True, True),
            (2, 1, True, True),
            (3, 1, False, False),
            (2, 2, True, True),  # back to an earlier chunk
        ]:
            run(cache, model, ones(), chunk, index=index, num_steps=3, commits=commits)
            assert cache.exact() is expected
        assert not cache.exact(branch="uncond")
        assert not cache.exact("elsewhere")


# A schedule that leaves nothing to reuse.


@pytest.mark.parametrize("policy", [holdover.xcache(warmup=3), holdover.fixed_interval(over="steps")], ids=repr)
def test_a_policy_that_can_reuse_nothing_warns_once(policy: holdover.Policy) -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, policy) as cache, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for chunk in range(30):
            run(cache, model, ones(), chunk, commits=True)
    assert len(caught) == 1
    assert "'kv cycle', pass step(commits=False)" in str(caught[0].message)
    assert "kv cycle" in str(caught[0].message)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", [holdover.never(), holdover.xcache(tau_floor=1.5), EAGER], ids=repr)
def test_a_policy_that_is_asked_or_never_would_does_not_warn(policy: holdover.Policy) -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, policy) as cache:
        for chunk in range(30):
            run(cache, model, ones(), chunk, commits=chunk % 4 == 0)


#: Reuses a chunk's first output at each of its further passes.
FIRST_OUTPUT = holdover.policy("taylorseer", every=99, order=0)


def test_chunks_in_flight_keep_what_they_hold_until_they_are_over() -> None:
    model = Stack(Scale())
    with holdover.attach(model, FIRST_OUTPUT) as cache:
        for index in range(3):
            for chunk in (0, 1):
                out = run(cache, model, ones(10 * chunk + index), chunk, index=index, num_steps=3)
                assert torch.equal(out, 2 * ones(10 * chunk))
            assert cache.nbytes == (2 * ones().nbytes if index < 2 else 0)  # those that are over free what they held
        run(cache, model, ones(), 2, num_steps=3)
        assert cache.nbytes == ones().nbytes
        assert [key.chunk for key in cache._runtimes[0].streams["default"].entries] == [2]


def test_a_chunk_that_is_given_up_is_freed_once_another_could_have_been_done() -> None:
    model = Stack(Scale())
    with holdover.attach(model, FIRST_OUTPUT) as cache:
        held = []
        for chunk in range(5):
            for index in range(2):  # of three: none is ever over
                run(cache, model, ones(), chunk, index=index, num_steps=3)
            held.append([key.chunk for key in cache._runtimes[0].streams["default"].entries])
        assert held == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_a_chunk_that_its_caller_gives_up_is_freed_at_once() -> None:
    model = Stack(Scale())
    with holdover.attach(model, FIRST_OUTPUT) as cache:
        for stream, chunk in (("a", 0), ("a", 1), ("b", 0)):
            run(cache, model, ones(), chunk, num_steps=3, stream=stream)
        one = cache.nbytes // 3
        cache.give_up(0, "a")
        cache.give_up(7, "a")
        cache.give_up(0, "unknown")
        assert cache.nbytes == 2 * one
        assert [key.chunk for key in cache._runtimes[0].streams["a"].entries] == [1]
        run(cache, model, ones(5), 0, index=1, num_steps=3, stream="a")  # it goes on nevertheless
        assert reasons(cache)[3:] == ["first"]
        run(cache, model, ones(5), 1, index=1, num_steps=3, stream="a")
        assert reasons(cache)[4:] == ["reuse"]
