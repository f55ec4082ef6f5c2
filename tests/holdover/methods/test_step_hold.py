"""Step hold: what a model returns and what it means, and the model as one callable that is called or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import holdover
from holdover.method import Policy
from holdover.methods.parts.predictors import Repeat
from holdover.methods.parts.spans import ProbeAndTail
from holdover.methods.parts.triggers import Open
from holdover.methods.step_hold import NotHeld
from tests.holdover.engine.models import Scale, Stack, ones, reasons
from tests.holdover.toy import FEW, ToyLoop, ToyModel, cached, drive, one_thread

HELD = (1, 2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Network(nn.Module):
    """Returns, in the terms of ``kind``, a clean prediction that hardly depends on what enters."""

    def __init__(self, kind: str = "clean", run: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.target = nn.Parameter(torch.linspace(-1, 1, 24).reshape(1, 12, 2), requires_grad=False)
        self.run = run or (lambda x: x)

    def forward(self, x: Tensor, sigma: float = 1.0) -> Tensor:
        self.calls += 1
        clean: Tensor = self.run(self.target + 0.01 * torch.tanh(x))
        alpha = (1 - sigma**2) ** 0.5
        terms = {"flow": x - clean, "noise": x - alpha * clean, "v": alpha * x - clean}
        return clean if self.kind == "clean" else terms[self.kind] / sigma


def hold(**options: Any) -> Policy:
    return holdover.policy("step_hold", **options)


def hold_raw(*indices: int) -> Policy:
    """What step_hold is not: the model's output as it was."""
    return Policy(
        name="hold_raw",
        spans=ProbeAndTail(0),
        trigger=Open(guard=NotHeld(indices)),
        predictor=Repeat(),
        lifetime="chunk",
        level="model",
    )


def generate(
    model: nn.Module, policy: Policy | None, sigmas: Sequence[float] = FEW, *, fresh: bool, chunk: int = 0
) -> Tensor:
    """Clean latents of one chunk of a flow model, by renoising with new noise at each level, or by Euler's steps."""
    source = torch.Generator().manual_seed(chunk)
    x = torch.randn(1, 12, 2, generator=source)
    cache = holdover.attach(model, policy) if policy else None
    for index, (sigma, following) in enumerate(zip(sigmas, (*sigmas[1:], 0.0), strict=True)):
        if cache is None:
            flow = model(x, sigma=sigma)
        else:
            with cache.step(chunk=chunk, index=index, num_steps=len(sigmas), sigma=sigma):
                flow = model(x, sigma=sigma)
        clean = x - sigma * flow
        noise = torch.randn(x.shape, generator=source) if fresh else x + (1 - sigma) * flow
        x = (1 - following) * clean + following * noise
    if cache is not None:
        cache.detach()
    return x


def test_a_held_velocity_would_carry_old_noise() -> None:
    """With new noise at each level, a held flow is off by the old noise; under Euler's steps it is not."""
    policies = hold(hold=HELD, last=False, prediction="flow"), hold_raw(*HELD)
    apart = {}
    for fresh in (True, False):
        true = generate(Network("flow"), None, FEW[:3], fresh=fresh)
        for policy in policies:
            made = generate(Network("flow"), policy, FEW[:3], fresh=fresh)
            apart[policy.name, fresh] = float((made - true).norm() / true.norm())
    assert apart["step_hold", True] < 0.02  # as near as the clean prediction stays
    assert apart["hold_raw", True] > 1
    assert apart["hold_raw", False] == pytest.approx(apart["step_hold", False], abs=1e-5)


@pytest.mark.parametrize("kind", ["clean", "flow", "noise", "v"])
def test_what_is_returned_means_the_prediction_that_is_held(kind: str) -> None:
    """The clean prediction of a held pass is, in the network's own terms, that of the pass before."""
    network = Network(kind)
    predictions = []
    with holdover.attach(network, hold(hold=(1,), prediction=kind)) as cache:
        for index, sigma in enumerate((0.8, 0.6, 0.3)):
            x = torch.randn(1, 12, 2, generator=torch.Generator().manual_seed(index))
            with cache.step(chunk=0, index=index, num_steps=3, sigma=sigma):
                y = network(x, sigma=sigma)
            alpha = (1 - sigma**2) ** 0.5
            predictions.append(
                {"clean": y, "flow": x - sigma * y, "noise": (x - sigma * y) / alpha, "v": alpha * x - sigma * y}[kind]
            )
    torch.testing.assert_close(predictions[1], predictions[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[2], predictions[0], rtol=1e-4, atol=1e-4)
    assert network.calls == 2


def test_the_network_is_one_callable_that_is_called_or_not() -> None:
    """Of four passes and the clean one, it is called three times; what it does inside is nobody's business."""
    calls = []

    def replay(x: Tensor) -> Tensor:  # as of a recorded graph: nothing in it can be reached
        calls.append(1)
        return x.clone()

    network = Network(run=replay)
    with holdover.attach(network, hold(prediction="clean")) as cache:
        for chunk in range(3):
            for index, sigma in enumerate(FEW):
                with cache.step(chunk=chunk, index=index, num_steps=4, sigma=sigma):
                    network(ones(chunk + sigma, tokens=12))
            with cache.step(chunk=chunk, role="kv_update"):
                network(ones(tokens=12))
    assert len(calls) == 3 * 3
    assert [d.reason for d in cache.trace] == ["interval", "reuse", "reuse", "last step", "kv update"] * 3


@pytest.mark.parametrize("how", ["module", "in place"])
def test_a_network_that_is_compiled_whole(how: str) -> None:
    graphs, runs = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(1)

        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    class Fourfold(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 4 * x

    network: Any = Fourfold()
    model = network
    if how == "module":
        model = torch.compile(network, backend=backend, fullgraph=True)
    else:
        network.compile(backend=backend, fullgraph=True)
    before = dict(model.__dict__)
    with torch.no_grad(), holdover.attach(model, hold(prediction="clean")) as cache:
        outputs = []
        for index in range(4):
            with cache.step(chunk=0, index=index, num_steps=4):
                outputs.append(float(model(ones(index + 1))[0, 0, 0]))
    assert outputs == [4, 4, 4, 16]
    assert len(runs) == 2
    assert dict(model.__dict__) == before
    with torch.no_grad():
        assert model(ones(5))[0, 0, 0] == 20
    assert len(runs) == 3
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_an_inner_policy_sees_the_passes_that_are_not_held() -> None:
    """Outer first: X-Cache decides of passes 0 and 3 as it would if there were no others."""
    model, loop = ToyModel(), ToyLoop()
    with holdover.attach(model, holdover.xcache()) as inner:
        held: dict[str, Tensor] = {}

        def by_hand(fields: dict[str, Any], run: Any) -> Tensor:
            if fields.get("role") != "kv_update" and fields["index"] in HELD:
                return held["clean"].clone()
            held["clean"] = cached(inner)(fields, run)
            return held["clean"].clone()

        expected = [loop.step(model, action, by_hand) for action in drive(12)]
    model, loop = ToyModel(), ToyLoop()
    with holdover.attach(model, [hold(), holdover.xcache()]) as cache:
        outputs = [loop.step(model, action, cached(cache)) for action in drive(12)]
    assert all(map(torch.equal, outputs, expected))
    asked = [(d.chunk, d.index, d.block, d.reason, d.scores) for d in cache.trace if d.slot and d.reason != "step_hold"]
    assert asked == [(d.chunk, d.index, d.block, d.reason, d.scores) for d in inner.trace]
    assert cache.stats().reasons["step_hold"] == 12 * 2 * 4


def test_rows_of_a_batch_hold_their_own_whatever_chunk_they_are_at() -> None:
    def play(cache: holdover.Cache, model: nn.Module, rows: Sequence[tuple[str, int, int]]) -> Tensor:
        steps = [
            holdover.Step(chunk=chunk, index=index, num_steps=4, sigma=0.5, stream=stream)
            for stream, chunk, index in rows
        ]
        with cache.step(rows=steps):
            output: Tensor = model(
                torch.cat([ones(10 * chunk + index + 1, tokens=12) for _, chunk, index in rows]), sigma=0.5
            )
            return output

    network = Network("flow")
    with holdover.attach(network, hold(prediction="flow")) as cache:
        play(cache, network, [("a", 0, 0)])
        both = [play(cache, network, [("a", 0, 1), ("b", 7, 0)]), play(cache, network, [("a", 0, 2), ("b", 7, 1)])]
    assert reasons(cache) == ["interval", "batch", "interval", "reuse", "reuse"]
    for n, (chunk, computed, at) in enumerate(((0, 1, 2), (7, 0, 1))):  # a was computed again at pass 1, with b
        first, now = ones(10 * chunk + computed + 1, tokens=12), ones(10 * chunk + at + 1, tokens=12)
        clean = network.target + 0.01 * torch.tanh(first)
        torch.testing.assert_close(both[1][n : n + 1], (now - clean) / 0.5)


class Steps(nn.Module):
    """Clean predictions that are told: ``path(chunk, index)``."""

    def __init__(self, path: Callable[[int, int], float]) -> None:
        super().__init__()
        self.path, self.at = path, (0, 0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.path(*self.at))


def told(model: Steps, cache: holdover.Cache, chunks: Sequence[int], steps: int = 4, **fields: Any) -> list[str]:
    """Per chunk the reasons of its passes, a letter each; ``h`` is held."""
    lines = []
    for chunk in chunks:
        before = len(cache.trace)
        for index in range(steps):
            model.at = chunk, index
            with cache.step(chunk=chunk, index=index, num_steps=steps, **fields):
                model(ones())
        letters = {"reuse": "h", "last step": "l", "first": "f", "interval": "i", "change": "c"}
        lines.append("".join(letters.get(reason, "?") for reason in reasons(cache)[before:]))
    return lines


def test_auto_holds_what_changed_little_when_last_computed() -> None:
    """Pass 1 moves by 1 %, pass 2 by 10 %, until chunk 4, where nobody looks; every third chunk, all are computed."""
    model = Steps(lambda chunk, index: (100, 101, 110, 120)[index] if chunk < 4 else (100, 200, 201, 210)[index])
    with holdover.attach(model, hold(hold="auto", tolerance=0.05, refresh=3, prediction="clean")) as cache:
        assert told(model, cache, range(3)) == ["iiil", "fhcl", "fhcl"]
        changes = {d.index: d.scores["change"] for d in cache.trace if d.chunk == 2 and d.scores}
        # In chunk 1 pass 1 was held, so pass 2 was compared with pass 0.
        assert changes == {1: pytest.approx(1 / 101), 2: pytest.approx(10 / 110)}
        assert told(model, cache, range(3, 9)) == ["iiil", "fhcl", "fhcl", "iiil", "fchl", "fchl"]
        cache.reset()
        assert told(model, cache, range(3)) == ["iiil", "fhcl", "fhcl"]


def test_auto_begins_anew_with_another_number_of_steps_and_computes_under_a_new_condition() -> None:
    model = Steps(lambda chunk, index: 100)
    with holdover.attach(model, hold(hold="auto", refresh=50, prediction="clean", last=False)) as cache:
        assert told(model, cache, range(2)) == ["iiil".replace("l", "i"), "fhhh"]
        assert told(model, cache, [2], steps=3) == ["f??"]  # history
        assert told(model, cache, [3], steps=3) == ["fhh"]
        assert told(model, cache, [4], steps=3, condition="rain") == ["f??"]  # condition
        assert told(model, cache, [5], steps=3, condition="rain") == ["fhh"]


def test_the_noise_level_of_a_call_may_be_read_from_its_arguments() -> None:
    """Frames at levels of their own; the latents that enter have channels beside the noisy ones."""

    class Frames(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x[:, :2] * 0 + t[:, None]  # [B, 2, F]

        def holdover_slots(self) -> list[holdover.Slot]:
            taps = {"sigma": lambda model, x, t: t[:, None] / 1000}
            return [holdover.Slot("", kind="model", prediction="flow", taps=taps)]

    torch.manual_seed(0)
    model, x, later = Frames(), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    then, now = torch.tensor([[800.0, 600, 400, 200]]), torch.tensor([[700.0, 500, 300, 100]])
    with holdover.attach(model, hold(hold=(1,), last=False)) as cache:
        with cache.step(chunk=0, index=0, num_steps=2):
            y = model(x, then)
        with cache.step(chunk=0, index=1, num_steps=2):
            made = model(later, now)
    clean = x[:, :2] - then[:, None] / 1000 * y
    torch.testing.assert_close(made, (later[:, :2] - clean) / (now[:, None] / 1000))


def passes(model: nn.Module, policy: Policy, sigma: float | None = None) -> None:
    with holdover.attach(model, policy) as cache:
        for index in range(3):
            with cache.step(chunk=0, index=index, num_steps=3, sigma=sigma):
                model(ones(tokens=12))


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:, :1]


@pytest.mark.parametrize(
    ("model", "options", "sigma", "message"),
    [
        (
            Network(),
            {},
            0.5,
            "does not know what the model returns; say prediction=..., one of 'clean', 'flow', 'noise', 'v'",
        ),
        (
            Network(),
            {"prediction": "flow"},
            None,
            r"\(flow\) is turned .* not known; say step\(sigma=...\), or declare it",
        ),
        (Network(), {"prediction": "v"}, 14.6, "sigma=14.6 is no noise level of a model that returns v"),
        (Network(), {"prediction": "flow"}, 0.0, "sigma=0.0 is no noise level"),
        (Network(), {"prediction": "noise"}, 1.0, "at sigma=1 predicted noise tells nothing"),
        (Narrow(), {"prediction": "flow"}, 0.5, r"is given \[1, 12, 2\] and returns \[1, 11, 1\]"),
    ],
)
def test_what_is_not_known_is_an_error(
    model: nn.Module, options: dict[str, Any], sigma: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        passes(model, hold(**options), sigma)


def test_a_clean_prediction_needs_no_noise_level() -> None:
    network = Network()
    passes(network, hold(hold=(1,), prediction="clean"))
    assert network.calls == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hold": (0, 1)}, r"hold=\(0, 1\): give pass indices, 1 or more"),
        ({"hold": ()}, r"hold=\(\): give pass indices"),
        ({"hold": "always"}, "hold='always' is not one of 'auto'"),
        ({"hold": "auto", "tolerance": -1}, "tolerance=-1 is negative"),
        ({"hold": "auto", "refresh": 1}, "refresh=1: give a whole number, 2 or more"),
        ({"prediction": "velocity"}, "prediction='velocity' is not one of 'clean', 'flow', 'noise', 'v'"),
        ({"protection": "off"}, "protection='off' is not one of 'chunk', 'pass'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hold(**options)


def test_wrong_declarations_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction='x0' of a slot is not one of clean, flow, noise, v"):
        holdover.Slot("", kind="model", prediction="x0")  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(["flow", "noise", "v"]), st.floats(0.05, 0.98), st.floats(0.05, 0.98), st.integers(0, 2**31))
def test_a_prediction_held_twice_is_still_the_same(kind: str, then: float, now: float, seed: int) -> None:
    """Reading what was returned for a held prediction gives that prediction, in float64."""
    torch.manual_seed(seed)
    network, x = Network(kind).double(), torch.randn(3, 1, 12, 2, dtype=torch.float64)
    with holdover.attach(network, hold(hold=(1,), prediction=kind, last=False)) as cache:
        with cache.step(chunk=0, index=0, num_steps=2, sigma=then):
            network(x[0], sigma=then)
        with cache.step(chunk=0, index=1, num_steps=2, sigma=now):
            y = network(x[1], sigma=now)
    alpha = (1 - now**2) ** 0.5
    read = {"flow": x[1] - now * y, "noise": (x[1] - now * y) / alpha, "v": alpha * x[1] - now * y}[kind]
    torch.testing.assert_close(read, network.target + 0.01 * torch.tanh(x[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", [True, False], ids=["in a list", "declared"])
def test_a_model_says_what_it_is_beside_its_blocks(given: bool) -> None:
    """Its own slot goes to the policy of its level, the others to the inner one; alone, it leaves those declared."""

    class Declared(Stack):
        def holdover_slots(self) -> Any:
            own = [] if given else [holdover.Slot("", kind="model", prediction="clean")]
            return [*super().holdover_slots(), *own]

    whole = holdover.Slot("", kind="model", prediction="clean")
    lists: list[Any] = [[whole, "blocks.0", "blocks.1"], [whole]] if given else [None]
    for slots in lists:
        model = Declared(Scale(), Scale())
        with holdover.attach(model, [hold(), holdover.never()], slots=slots) as cache:
            for index in range(4):
                with cache.step(chunk=0, index=index, num_steps=4):
                    model(ones(index + 1))
        assert [block.calls for block in model.blocks] == [2, 2]
        assert [d.reason for d in cache.trace if not d.slot] == ["interval", "reuse", "reuse", "last step"]
