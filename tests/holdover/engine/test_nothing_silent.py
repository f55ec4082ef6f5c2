"""What other caches get wrong in silence is right here, or an error that names the fix."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons
from tests.holdover.registry import DEFAULTS, Case
from tests.holdover.toy import PER_FRAME, ToyLoop, ToyModel, cached, drive

each = pytest.mark.parametrize("case", DEFAULTS, ids=lambda case: case.id)
hungry = holdover.policy("fbcache", threshold=1e9)


# A place that has run is not taken for a new one.


@each
def test_a_pass_that_ran_is_not_run_again(case: Case) -> None:
    model = ToyModel()
    with holdover.attach(model, case.policy()) as cache:
        fields: dict[str, Any] = {"chunk": 0, "num_steps": 24, "action": [0.1, 0.2]}

        def run(**more: Any) -> None:
            x = torch.zeros(1, 4 * PER_FRAME, 6)
            with cache.step(**{**fields, **more}), torch.no_grad():
                model(x, sigma=0.5, action=torch.zeros(1, 2))

        run()
        with pytest.raises(ValueError, match=r"ran already; call reset\('default'\).* stream= .*branch="):
            run()
        run(branch="uncond")
        run(stream="another")
        run(index=1)
        with pytest.raises(ValueError, match="ran already"):
            run(index=1)
        cache.reset()
        run()


def test_a_pass_that_failed_may_be_tried_again() -> None:
    model = Stack(Scale(), Scale())
    for kind in (KeyboardInterrupt, MemoryError, RuntimeError):
        with holdover.attach(model, hungry) as cache:
            failing = model.blocks[1].register_forward_pre_hook(lambda *_, kind=kind: (_ for _ in ()).throw(kind()))
            with pytest.raises(kind), cache.step(chunk=0, num_steps=2):
                model(ones())
            failing.remove()
            cache.reset("elsewhere")  # no step is open
            with cache.step(chunk=0, num_steps=2):
                assert torch.equal(model(ones()), ones(4))


def several(case: Case, cache: holdover.Cache | None, model: ToyModel, attempt: Any = None) -> list[Tensor]:
    """Passes of one chunk, of every guidance branch; ``attempt`` runs each."""
    made, num_steps = [], len(case.options.get("ratios", range(6)))  # MagCache has a ratio per step
    for index in range(6):
        source = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4 * PER_FRAME, 6, generator=source) * (1 - 0.02 * index)
        for branch in case.branches:
            fields: dict[str, Any] = {"chunk": 0, "index": index, "num_steps": num_steps, "action": [0.1, 0.2]}
            fields |= {"branch": branch, "commits": False, "sigma": 0.9 - 0.1 * index}

            def run(fields: dict[str, Any] = fields, x: Tensor = x) -> Tensor:
                with nullcontext() if cache is None else cache.step(**fields):
                    return model(x, sigma=fields["sigma"], action=torch.full((1, 2), 0.1))

            made.append(run() if attempt is None else attempt(index, run))
    return made


FAILURES = {1: KeyboardInterrupt, 3: MemoryError, 5: RuntimeError}


@each
def test_after_a_failure_every_policy_goes_on_as_if_nothing_had_been(case: Case) -> None:
    """It fails as the pass begins, when nothing has been decided; at its end something may have been given up."""
    model = ToyModel()
    with torch.no_grad(), holdover.attach(model, case.policy()) as cache:
        expected, trace = several(case, cache, model), list(cache.trace)
    for where in (0, -1):

        def attempt(index: int, run: Any, where: int = where) -> Tensor:
            if kind := FAILURES.get(index):
                block = model.blocks[where]
                failing = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(kind()))
                try:
                    run()
                except kind:
                    assert not cache.in_step
                failing.remove()
                if len(cache.trace) and cache.trace[-1].index == index and cache.trace[-1].branch == case.branches[-1]:
                    return torch.empty(0)  # the pass was held as a whole, and never came to the block
            output: Tensor = run()
            return output

        with torch.no_grad(), holdover.attach(model, case.policy()) as cache:
            outputs = several(case, cache, model, attempt)
            assert all(output.isfinite().all() for output in outputs)
            if where == 0 and case.policy().level == "block":
                assert all(map(torch.equal, outputs, expected))
                assert list(cache.trace) == trace


@each
def test_gradients_are_those_without_a_cache_under_every_policy(case: Case) -> None:
    model = ToyModel().requires_grad_()

    def gradients(cache: holdover.Cache | None) -> list[Tensor]:
        model.zero_grad()
        sum(output.square().mean() for output in several(case, cache, model)).backward()  # type: ignore[union-attr]
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(None)
    with holdover.attach(model, case.policy()) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(cache)
    assert cache.stats().reused == 0
    assert expected
    assert all(map(torch.equal, found, expected))


@each
def test_a_copy_is_a_plain_model_under_every_policy(case: Case) -> None:
    model, plain = ToyModel(), ToyModel(seed=1)
    with torch.no_grad(), holdover.attach(model, case.policy()) as cache:
        several(case, cache, model)
        for copied in (copy.deepcopy, through_pickle):
            twin: Any = copied(model)
            twin.load_state_dict(plain.state_dict())
            assert all(map(torch.equal, several(case, None, twin), several(case, None, plain)))
        with pytest.raises(ValueError, match=r"a cache is attached to .* already; call its detach\(\) first"):
            holdover.attach(model, case.policy())
    assert all(map(torch.equal, several(case, None, model), several(case, None, ToyModel())))


def test_a_stream_that_was_put_back_runs_its_passes_again() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, EAGER) as cache:
        with cache.step(chunk=0):
            model(ones())
        snapshot = cache.snapshot()
        for _ in range(2):
            with cache.step(chunk=1, commits=False):
                model(ones())
            cache.restore("default", snapshot)


def test_the_second_video_of_a_loop_is_not_served_from_the_first() -> None:
    model = Stack(Scale(), Scale(), Scale())

    def video(cache: holdover.Cache, level: float) -> list[float]:
        made = []
        for index in range(4):
            with cache.step(chunk=0, index=index, num_steps=4, commits=False):
                made.append(float(model(ones(level + 0.01 * index))[0, 0, 0]))
        return made

    policy = holdover.policy("fbcache", threshold=0.2)
    with holdover.attach(model, policy) as cache:
        expected = video(cache, 1.15)
    with holdover.attach(model, policy) as cache:
        video(cache, 1.0)
        with pytest.raises(ValueError, match="ran already"):
            video(cache, 1.15)
        cache.reset()
        assert video(cache, 1.15) == expected


# Copies.


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("view_groups", [None, lambda model, *args, **kwargs: ()])
def test_a_copy_of_an_attached_model_is_a_plain_model(copied: Any, view_groups: Any) -> None:
    model = ToyModel()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    told = {"sigma": 0.5, "action": torch.zeros(1, 2)}
    x = torch.randn(1, 4 * PER_FRAME, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), holdover.attach(model, holdover.xcache(), view_groups=view_groups) as cache:
        twin = copied(model)
        plain = ToyModel(seed=1)
        twin.load_state_dict(plain.state_dict())
        assert torch.equal(twin(x, **told), plain(x, **told))  # outside of any step, and by its own weights
        assert len(cache.trace) == 0
        with holdover.attach(twin, holdover.xcache()) as other, other.step(chunk=0):
            assert torch.equal(twin(x, **told), plain(x, **told))
        with cache.step(chunk=0):
            assert torch.equal(model(x, **told), ToyModel()(x, **told))
        assert model.state_dict().keys() == plain.state_dict().keys()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes


def test_a_copy_of_a_compiled_block_is_as_without_a_cache() -> None:
    model = Stack(Scale(), Scale())
    model.blocks[0].compile(backend="eager")
    expected = copy.copy(model.blocks[0]).__dict__
    with holdover.attach(model, hungry):
        assert copy.copy(model.blocks[0]).__dict__ == expected


# Blocks that the model leaves out.


class Skipping(nn.Module):
    """Runs the blocks that it is not told to leave out; each adds a power of ten."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Add(10.0**n) for n in range(4))

    def forward(self, x: Tensor, skip: tuple[int, ...] = ()) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number not in skip:
                x = block(x)
        return x

    def holdover_slots(self) -> list[nn.Module]:
        return list(self.blocks)


class Add(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value


@pytest.mark.parametrize("skip", [2, 3])
def test_a_reused_span_stands_for_the_blocks_that_ran(skip: int) -> None:
    model = Skipping()
    with holdover.attach(model, hungry) as cache:

        def run(index: int, *skipped: int, branch: str = "") -> float:
            with cache.step(chunk=0, index=index, num_steps=6, commits=False, branch=branch):
                return float(model(ones(0), skipped)[0, 0, 0])

        assert run(0) == 1111
        with pytest.raises(ValueError, match=rf"left out .*'blocks\.{skip}'.*step\(branch="):
            run(1, skip)
        assert run(1) == 1111  # nothing was spoiled
        right = 1111 - 10**skip
        assert [run(index, skip, branch="skips") for index in range(3)] == [right] * 3
        if skip < 3:  # the last block was never run, so nothing is held
            assert "reuse" in [d.reason for d in cache.trace if d.branch == "skips"]
            with pytest.raises(ValueError, match=rf"ran block 'blocks\.{skip}', unlike when its span was computed"):
                run(3, branch="skips")


def test_leaving_out_the_first_block_of_a_span_says_so() -> None:
    model = Skipping()
    with (
        holdover.attach(model, holdover.policy("teacache", threshold=1e9), slots=["blocks.1", "blocks.2"]) as cache,
        pytest.raises(ValueError, match=r"'blocks\.2' ran before the first of its span, 'blocks\.1'"),
        cache.step(chunk=0),
    ):
        model(ones(0), (1,))


# Conditions.


@pytest.mark.parametrize(("policy", "first"), [(hungry, "first"), (EAGER, "condition")], ids=["steps", "chunks"])
def test_a_chunk_may_begin_under_another_condition(policy: holdover.Policy, first: str) -> None:
    """Where what is held serves one chunk, nothing of the condition before is left. A change within it is another."""
    model = Stack(Scale(), Scale())
    with torch.no_grad(), holdover.attach(model, policy) as cache:
        for chunk, conditions in enumerate((("day",) * 3, ("night",) * 3, ("night", "rain", "rain"))):
            for index, condition in enumerate(conditions):
                with cache.step(chunk=chunk, index=index, num_steps=3, condition=condition, commits=False):
                    model(ones())
    last = [d.reason for d in cache.trace if d.block == 1]
    per_chunk = [last[3 * chunk : 3 * chunk + 3] for chunk in range(3)]
    assert per_chunk[1] == ([first, "reuse", "reuse"] if policy is hungry else [first] * 3)
    assert per_chunk[2][1:] == ["condition"] * 2


# Gradients.


def test_nothing_is_reused_while_gradients_are_recorded() -> None:
    model = Stack(*(nn.Linear(2, 2) for _ in range(3)))

    def gradients(cache: holdover.Cache | None) -> list[Tensor]:
        model.zero_grad()
        total = torch.zeros(())
        for index in range(3):
            if cache is None:
                total = total + model(ones(1 + index / 10)).square().mean()
                continue
            with cache.step(chunk=0, index=index, num_steps=3, commits=False):
                total = total + model(ones(1 + index / 10)).square().mean()
        total.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients(None)
    with holdover.attach(model, hungry) as cache:
        with pytest.warns(UserWarning, match=r"gradients are being recorded.*torch\.no_grad"):
            found = gradients(cache)
        assert cache.stats().reused == 0
        assert cache.stats().reasons["gradients"] == 6
        cache.reset()
        for index in range(2):
            with torch.no_grad(), cache.step(chunk=0, index=index, num_steps=2, commits=False):
                model(ones())
        assert cache.stats().reused == 2  # without gradients it reuses again
    assert all(map(torch.equal, found, expected))


def test_an_input_that_records_gradients_is_computed() -> None:
    model = Stack(Scale(), Scale())
    with holdover.attach(model, EAGER) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for chunk in range(2):
            x = ones().requires_grad_()
            with cache.step(chunk=chunk, commits=False):
                model(x).sum().backward()
            assert torch.equal(x.grad, ones(4))  # type: ignore[arg-type]
    assert reasons(cache) == ["gradients"] * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_runs_blocks_again(reentrant: bool) -> None:
    model = Stack(*(nn.Linear(2, 2) for _ in range(2)))

    def backward() -> list[Tensor]:
        model.zero_grad()
        x = ones().requires_grad_()
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        x.sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = backward()
    with holdover.attach(model, hungry) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x, y = ones().requires_grad_(), ones()
        model.zero_grad()
        with cache.step(chunk=0):
            for block in model.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
        x.sum().backward()  # outside of the step
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        with torch.no_grad(), cache.step(chunk=1):
            model(y)
    assert all(map(torch.equal, found, expected))


# Lifetimes.


@pytest.mark.parametrize(
    "case", [case for case in DEFAULTS if case.policy().lifetime == "chunk"], ids=lambda case: case.id
)
def test_what_serves_one_chunk_is_freed_when_the_chunk_is_over(case: Case) -> None:
    model, loop = ToyModel(), ToyLoop(sigmas=case.sigmas, branches=case.branches)
    with holdover.attach(model, case.policy()) as cache:
        most = 0

        def runner(fields: dict[str, Any], run: Any) -> Tensor:
            nonlocal most
            output = cached(cache)(fields, run)
            most = max(most, cache.nbytes)
            return output

        for action in drive(2):
            loop.step(model, action, runner)
            assert cache.nbytes == 0
        assert (most > 0) == (case.name != "never")


def test_the_trace_is_a_ring_and_counts_go_on() -> None:
    model = Stack(*(Scale() for _ in range(10)))
    with holdover.attach(model, EAGER, trace=100) as cache:
        for chunk in range(1000):
            with cache.step(chunk=chunk, commits=False):
                model(ones())
            assert len(cache.trace) <= 125
        stats = cache.stats()
        assert stats.computed + stats.reused == 10_000 == len(cache.trace) + cache.trace.dropped
        assert [d.chunk for d in cache.trace][-10:] == [999] * 10
        assert cache.trace[0] == next(iter(cache.trace))
        assert cache.trace[-1].block == 9
        cache.trace.clear()
        assert len(cache.trace) == cache.trace.dropped == 0
    with pytest.raises(ValueError, match="trace=0: give how many decisions to keep"):
        holdover.attach(model, EAGER, trace=0)


# Threads.


def test_two_threads_on_one_model_are_told_once_and_leave_nothing_open() -> None:
    model, errors = Stack(Scale(), Scale()), list[str]()
    inside, leave = threading.Event(), threading.Event()
    with holdover.attach(model, EAGER) as cache:

        def first() -> None:
            with cache.step(chunk=0):
                model(ones())
                inside.set()
                leave.wait(10)

        def second() -> None:
            inside.wait(10)
            for attempt in (lambda: cache.step(chunk=1, stream="b").__enter__(), lambda: model(ones())):
                try:
                    attempt()
                except ValueError as error:
                    errors.append(str(error))
            leave.set()

        threads = [threading.Thread(target=target) for target in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 2
        assert all(error.startswith("two threads use one attached model; give each") for error in errors)
        assert len(cache.trace) == 2
        with cache.step(chunk=1):  # from a third, in turn
            model(ones())


# A step in which no block was asked.


def test_a_step_in_which_the_model_did_not_run_is_told_once_and_leaves_nothing() -> None:
    model = Stack(Scale(), Scale())
    twin = copy.deepcopy(model)
    with holdover.attach(model, EAGER) as cache, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for index in (1, 2):
            with cache.step(chunk=3, index=index, num_steps=4):
                twin(ones())
            assert cache.streams == ()
        assert len(cache.trace) == 0
        with cache.step(chunk=3, index=1, num_steps=4):  # the place is still free
            model(ones())
    (warning,) = told
    assert warning.filename == __file__
    assert "within the step of chunk 3, index 1, so xcache did nothing: call the model" in str(warning.message)
    assert "a chunk that runs no pass is told by cache.hold(chunk=...)" in str(warning.message)


@pytest.mark.filterwarnings("error")
def test_a_step_that_may_be_empty_is_not_told() -> None:
    """One whose blocks an outer policy answered for, one that failed, and a KV update by other means."""
    model = Stack(Scale(), Scale())
    with holdover.attach(model, [holdover.policy("step_hold", prediction="clean", hold=(1,)), EAGER]) as cache:
        for index in range(3):
            with cache.step(chunk=0, index=index, num_steps=3, commits=False):
                model(ones())
        assert cache.stats().reasons["step_hold"] == 2
        with pytest.raises(RuntimeError, match="before the model"), cache.step(chunk=1):
            raise RuntimeError("before the model")
        with cache.step(chunk=0, role="kv_update"):
            pass
