"""What the user compiled stays compiled, in both orders; told by the operations that compiled graphs hold and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from tests.holdover.engine.models import EAGER

#: More than Dynamo compiles one piece of code for, where it differs from block to block.
BLOCKS = 12
#: Of one block: a sum, a product and a sine.
OPERATIONS = 3
POLICIES = {
    "never": holdover.never,
    "fbcache": lambda: holdover.policy("fbcache", threshold=0.0),
    "xcache": lambda: holdover.xcache(protection="pass", tau_floor=2.0),
}
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


class Wave(nn.Module):
    """``x -> x + sin(number * x)``."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, *, phase: float = 0.0) -> Tensor:
        return x + torch.sin(x * self.number)


class Waves(nn.Module):
    def __init__(self, blocks: int = BLOCKS, *, alike: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wave(2 if alike else number + 2) for number in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, phase=0.5)
        return x

    def holdover_slots(self) -> list[nn.Module]:
        return list(self.blocks)


class Graphs:
    """A backend for `torch.compile`: counts the operations of its graphs, as they are made and as they run."""

    def __init__(self) -> None:
        self.held = self.ran = self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        operations = sum(node.op.startswith("call_") for node in graph.graph.nodes)
        self.held += operations
        self.made += 1

        def run(*args: Any) -> Any:
            self.ran += operations
            return graph.forward(*args)

        return run


def passes(model: Any, cache: holdover.Cache | None, count: int = 2, start: int = 0) -> Tensor:
    x = torch.linspace(0.1, 1.0, 12).view(1, 4, 3)
    for chunk in range(start, start + count):
        with torch.no_grad(), nullcontext() if cache is None else cache.step(chunk=chunk, commits=False):
            output: Tensor = model(x)
    return output


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_blocks(model: Waves, backend: Graphs) -> Any:
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


def compile_forwards(model: Waves, backend: Graphs) -> Any:
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    return model


def compile_in_place(model: Waves, backend: Graphs) -> Any:
    model.compile(backend=backend)
    return model


def compile_around(model: Waves, backend: Graphs) -> Any:
    return torch.compile(model, backend=backend)


ways = pytest.mark.parametrize("way", [compile_blocks, compile_forwards, compile_in_place, compile_around])


@ways
@pytest.mark.parametrize("order", ["compile, attach", "compile, run, attach", "attach, compile"])
def test_graphs_run_every_operation_of_the_blocks(way: Callable[..., Any], order: str) -> None:
    policy = POLICIES["fbcache"]
    whole = way in (compile_in_place, compile_around)
    model, backend = Waves(alike=not whole), Graphs()
    expected = passes(model, None)
    cache = holdover.attach(model, policy()) if order.startswith("attach") else None
    run = way(model, backend)
    if order == "compile, run, attach":
        passes(run, None)
    compiled = [dict(module.__dict__) for module in model.modules()]
    if cache is None:
        cache = holdover.attach(model, policy())
    backend.held = backend.ran = 0
    assert torch.equal(passes(run, cache), expected)
    assert cache.stats().computed == 2 * BLOCKS
    assert backend.ran == 2 * BLOCKS * OPERATIONS
    if whole:
        assert backend.held == BLOCKS * OPERATIONS  # a graph per block, as many operations as without a cache
    cache.detach()
    if order != "attach, compile":
        assert [dict(module.__dict__) for module in model.modules()] == compiled
    if whole:
        torch.compiler.reset()  # it keeps in mind that the model's own code cannot be one graph
    backend.ran = 0
    assert torch.equal(passes(run, None), expected)
    assert backend.ran == 2 * BLOCKS * OPERATIONS


@ways
def test_reused_blocks_run_nothing(way: Callable[..., Any]) -> None:
    model, backend = Waves(4, alike=True), Graphs()
    with holdover.attach(model, EAGER) as cache:
        run = way(model, backend)
        passes(run, cache, 3)
    assert (cache.stats().computed, cache.stats().reused) == (4, 8)
    assert backend.ran == 4 * OPERATIONS


@pytest.mark.parametrize("order", ["compile, attach", "attach, compile"])
def test_a_network_that_is_held_as_a_whole_is_one_graph(order: str) -> None:
    """With ``fullgraph=True``: the dispatcher stands around it."""
    model, backend = Waves(), Graphs()
    policy = holdover.policy("step_hold", prediction="clean", hold=(2,))
    if order.startswith("compile"):
        model.compile(backend=backend, fullgraph=True)
    cache = holdover.attach(model, policy, slots=[holdover.Slot("", kind="model", prediction="clean")])
    if order.startswith("attach"):
        model.compile(backend=backend, fullgraph=True)
    x = torch.linspace(0.1, 1.0, 12).view(1, 4, 3)
    for index in range(4):
        with torch.no_grad(), cache.step(chunk=0, index=index, num_steps=4):
            model(x)
    assert (cache.stats().computed, cache.stats().reused) == (3, 1)
    assert (backend.made, backend.held) == (1, BLOCKS * OPERATIONS)
    assert backend.ran == 3 * BLOCKS * OPERATIONS
    cache.detach()
    passes(model, None, 1)
    assert (backend.made, backend.ran) == (1, 4 * BLOCKS * OPERATIONS)


def test_a_graph_that_must_not_break_around_attached_blocks_says_what_to_compile() -> None:
    model = Waves(2)
    whole = torch.compile(model, backend=Graphs(), fullgraph=True)
    with (
        holdover.attach(model, EAGER) as cache,
        pytest.raises(Exception, match=r"call the module's own compile\(\)"),
    ):
        passes(whole, cache, 1)


@policies
def test_nothing_of_the_cache_is_compiled(policy: Callable[[], holdover.Policy]) -> None:
    """Neither the engine's code nor the method's, whichever function was compiled around them."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph.graph.nodes:
            found.extend(node.meta.get("stack_trace", "").splitlines() if node.op.startswith("call_") else ())
        return graph.forward

    model = Waves(3)
    run = torch.compile(model, backend=backend)
    with holdover.attach(model, policy()) as cache:
        passes(run, cache)
    assert any("torch.sin" in line for line in found)
    frames = [line for line in found if "/holdover/" in line and "engine/compiled.py" not in line]
    assert not [line for line in frames if "tests" not in line]
