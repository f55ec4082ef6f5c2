"""Finding blocks, putting dispatchers in their place, and taking them out again."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons


def twice(model: nn.Module, cache: holdover.Cache, *values: float, **inputs: Any) -> list[Tensor]:
    """One chunk per value."""
    outputs = []
    for chunk, value in enumerate(values):
        with cache.step(chunk=chunk, commits=False):
            outputs.append(model(ones(value), **inputs))
    return outputs


def test_blocks_are_found_by_name_by_module_and_by_declaration() -> None:
    for slots in (["blocks.0", "blocks.1"], None, [holdover.Slot("blocks.0"), "blocks.1"]):
        model = Stack(Scale(), Scale())
        with holdover.attach(model, EAGER, slots=slots) as cache:
            assert twice(model, cache, 1, 3)[1][0, 0, 0] == 3 + 1 + 2
        assert [decision.slot for decision in cache.trace] == ["blocks.0", "blocks.1"] * 2
    nested = nn.Sequential(Stack(Scale()), Stack(Scale(5)))
    with holdover.attach(nested, EAGER, slots=["1.blocks.0"]) as cache:
        assert twice(nested, cache, 1, 3)[1][0, 0, 0] == 6 + 8


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (["blocks.7"], "no module 'blocks.7'"),
        ([Scale()], "not part of Stack"),
        (["blocks.0", "blocks.0"], "'blocks.0' twice"),
        (["blocks", "blocks.0"], "'blocks.0' lies within slot 'blocks'"),
        ([], "slots is empty"),
        ([holdover.Slot("blocks.0", hidden=-1)], "hidden=-1"),
    ],
)
def test_wrong_slots_are_refused(slots: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        holdover.attach(Stack(Scale(), Scale()), EAGER, slots=slots)


def test_a_model_that_declares_nothing_needs_slots() -> None:
    with pytest.raises(ValueError, match=r"Sequential does not declare its blocks.*slots="):
        holdover.attach(nn.Sequential(Scale()), EAGER)


def test_wrong_arguments_are_refused() -> None:
    model = Stack(Scale())
    with pytest.raises(ValueError, match="max_bytes=-1"):
        holdover.attach(model, EAGER, max_bytes=-1)
    with pytest.raises(ValueError, match="audit=2"):
        holdover.attach(model, EAGER, audit=2)
    with pytest.raises(ValueError, match="view_groups holds 'front'"):
        holdover.attach(model, EAGER, view_groups=["front"])
    with pytest.raises(ValueError, match="limit=0"):
        holdover.Audit(0.1, limit=0)
    assert holdover.attach(model, EAGER).detach() is None  # none of them left a hook behind


def test_a_block_overlapping_an_attached_one_is_refused() -> None:
    model = Stack(Scale(), Scale())
    with (
        holdover.attach(model, EAGER, slots=["blocks.0"]),
        pytest.raises(ValueError, match=r"attached to 'blocks.0' already"),
    ):
        holdover.attach(model, EAGER, slots=["blocks.1"])
    holdover.attach(model, EAGER).detach()


def test_a_forward_outside_any_step_names_the_fix() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache, pytest.raises(ValueError, match=r"with cache.step\(chunk=n"):
        model(ones())
    with pytest.raises(ValueError, match="cache is detached"):
        cache.step(chunk=0)
    assert torch.equal(model(ones()), ones(2))


class Keyword(nn.Module):
    def forward(
        self, shift: float = 0.0, *, latent: Tensor | None = None, hidden_states: Tensor | None = None
    ) -> Tensor:
        x = latent if latent is not None else hidden_states
        assert x is not None
        return x * 2 + shift


@pytest.mark.parametrize(
    ("slot", "call"),
    [
        (holdover.Slot("blocks.0", hidden="latent"), lambda block, x: block(1.0, latent=x)),
        (holdover.Slot("blocks.0", hidden="hidden_states"), lambda block, x: block(hidden_states=x)),
    ],
)
def test_the_hidden_state_may_be_any_keyword(slot: holdover.Slot, call: Callable[..., Tensor]) -> None:
    model = Stack(Keyword())
    with holdover.attach(model, EAGER, slots=[slot]) as cache:
        outputs = []
        for chunk, value in enumerate((1.0, 5.0)):
            with cache.step(chunk=chunk, commits=False):
                outputs.append(call(model.blocks[0], ones(value)))
    assert outputs[1][0, 0, 0] == 5 + (outputs[0][0, 0, 0] - 1)


@pytest.mark.parametrize("call", [lambda block, x: block(x), lambda block, x: block(x=x)])
def test_the_first_argument_may_be_passed_by_its_name(call: Callable[..., Tensor]) -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for chunk, value in enumerate((1.0, 5.0)):
            with cache.step(chunk=chunk, commits=False):
                output = call(model.blocks[0], ones(value))
    assert output[0, 0, 0] == 6


def test_a_named_argument_may_come_by_position() -> None:
    class Second(nn.Module):
        def forward(self, scale: float, x: Tensor) -> Tensor:
            return scale * x

    model = Stack(Second())
    with holdover.attach(model, EAGER, slots=[holdover.Slot("blocks.0", hidden="x")]) as cache:
        for chunk, value in enumerate((1.0, 5.0)):
            with cache.step(chunk=chunk, commits=False):
                output = model.blocks[0](3.0, ones(value))
    assert output[0, 0, 0] == 7


def test_a_missing_hidden_state_names_the_fix() -> None:
    model = Stack(Keyword())
    with holdover.attach(model, EAGER) as cache:
        with pytest.raises(ValueError, match=r"a float, not a tensor.*hidden="), cache.step(chunk=0):
            model.blocks[0](1.0, latent=ones())
        with pytest.raises(ValueError, match=r"without its hidden state.*hidden="), cache.step(chunk=0):
            model.blocks[0](latent=ones())


class Tupled(nn.Module):
    """Returns its hidden state, a tensor that depends on it, and a plain value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, int, None]:
        self.calls += 1
        return x * 2, x.mean(-1), self.calls, None


def test_a_reused_tuple_carries_the_items_of_the_last_computed_call() -> None:
    model = Stack(Tupled())
    with holdover.attach(model, EAGER) as cache:
        outputs = []
        for chunk, value in enumerate((1.0, 5.0, 7.0)):
            if outputs:
                outputs[-1][1].zero_()  # what a model does to an item does not reach what is held
            with cache.step(chunk=chunk, commits=False):
                outputs.append(model.blocks[0](ones(value)))
        assert cache.nbytes == sum(t.nbytes for t in (ones(), ones().mean(-1))) + (3 + 1) * 2 * 4
    hidden, item, calls, nothing = outputs[2]
    assert hidden[0, 0, 0] == 8
    assert torch.equal(item, ones(1).mean(-1))
    assert (calls, nothing) == (1, None)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: [x], "returns a list"),
        (lambda x: (1, x), "returns a tuple"),
        (lambda x: (x, {"k": x}), "a dict at position 1"),
    ],
)
def test_outputs_that_cannot_be_held_are_refused(output: Callable[[Tensor], Any], message: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output(x)

    model = Stack(Odd())
    with holdover.attach(model, EAGER) as cache, pytest.raises(ValueError, match=message), cache.step(chunk=0):
        model.blocks[0](ones())


class InPlace(nn.Module):
    """Overwrites its input, and returns either it or something else."""

    def __init__(self, returns_input: bool) -> None:
        super().__init__()
        self.returns_input = returns_input

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x if self.returns_input else x + 1


@pytest.mark.parametrize("returns_input", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_a_block_that_overwrites_its_input_is_held_right(returns_input: bool, inference: bool) -> None:
    model = Stack(InPlace(returns_input))
    with torch.inference_mode(inference), holdover.attach(model, EAGER) as cache:
        outputs = []
        for chunk, (value, commits) in enumerate([(1, True), (3, True), (5, False), (1, False)]):
            with cache.step(chunk=chunk, commits=commits):
                outputs.append(model(ones(value))[0, 0, 0])
    added = 3 if returns_input else 4  # to an input of 3, in chunk 1
    assert outputs == [1 + added - 2, 3 + added, 5 + added, 1 + added]
    assert reasons(cache) == ["kv cycle", "kv cycle", "reuse", "reuse"]


@pytest.mark.filterwarnings("ignore:.* could reuse nothing")
def test_what_is_held_serves_inside_and_outside_inference_mode() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for chunk, (inference, commits, value) in enumerate(
            [(True, True, 1), (False, True, 2), (True, True, 3), (False, False, 5)]
        ):
            with torch.inference_mode(inference), cache.step(chunk=chunk, commits=commits):
                output = model(ones(value))
    assert output[0, 0, 0] == 5 + 3


# Detaching, with others around.


def outer(module: nn.Module) -> Callable[[], None]:
    """Wraps a module's forward as other libraries do; returns the undo."""
    previous = module.forward

    def wrapped(self: nn.Module, x: Tensor) -> Tensor:
        return previous(x) + 100

    module.forward = MethodType(wrapped, module)

    def undo() -> None:
        module.forward = previous

    return undo


def test_a_forward_that_was_wrapped_before_stays_wrapped() -> None:
    model = Stack(Scale())
    undo = outer(model.blocks[0])
    wrapper = model.blocks[0].__dict__["forward"]
    with holdover.attach(model, EAGER) as cache:
        assert twice(model, cache, 1, 5)[1][0, 0, 0] == 5 + 101
    assert model.blocks[0].__dict__["forward"] is wrapper
    undo()
    assert model(ones())[0, 0, 0] == 2


def test_detaching_under_a_later_wrapper_leaves_a_working_model() -> None:
    model = Stack(Scale())
    cache = holdover.attach(model, EAGER)
    undo = outer(model.blocks[0])
    assert twice(model, cache, 1, 5)[1][0, 0, 0] == 5 + 1 + 100
    cache.detach()
    assert model(ones())[0, 0, 0] == 102
    undo()  # puts our dispatcher back, which passes through and withdraws
    assert model(ones())[0, 0, 0] == 2
    assert "forward" not in model.blocks[0].__dict__


def test_detaching_twice_and_attaching_again() -> None:
    model = Stack(Scale())
    cache = holdover.attach(model, EAGER)
    cache.detach()
    cache.detach()
    with holdover.attach(model, EAGER) as cache:
        assert twice(model, cache, 1, 5)[1][0, 0, 0] == 6


def test_two_models_of_one_class_are_two_models() -> None:
    first, second = Stack(Scale()), Stack(Scale())
    with holdover.attach(first, EAGER):
        assert second(ones())[0, 0, 0] == 2


def test_hooks_of_the_module_still_run_once() -> None:
    model, seen = Stack(Scale()), []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    with holdover.attach(model, EAGER) as cache:
        twice(model, cache, 1, 5)
    assert seen == [1, 1]


@pytest.mark.parametrize("how", ["module", "forward", "in place"])
def test_compiled_blocks_stay_compiled(how: str) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            compiled.append(1)
            return graph.forward(*args)

        return run

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    block = Plain()
    model = Stack(block)
    if how == "module":
        model.blocks[0] = torch.compile(block, backend=backend)
    elif how == "forward":
        block.forward = torch.compile(block.forward, backend=backend)
    else:
        block.compile(backend=backend)
    before = [dict(module.__dict__) for module in model.modules()]
    with holdover.attach(model, EAGER) as cache:
        assert [o[0, 0, 0] for o in twice(model, cache, 1, 5)] == [2, 6]
    assert reasons(cache) == ["first", "reuse"]
    assert len(compiled) == 1  # the first call ran the compiled graph, the second ran nothing
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert model(ones())[0, 0, 0] == 2
    assert len(compiled) == 2
    torch._dynamo.reset()


def test_a_compiled_model_around_attached_blocks() -> None:
    model = Stack(Scale(), Scale())
    whole = torch.compile(model, backend="eager")
    with holdover.attach(model, EAGER) as cache:
        assert [o[0, 0, 0] for o in twice(whole, cache, 1, 5, 7)] == [4, 5 + 1 + 2, 7 + 1 + 2]
    assert reasons(cache) == ["first"] * 2 + ["reuse"] * 4
    torch._dynamo.reset()


class TwoMethods(nn.Module):
    """``x -> 2x + 1``, in two steps that are no modules."""

    def double(self, x: Tensor) -> Tensor:
        return 2 * x

    def increase(self, x: Tensor) -> Tensor:
        return x + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.increase(self.double(x))


def test_a_slot_may_be_a_method_of_a_module() -> None:
    model = Stack(TwoMethods(), TwoMethods())
    before = [dict(module.__dict__) for module in model.modules()]
    slots = [holdover.Slot(block, method=method) for block in model.blocks for method in ("double", "increase")]
    # Of the first chunk the residuals are 1, 1, 3 and 1.
    with holdover.attach(model, EAGER, slots=slots) as cache:
        for chunk, value in enumerate((1.0, 5.0)):
            with cache.step(chunk=chunk, commits=False):
                out = model(ones(value))
            assert torch.equal(out, ones((7, 5 + 1 + 1 + 3 + 1)[chunk]))
    assert [d.slot for d in cache.trace][:4] == [
        f"blocks.{n}.{method}" for n in (0, 1) for method in ("double", "increase")
    ]
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert torch.equal(model(ones(5)), ones(23))
    with pytest.raises(ValueError, match=r"slot 'blocks.0.double' lies within slot 'blocks.0'"):
        holdover.attach(model, EAGER, slots=[model.blocks[0], slots[0]])
    with pytest.raises(ValueError, match=r"slots names 'blocks.0.double' twice"):
        holdover.attach(model, EAGER, slots=[slots[0], slots[0]])
    with pytest.raises(ValueError, match="slot 0: TwoMethods has no method 'halve'"):
        holdover.attach(model, EAGER, slots=[holdover.Slot(model.blocks[0], method="halve")])
