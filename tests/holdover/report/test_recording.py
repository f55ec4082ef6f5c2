"""A user's own loop, recorded: what is on disk is what the loop did."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor, nn

import holdover
from holdover.report import Recording, record
from holdover.report.page import build_page
from holdover.report.run_read import read_run

CHUNKS, FRAMES = 8, 3


class Model(nn.Module):
    """Three blocks of someone else's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 0.1 * torch.tanh(layer(x))
        return x


def frames(x: Tensor) -> dict[str, NDArray[np.uint8]]:
    """Two cameras' pictures of a hidden state."""
    shade = (x.flatten()[:8] * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()
    video = np.repeat(np.broadcast_to(shade[None, None, :, None], (FRAMES, 16, 8, 3)), 2, 2)
    return {"nose": np.repeat(video, 2, 2), "tail": video}


def drive(
    run: Recording, cache: holdover.Cache | None = None, *, seconds: float | None = 0.5
) -> dict[str, NDArray[np.uint8]]:
    """The user's loop: two steps a chunk, a KV update after every fourth."""
    model = Model() if cache is None else cache.model_of_this_test  # type: ignore[attr-defined]
    shown: dict[str, list[NDArray[np.uint8]]] = {"nose": [], "tail": []}
    for n in range(CHUNKS):
        x = torch.linspace(-1, 1, 32).view(1, 4, 8) + 0.01 * n
        for i in range(2):
            with step(cache, chunk=n, index=i, num_steps=2, action=[0.5, 0.1 * n], commits=n % 4 == 0):
                x = model(x)
        pictures = frames(x)
        run.add(pictures, action=torch.tensor([0.5, 0.1 * n]), seconds=seconds)
        for name, video in pictures.items():
            shown[name].append(video)
        if n % 4 == 0:
            committed = x
        if n % 4 == 3:
            with step(cache, chunk=n, role="kv_update"):
                model(committed)
    return {name: np.concatenate(videos) for name, videos in shown.items()}


def step(cache: holdover.Cache | None, **fields: Any) -> Any:
    return cache.step(**fields) if cache else torch.no_grad()


@pytest.fixture
def attached() -> Any:
    model = Model().requires_grad_(False)
    with holdover.attach(model, holdover.xcache(tau_floor=0.5), slots=list(model.layers)) as cache:
        cache.model_of_this_test = model  # type: ignore[attr-defined]
        yield cache


def test_a_recording_is_what_the_loop_did(tmp_path: Path, attached: holdover.Cache) -> None:
    with record(tmp_path, "kitchen", "full", fps=10, rows=[["tail"], ["nose"]], seed=4) as full:
        truth = drive(full, seconds=1.0)
    with record(tmp_path, "kitchen", "xcache", fps=10, cache=attached, reference=full, block_share=0.8) as run:
        shown = drive(run, attached)
    (first, cached), problems = read_run(tmp_path)
    assert problems == []
    assert first.canvas.rects["tail"][1] < first.canvas.rects["nose"][1]
    assert (first.about.name, first.about.seed, first.decisions, first.errors) == ("full", 4, None, None)
    stats, figures = attached.stats(), cached.about.figures
    assert cached.decisions == tuple(attached.trace)
    assert cached.decisions[-1].role == "kv_update"  # though no frames came after it
    assert figures["skip"] == stats.skip > 0.3
    assert figures["reasons"] == dict(stats.reasons) == Counter(d.reason for d in cached.decisions)
    assert figures["bytes_held"] == stats.bytes_held > 0
    assert cached.chunks is not None
    assert [(g.chunk, g.frames, g.seconds) for g in cached.chunks] == [(n, 3, 0.5) for n in range(CHUNKS)]
    assert cached.chunks[3].action == pytest.approx((0.5, 0.3))
    assert figures["speedup"] == pytest.approx(2)
    # Of the chunks that are timed: the first warms up.
    timed = [d.computed for d in cached.decisions if d.role == "denoise" and d.chunk > 0]
    assert figures["speedup_bound"] == pytest.approx(1 / (1 - 0.8 * timed.count(False) / len(timed)))
    assert figures["end_to_end_ms_per_chunk"] == pytest.approx(500)
    both = []
    for name, video in shown.items():
        square = (video.astype(float) - truth[name]) ** 2
        both.append(square.ravel())
        assert figures["cameras"][name]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / square.mean()))
        similar = [
            structural_similarity(
                a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
            )
            for a, b in zip(video[::12], truth[name][::12], strict=True)
        ]
        assert figures["cameras"][name]["ssim"] == pytest.approx(np.mean(similar))
    assert figures["stitched"]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.concatenate(both).mean()))
    assert first.about.figures["stitched"] == {"psnr_db": None, "ssim": 1.0, "lpips": None}
    page, problems = build_page(tmp_path)
    assert problems == []
    assert "kitchen/xcache/video.mp4" in page.read_text()


def test_time_is_that_between_chunks_without_the_recording_s_own(tmp_path: Path) -> None:
    picture = {"nose": np.zeros((1, 512, 512, 3), np.uint8)}
    with record(tmp_path, "kitchen", "full", fps=10) as run:
        started = time.perf_counter()
        for _ in range(3):
            time.sleep(0.02)
            run.add(picture)
        assert 3 * 0.02 <= sum(g.seconds for g in run.chunks) <= time.perf_counter() - started


def test_a_loop_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with record(tmp_path, "kitchen", "full", fps=10) as run:
            drive(run)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_is_named(tmp_path: Path, attached: holdover.Cache) -> None:
    picture = np.zeros((1, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="fps=0"):
        record(tmp_path, "kitchen", "full", fps=0)
    with pytest.raises(ValueError, match="letters, digits"):
        record(tmp_path, "a/b", "full", fps=10)
    full = record(tmp_path, "kitchen", "full", fps=10)
    with pytest.raises(ValueError, match="'kitchen', not 'cellar'"):
        record(tmp_path, "cellar", "xcache", fps=10, reference=full)
    with pytest.raises(ValueError, match="no videos"):
        full.add({"nose": picture.astype(float)})
    full.add({"nose": picture})
    with pytest.raises(ValueError, match="the same in every chunk"):
        full.add({"nose": picture, "tail": picture})
    other = record(tmp_path, "kitchen", "xcache", fps=10, reference=full)
    other.add({"tail": picture})
    with pytest.raises(ValueError, match="its reference 'full'"):
        other.__exit__(None, None, None)
    with pytest.raises(ValueError, match="smaller than 11 pixels"):
        record(tmp_path, "kitchen", "full", fps=10).add({"nose": picture[:, :8]})
    with pytest.raises(ValueError, match="no chunk"):
        record(tmp_path, "kitchen", "full", fps=10).__exit__(None, None, None)
    run = record(tmp_path, "kitchen", "xcache", fps=10, cache=attached)
    drive(run, attached)
    attached.reset()
    with attached.step(chunk=0, num_steps=2):
        attached.model_of_this_test(torch.zeros(1, 4, 8))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="two chunks are chunk 0"):
        run.add(frames(torch.zeros(8)))
    attached.trace.clear()
    with pytest.raises(ValueError, match="trace was cleared"):
        run.add(frames(torch.zeros(8)))
    assert list(tmp_path.iterdir()) == []
