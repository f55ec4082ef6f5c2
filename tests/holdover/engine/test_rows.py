"""Batches of several streams; where blocks say how to take rows, only those that need computing are computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from holdover import Slot, Step
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons


class Add(nn.Module):
    """``x -> (x + its row's offset, its row's offset)``, and a count of the rows it ran for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x: Tensor, *, offset: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        return x + offset[:, None, None], offset


def take(rows: Sequence[int], x: Tensor, *, offset: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (x[rows],), {"offset": offset[rows]}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Add(), Add()])

    def forward(self, x: Tensor, offset: Tensor) -> tuple[Tensor, list[Tensor]]:
        beside = []
        for block in self.blocks:
            x, item = block(x, offset=offset)
            beside.append(item)
        return x, beside

    def holdover_slots(self) -> list[Slot]:
        return [Slot(block, rows=take) for block in self.blocks]


def run(cache: holdover.Cache, model: Two, chunks: dict[str, int], offsets: list[float]) -> tuple[Tensor, list[Tensor]]:
    with cache.step(rows=[Step(stream=stream, chunk=chunk, commits=False) for stream, chunk in chunks.items()]):
        x, beside = model(torch.cat([ones()] * len(chunks)), torch.tensor(offsets))
    return x[:, 0, 0], beside


def test_only_the_rows_that_need_it_are_computed() -> None:
    model = Two()
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, {"a": 0, "b": 0}, [1, 2])
        x, beside = run(cache, model, {"new": 0, "a": 1, "newer": 0, "b": 1}, [10, 20, 30, 40])
        assert x.tolist() == [1 + 20, 1 + 2, 1 + 60, 1 + 4]  # a and b repeat what they added first
        assert [item.tolist() for item in beside] == [[10, 1, 30, 2]] * 2
        assert [block.rows for block in model.blocks] == [[2, 2]] * 2
        assert (cache.exact("new"), cache.exact("a")) == (True, False)
        x, _ = run(cache, model, {"a": 2, "new": 1, "newer": 1}, [7, 7, 7])  # nobody needs it; b has left
        assert x.tolist() == [1 + 2, 1 + 20, 1 + 60]
        assert [block.rows for block in model.blocks] == [[2, 2]] * 2


def test_the_audit_computes_the_rows_of_its_sample() -> None:
    model = Two()
    with holdover.attach(model, EAGER, audit=holdover.Audit(1.0, limit=1e9)) as cache:
        run(cache, model, {"a": 0}, [1])
        run(cache, model, {"new": 0, "a": 1}, [5, 3])
        errors = [d.scores["audit"] for d in cache.trace if d.stream == "a" and "audit" in d.scores]
        assert errors == pytest.approx([2 / 4, 2 / 5])  # added 1 for 3: 2 of 1 + 3, then 2 of (1 + 1) + 3
        assert not any("audit" in d.scores for d in cache.trace if d.stream == "new")


def test_a_fork_shares_memory_until_it_diverges() -> None:
    model = Two()
    with holdover.attach(model, EAGER) as cache:
        with cache.step(stream="a", chunk=0, condition=False, commits=False):
            model(ones(), torch.tensor([1.0]))
        cache.fork("a", "b")
        streams = cache._runtimes[0].streams
        held = [[t.data_ptr() for h in streams[name].entries.values() for t in h.all_tensors()] for name in "ab"]
        assert held[0] == held[1]
        for stream, chunk, expected in (("b", 1, 1 + 18), ("b", 2, 1 + 18), ("a", 1, 1 + 2)):
            with cache.step(stream=stream, chunk=chunk, condition=stream == "b", commits=False):  # new for b: computed
                assert model(ones(), torch.tensor([9.0]))[0][0, 0, 0] == expected


def one(cache: holdover.Cache, model: nn.Module, x: Tensor, chunk: int, **fields: Any) -> Tensor:
    with cache.step(**{"chunk": chunk, "commits": False, **fields}):
        return model(x)


def test_rows_decide_as_they_would_alone() -> None:
    values = {"a": (1.0, 5.0, 2.0), "b": (3.0, 4.0, 6.0)}
    alone = {}
    for stream, series in values.items():
        model = Stack(Scale(), Scale(3))
        with holdover.attach(model, EAGER) as cache:
            outputs = [one(cache, model, ones(value), chunk) for chunk, value in enumerate(series)]
        alone[stream] = torch.cat(outputs), reasons(cache)
    model = Stack(Scale(), Scale(3))
    with holdover.attach(model, EAGER) as cache:
        together = []
        for chunk, pair in enumerate(zip(*values.values(), strict=True)):
            with cache.step(rows=[Step(stream=name, chunk=chunk, commits=False) for name in values]):
                together.append(model(torch.cat([ones(value) for value in pair])))
        # A row's state is the stream's: it goes on alone.
        assert one(cache, model, ones(7), 3, stream="b")[0, 0, 0] == 7 + 3 + 12
    for row, stream in enumerate(values):
        assert torch.equal(torch.stack(together)[:, row], alone[stream][0])
        assert [d.reason for d in cache.trace if d.stream == stream][:6] == alone[stream][1]
    assert model.blocks[0].calls == 1


def test_a_batch_is_computed_if_any_row_needs_it() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        one(cache, model, ones(1), 0, stream="old")
        with cache.step(rows=[Step(stream="old", chunk=1, commits=False), Step(stream="new", chunk=0, commits=False)]):
            output = model(torch.cat([ones(5), ones(7)]))
        assert output[:, 0, 0].tolist() == [10, 14]
        assert (cache.exact("old"), cache.exact("new")) == (True, True)
        # What was computed is held, for the row that did not need it too.
        assert one(cache, model, ones(6), 2, stream="old")[0, 0, 0] == 6 + 5
    assert [(d.stream, d.reason) for d in cache.trace][1:3] == [("old", "batch"), ("new", "first")]


def test_two_branches_of_a_stream_in_one_batch() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        for chunk, pair in enumerate([(1, 2), (10, 20)]):
            with cache.step(rows=[Step(branch=branch, chunk=chunk, commits=False) for branch in ("cond", "uncond")]):
                output = model(torch.cat([ones(value) for value in pair]))
        assert output[:, 0, 0].tolist() == [11, 22]
        assert cache.nbytes == sum(held.nbytes for held in cache._runtimes[0].streams["default"].entries.values())


class TupledRows(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.mean((1, 2))


def test_rows_of_a_tuple() -> None:
    model = Stack(TupledRows())
    with holdover.attach(model, EAGER) as cache:
        for chunk, pair in enumerate([(1, 2), (10, 20)]):
            with cache.step(rows=[Step(stream=name, chunk=chunk, commits=False) for name in "ab"]):
                hidden, item = model.blocks[0](torch.cat([ones(value) for value in pair]))
    assert hidden[:, 0, 0].tolist() == [11, 22]
    assert item.tolist() == [1, 2]


def test_rows_that_do_not_fit_are_refused() -> None:
    model = Stack(Scale())
    with holdover.attach(model, EAGER) as cache:
        two = [Step(stream=name, chunk=0) for name in "ab"]
        with pytest.raises(ValueError, match="has 3 rows, the step 2"), cache.step(rows=two):
            model(ones(batch=3))
        with pytest.raises(ValueError, match=r"rows is empty"):
            cache.step(rows=[])
        with pytest.raises(ValueError, match="came together with chunk"):
            cache.step(rows=[Step(chunk=0)], chunk=0)
        with pytest.raises(ValueError, match="differ in role"):
            cache.step(rows=[Step(stream="a", chunk=0), Step(stream="b", chunk=0, role="kv_update")])
        with pytest.raises(ValueError, match=r"name \('a', ''\) twice"):
            cache.step(rows=[Step(stream="a", chunk=0), Step(stream="a", chunk=1)])


#: Holds over all blocks of a model as one span.
WHOLE = holdover.fixed_interval(over="chunks", every=9, span="all", front_anchors=0, warmup=0)


class Carry(nn.Module):
    """``x, text -> (x + text, number · text)``: hidden state and text are handed on; ``bare``: the former alone."""

    def __init__(self, number: float = 2.0, *, bare: bool = False) -> None:
        super().__init__()
        self.number, self.bare = number, bare

    def forward(self, x: Tensor, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return x + text if self.bare else (x + text, self.number * text)


class Chain(nn.Module):
    """Blocks that hand their text on, or, ``collecting``, whose texts the model keeps to itself."""

    def __init__(self, *blocks: Carry, collecting: bool = False) -> None:
        super().__init__()
        self.blocks, self.collecting = nn.ModuleList(blocks), collecting

    def forward(self, x: Tensor, text: Tensor) -> list[Tensor]:
        texts = []
        for block in self.blocks:
            out = block(x, text)
            x, beside = out if isinstance(out, tuple) else (out, text)
            texts.append(beside)
            if not self.collecting:
                text = beside
        return [x, *(texts if self.collecting else texts[-1:])]

    def holdover_slots(self) -> list[Slot]:
        return [Slot(block, rows=lambda rows, x, text: ((x[rows], text[rows]), {})) for block in self.blocks]


def go(cache: holdover.Cache, model: Chain, chunk: int, text: float) -> list[Tensor]:
    with cache.step(chunk=chunk, commits=False):
        return model(ones(), ones(text))


def test_a_span_holds_what_its_last_block_hands_on() -> None:
    model = Chain(*(Carry() for _ in range(4)))
    with holdover.attach(model, WHOLE) as cache:
        first = go(cache, model, 0, 1.0)
        again = go(cache, model, 1, 7.0)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert cache.nbytes == 2 * first[0].nbytes  # the residual and one text, not four
        snapshot = cache.snapshot()
    with holdover.attach(model, WHOLE) as cache:
        cache.restore("default", snapshot)
        again = go(cache, model, 2, 7.0)
        assert cache.stats().reused == 4
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bare", [(3,), (0, 1, 2), (1,), (0, 3)])
def test_blocks_of_a_span_may_return_different_things(bare: tuple[int, ...]) -> None:
    model = Chain(*(Carry(bare=n in bare) for n in range(4)))
    with holdover.attach(model, WHOLE) as cache:
        first, again = go(cache, model, 0, 1.0), go(cache, model, 1, 1.0)
        assert cache.stats().reused == 4
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_a_model_collects_from_its_blocks_is_each_ones_own() -> None:
    model = Chain(*(Carry(number) for number in (2.0, 3.0, 5.0)), collecting=True)
    with holdover.attach(model, WHOLE) as cache:
        go(cache, model, 0, 1.0)
        assert [float(item.mean()) for item in go(cache, model, 1, 7.0)] == [4.0, 2.0, 3.0, 5.0]


def test_rows_computed_beside_reused_ones_keep_their_own_text() -> None:
    model = Chain(*(Carry() for _ in range(4)))
    with holdover.attach(model, WHOLE) as cache:
        for chunk, streams in enumerate((("a",), ("a", "b"))):
            texts = torch.cat([ones(1.0 + 4 * n) for n in range(len(streams))])
            with cache.step(rows=[Step(stream=stream, chunk=chunk, commits=False) for stream in streams]):
                x, text = model(torch.cat([ones()] * len(streams)), texts)
        assert x[:, 0, 0].tolist() == [1 + 15 * 1, 1 + 15 * 5]
        assert text[:, 0, 0].tolist() == [16 * 1, 16 * 5]
