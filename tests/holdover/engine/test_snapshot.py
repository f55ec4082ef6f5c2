"""Snapshots: whole or not at all, and never under another policy or model unnoticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import holdover
from tests.holdover.engine.models import EAGER, Scale, Stack, ones, reasons


def run(cache: holdover.Cache, model: nn.Module, value: float, chunk: int, **fields: object) -> Tensor:
    with cache.step(**{"chunk": chunk, "commits": False, **fields}):
        return model(ones(value))


@pytest.fixture
def snapshot() -> holdover.Snapshot:
    model = Stack(Scale(), Scale(3))
    with holdover.attach(model, EAGER) as cache:
        run(cache, model, 1, 0, action=[0.5])
        return cache.snapshot()


def test_it_is_a_copy(snapshot: holdover.Snapshot) -> None:
    model = Stack(Scale(), Scale(3))
    with holdover.attach(model, EAGER) as cache:
        before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
        cache.restore("a", snapshot)
        again = cache.snapshot("a")
        assert cache.nbytes == snapshot.nbytes > 0
        run(cache, model, 9, 1, stream="a", action=[0.5], condition="new")  # overwrites what is held
        for taken in (snapshot, again):
            assert all(torch.equal(taken.tensors[name], before[name]) for name in before)
        cache.restore("b", snapshot)
        assert run(cache, model, 5, 1, stream="b", action=[0.5])[0, 0, 0] == 5 + 1 + 4


def test_saving_replaces_and_leaves_no_other_file(snapshot: holdover.Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    path.write_text("what was here before")
    snapshot.save(path)
    loaded = holdover.Snapshot.load(path)
    assert [file.name for file in tmp_path.iterdir()] == ["stream.safetensors"]
    assert loaded.plain == snapshot.plain
    assert loaded.tensors.keys() == snapshot.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], snapshot.tensors[name]) for name in loaded.tensors)


def test_a_failed_save_keeps_the_old_file(
    snapshot: holdover.Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stream.safetensors"
    snapshot.save(path)
    before = path.read_bytes()

    def fail(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("holdover.engine.tensor_file.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        snapshot.save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no snapshot at"):
        holdover.Snapshot.load(tmp_path / "nothing")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="is not a snapshot of format 'stream 5'"):
        holdover.Snapshot.load(tmp_path / "weights.safetensors")


def test_another_policy_is_refused_by_name(snapshot: holdover.Snapshot) -> None:
    other = holdover.xcache(front_anchors=0, warmup=0, tau_floor=0.5, tau_dev=1e9)
    with (
        holdover.attach(Stack(Scale(), Scale(3)), other) as cache,
        pytest.raises(ValueError, match=r"taken under .*tau_floor=-1.0.*attached is .*tau_floor=0.5"),
    ):
        cache.restore("default", snapshot)


class Other(Scale):
    """Another class with the same parameters."""


@pytest.mark.parametrize(
    "model",
    [Stack(Scale(), Scale(3.001)), Stack(Scale(), Other(3)), Stack(Scale(), Scale(3), Scale()), Stack(Scale())],
    ids=["weights", "class", "more blocks", "fewer blocks"],
)
def test_in_another_model_every_slot_is_computed_once(model: Stack, snapshot: holdover.Snapshot) -> None:
    with holdover.attach(model, EAGER) as cache:
        cache.restore("default", snapshot)
        assert cache.nbytes == 0
        exact = ones(5)
        for block in model.blocks:
            exact = exact * block.factor
        assert torch.equal(run(cache, model, 5, 1, action=[0.5]), exact)
        run(cache, model, 6, 2, action=[0.5])
    count = len(model.blocks)
    expected = (["snapshot"] * 2 + ["first"])[:count]
    assert reasons(cache) == expected + ["reuse"] * count


def test_tuples_and_other_dtypes_survive(tmp_path: Path) -> None:
    class Tupled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, float, None]:
            return (x * 2).bfloat16(), x.mean(-1).double(), 0.5, None

    model = Stack(Tupled())
    with holdover.attach(model, EAGER) as cache:
        with cache.step(chunk=0, commits=False):
            model(ones(1))
        cache.snapshot().save(tmp_path / "s")
        cache.reset()
        cache.restore("default", holdover.Snapshot.load(tmp_path / "s"))
        with cache.step(chunk=1, commits=False):
            hidden, item, number, nothing = model.blocks[0](ones(5))
    assert (hidden.dtype, hidden[0, 0, 0], item.dtype, item[0, 0]) == (torch.bfloat16, 6, torch.float64, 1)
    assert (number, nothing) == (0.5, None)
    assert reasons(cache) == ["first", "reuse"]


def test_warm_up_and_exactness_survive(snapshot: holdover.Snapshot) -> None:
    model, policy = Stack(Scale()), holdover.xcache(warmup=3, front_anchors=0)
    with holdover.attach(model, policy) as cache:
        for chunk in range(2):
            run(cache, model, 1, chunk)
        cache.restore("later", cache.snapshot())
        assert cache.exact("later")
        for chunk in (2, 3):
            run(cache, model, 1, chunk, stream="later")
        assert not cache.exact("later")
        assert [d.reason for d in cache.trace if d.stream == "later"] == ["warm-up", "reuse"]
        with pytest.raises(ValueError, match="no stream 'typo'"):
            cache.snapshot("typo")


def test_one_decision_for_all_branches_survives_between_two_of_them() -> None:
    """The branch that came first leads, also over a snapshot."""
    model = Stack(Scale())
    policy = replace(holdover.xcache(front_anchors=0, warmup=0), one_for_all_branches=True)
    seen, turned = ones(), torch.tensor([1.0, -1.0]).expand(1, 3, 2)

    def told(cache: holdover.Cache, x: Tensor, chunk: int, branch: str) -> str:
        with cache.step(chunk=chunk, branch=branch, commits=False):
            model(x)
        return cache.trace[-1].reason

    with holdover.attach(model, policy) as cache:
        assert [told(cache, seen, 0, branch) for branch in "ab"] == ["first", "branch"]
        assert told(cache, turned, 1, "a") == "cosine"
        cache.restore("default", cache.snapshot())
        assert told(cache, seen, 1, "b") == "branch"
        assert [told(cache, turned, 2, branch) for branch in "ab"] == ["reuse", "reuse"]
