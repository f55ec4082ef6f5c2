"""The KV cache alone."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from holdover_world.model.kv_cache import KVBatch, KVCache

PER_FRAME = 3  # tokens


def made(first: int, frames: int, *, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Keys ``[B, V, H, S, D]`` that hold the number of their latent frame, and values that are their negatives."""
    number = torch.arange(first, first + frames).repeat_interleave(PER_FRAME).float()
    keys = number[:, None].expand(rows, 2, 4, -1, 5) + 100 * torch.arange(rows)[:, None, None, None, None]
    return keys, -keys


def filled(frames: int, *, window: int = 2, capacity: int = 4, rows: int = 1) -> KVCache:
    cache = KVCache(capacity)
    for first in range(0, frames, window):
        cache.stage(0, 1, *made(first, window, rows=rows))
        cache.commit(window)
    return cache


def frames_in(cache: KVCache | KVBatch, row: int = 0) -> list[float]:
    """The numbers of the latent frames held, oldest first."""
    found = cache.get(0, 1)
    assert found is not None
    keys, values = found
    assert torch.equal(values, -keys)
    return (keys[row, 0, 0, ::PER_FRAME, 0] - 100 * row).tolist()


@pytest.mark.parametrize("window", [1, 2])
def test_it_rolls(window: int) -> None:
    cache = KVCache(4)
    assert cache.get(0, 1) is None
    for first in range(0, 6, window):
        cache.stage(0, 1, *made(first, window))
        cache.commit(window)
        newest = first + window
        assert frames_in(cache) == list(range(max(0, newest - 4), newest))
        assert (cache.starts, cache.length) == ((newest,), min(newest, 4))


def test_what_is_staged_is_not_seen_before_it_is_committed() -> None:
    cache = filled(2)
    cache.stage(0, 1, *made(2, 2))
    assert frames_in(cache) == [0, 1]
    cache.stage(0, 1, *made(2, 2))  # a pass that failed half-way is made again
    cache.commit(2)
    assert frames_in(cache) == [0, 1, 2, 3]


def test_a_fork_and_its_origin_go_their_own_ways() -> None:
    cache = filled(4)
    twin = cache.fork()
    assert twin.get(0, 1)[0] is cache.get(0, 1)[0]  # type: ignore[index]  # they share memory until then
    for each, first in ((cache, 4), (twin, 8)):
        each.stage(0, 1, *made(first, 2))
        each.commit(2)
    assert frames_in(cache) == [2, 3, 4, 5]
    assert frames_in(twin) == [2, 3, 8, 9]


def test_rows_are_taken() -> None:
    cache = filled(4, rows=3)
    keys, _ = cache.take([2, 0]).get(0, 1)  # type: ignore[misc]
    assert torch.equal(keys, cache.get(0, 1)[0][[2, 0]])  # type: ignore[index]
    assert cache.take([1]).starts == cache.starts


def test_it_is_written_and_read() -> None:
    cache, again = filled(6), KVCache(4)
    again.load_state_dict(load(save(cache.state_dict())))
    assert (again.starts, again.length) == (cache.starts, cache.length)
    assert frames_in(again) == frames_in(cache)
    assert again.nbytes == cache.nbytes == 2 * 2 * 4 * 4 * PER_FRAME * 5 * 4
    assert KVCache(4).nbytes == 0


def test_a_batch_has_a_row_per_cache() -> None:
    """Caches of equal length, though one stream may be older than the other."""
    first, second = filled(4), filled(6)
    batch = KVBatch([first, second])
    assert batch.starts == (4, 6)
    keys, _ = batch.get(0, 1)  # type: ignore[misc]
    assert keys[:, 0, 0, ::PER_FRAME, 0].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    batch.stage(0, 1, *made(8, 2, rows=2))
    batch.commit(2)
    assert frames_in(first) == [2, 3, 8, 9]
    assert batch.starts == (6, 8)
    assert batch.take([1]).starts == (8,)
