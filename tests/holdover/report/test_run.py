"""A run's folder: what is written is read again, and whatever is damaged is named while the rest is shown."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from holdover import cli
from holdover.report.decisions import skip_rate
from holdover.report.page import build_page
from holdover.report.run_dir import GAIN, SUMS, ChunkRecord, Rollout, remove_rollouts
from holdover.report.run_read import read_run
from holdover.report.run_write import write_rollout
from tests.holdover.report import runs

ROLLOUTS = [("first", "full"), ("first", "xcache"), ("first", "other"), ("second", "full"), ("second", "xcache")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The first scenario's cached rollout, and the full one, alone: quick to build a page of."""
    for name in ("full", "xcache"):
        shutil.copytree(run / "first" / name, tmp_path / "first" / name)
    return tmp_path


def decoded(path: Path) -> list[Any]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_what_is_written_is_read_again(run: Path) -> None:
    rollouts, problems = read_run(run)
    assert problems == []
    assert [(r.about.scenario, r.about.name) for r in rollouts] == ROLLOUTS
    full, cached = rollouts[:2]
    assert full.decisions is None
    assert full.errors is None
    assert not full.difference
    assert cached.decisions == tuple(runs.decisions(1))
    assert cached.chunks is not None
    assert cached.chunks[7] == ChunkRecord(
        chunk=7, frames=4, seconds=0.3, dit_seconds=0.2, bytes_held=2**20, action=(0.5, 0.07)
    )
    assert cached.about.figures == runs.figures("xcache")
    assert cached.errors is not None
    errors = {name: ((runs.video("xcache")[name] - runs.video("full")[name].astype(float)) ** 2) for name in runs.SIZES}
    for name, error in errors.items():
        assert cached.errors[name] == pytest.approx(error.mean((1, 2, 3)))
    both = np.concatenate([error.reshape(runs.FRAMES, -1) for error in errors.values()], 1)
    assert cached.errors["stitched"] == pytest.approx(both.mean(1))


def test_the_videos_are_the_frames_and_their_difference(run: Path) -> None:
    rollout = read_run(run)[0][1]
    frames, difference = decoded(rollout.folder / "video.mp4"), decoded(rollout.folder / "difference.mp4")
    assert len(frames) == len(difference) == runs.FRAMES
    for t in (0, 1, 50, 95):
        for name in runs.SIZES:
            left, top, width, height = rollout.canvas.rects[name]
            shown = frames[t][top : top + height, left : left + width].astype(int)
            assert np.abs(shown - runs.video("xcache")[name][t]).mean() < 3
            apart = np.abs(runs.video("xcache")[name][t].astype(int) - runs.video("full")[name][t]).mean(-1)
            shown = difference[t][top : top + height, left : left + width, 0].astype(int)
            assert np.abs(shown - np.minimum(255, GAIN * apart)).mean() < 3


def test_the_sums_are_those_of_sha256sum(run: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=run / "first" / "xcache", capture_output=True, text=True)
    assert checked.returncode == 0
    assert checked.stdout.count(": OK") == 6


def test_a_rollout_is_replaced_by_its_next_recording(copy: Path) -> None:
    video = {"front": np.zeros((2, 16, 16, 3), np.uint8)}
    chunks = [ChunkRecord(chunk=0, frames=2, seconds=1.0)]
    write_rollout(copy, Rollout(scenario="first", name="xcache", fps=12), video, chunks=chunks)
    rollout = next(r for r in read_run(copy)[0] if r.about.name == "xcache")
    assert (rollout.frames, rollout.decisions, rollout.errors, rollout.difference) == (2, None, None, False)


def test_only_rollouts_are_removed(copy: Path) -> None:
    (copy / "first" / "notes.txt").write_text("mine")
    remove_rollouts(copy, "first")
    assert [path.name for path in (copy / "first").iterdir()] == ["notes.txt"]


def test_the_record_has_the_rows_of_cameras(tmp_path: Path) -> None:
    """The page needs no rig: it finds the cameras where they were put."""
    videos = {name: np.zeros((2, 16, 16, 3), np.uint8) for name in ("a", "b", "c")}
    rollout = Rollout(scenario="s", name="full", fps=12, rows=[["c"], ["a", "b"]])
    write_rollout(tmp_path, rollout, videos, chunks=[ChunkRecord(chunk=0, frames=2, seconds=1.0)])
    (read,) = read_run(tmp_path)[0]
    assert read.about.rows == [["c"], ["a", "b"]]
    assert read.canvas.rects == {"c": (8, 0, 16, 16), "a": (0, 16, 16, 16), "b": (16, 16, 16, 16)}


def test_published_figures_stand_below_those_of_their_scenario(tmp_path: Path) -> None:
    video = {"front": np.zeros((2, 16, 16, 3), np.uint8)}
    chunks = [ChunkRecord(chunk=0, frames=2, seconds=1.0)]
    published = {"PSNR": "51.37", "source": "a paper"}
    for name, more in (("full", {"published": published}), ("xcache", {"policy": "xcache()"})):
        figures = {key: value for key, value in runs.figures(name).items() if key != "reaction"}
        write_rollout(tmp_path, Rollout(scenario="s", name=name, fps=12, figures=figures, **more), video, chunks=chunks)
    page = build_page(tmp_path)[0].read_text()
    assert re.findall(r'<tr class="(\w+)">', page) == ["full", "cached", "published"]
    assert "51.37" in page
    assert "<strong>Published</strong>: a paper." in page
    assert "<strong>Brake</strong>" not in page


def test_wrong_input_is_named(tmp_path: Path) -> None:
    video = {"front": np.zeros((2, 16, 16, 3), np.uint8)}
    good = {"chunks": [ChunkRecord(chunk=0, frames=2, seconds=1.0)]}
    plain, against = Rollout(scenario="a", name="b", fps=12), Rollout(scenario="a", name="c", fps=12, reference="b")
    for match, rollout, frames, more in (
        ("no videos", plain, {}, good),
        ("no videos", plain, {"front": video["front"].astype(float)}, good),
        ("differ in length", plain, {**video, "rear": video["front"][:1]}, good),
        ("do not add up to 2 frames", plain, video, {"chunks": []}),
        ("or neither", against, video, good),
        ("its reference 'b'", against, video, {**good, "reference": {"rear": video["front"]}}),
    ):
        with pytest.raises(ValueError, match=match):
            write_rollout(tmp_path, rollout, frames, **more)
    assert not list(tmp_path.rglob("*.*"))
    for match, fields in (
        ("letters, digits", {"scenario": "../a"}),
        ("letters, digits", {"name": "a b"}),
        ("its own reference", {"reference": "b"}),
        ("between 0 and 1", {"block_share": 1.5}),
    ):
        with pytest.raises(ValueError, match=match):
            Rollout(**{"scenario": "a", "name": "b", "fps": 12, **fields})
    with pytest.raises(FileNotFoundError, match="holds no rollout"):
        read_run(tmp_path)


def test_the_plots_data_is_the_run_s(run: Path) -> None:
    build_page(run)
    rollouts = {(r.about.scenario, r.about.name): r for r in read_run(run)[0]}
    cached = rollouts["first", "xcache"]
    assert cached.errors is not None
    assert cached.decisions is not None

    def table(name: str) -> list[dict[str, str]]:
        with (run / "plots" / f"first-{name}.csv").open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["rollout"] == "xcache"]

    for row in table("psnr"):
        error = cached.errors["front"][int(row["frame"])]
        assert float(row["front"]) == pytest.approx(10 * np.log10(255**2 / error), rel=1e-5)
    denoising = [d for d in cached.decisions if d.role == "denoise" and d.chunk > 0]
    for row in table("block-skip"):
        calls = [d.computed for d in denoising if d.block == int(row["block"])]
        assert float(row["skip"]) == pytest.approx(calls.count(False) / len(calls))
    for row in table("cosine"):
        seen = [
            d.scores["cosine"]
            for d in denoising
            if (d.index, d.block) == (int(row["step"]), int(row["block"])) and d.scores
        ]
        assert float(row["cosine"]) == pytest.approx(np.mean(seen)) if seen else row["cosine"] == "nan"
    for row in table("time"):
        skip = skip_rate([d for d in cached.decisions if d.chunk == int(row["chunk"])])
        assert float(row["milliseconds"]) == pytest.approx(200)
        assert float(row["bound_milliseconds"]) == pytest.approx(400 * (1 - 0.8 * (skip or 0)))
    assert [float(row["mebibytes"]) for row in table("held")] == [0.0] + [1.0] * 23
    assert [(row["event"], row["ratio"]) for row in table("reaction")] == [("brake", "0.1"), ("steer", "0.9")]
    with (run / "plots" / "run-front.csv").open(newline="") as file:
        points = {(row["rollout"], row["scenario"], row["speedup"], row["psnr_db"]) for row in csv.DictReader(file)}
    cached = {("xcache", "first"), ("other", "first"), ("xcache", "second")}
    assert points == {(name, scenario, "2.0", "30.5") for name, scenario in cached}


class Text(HTMLParser):
    """The visible text and the linked files of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.files: list[str] = []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.files += [value for name, value in attrs if name in ("src", "href") and value and value[0] not in "#d"]


@pytest.mark.parametrize("how", ["truncate", "empty", "flip", "remove"])
def test_a_damaged_file_is_named_and_the_rest_is_built(copy: Path, how: str) -> None:
    folder = copy / "first" / "xcache"
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 7
    for name in names:
        path, whole = folder / name, (folder / name).read_bytes()
        if how == "remove":
            path.unlink()
        else:
            middle = len(whole) // 2
            flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
            path.write_bytes({"truncate": whole[:middle], "empty": b"", "flip": flipped}[how])
        rollouts, problems = read_run(copy)
        assert any(f"first/xcache/{name}" in line or (name == SUMS and SUMS in line) for line in problems), name
        assert next(r.about.name for r in rollouts) == "full"
        if name not in (SUMS, "rollout.json"):
            assert len(problems) == 1
            cached = rollouts[1]
            kept = (cached.video, cached.difference, cached.decisions, cached.chunks, cached.errors)
            assert [bool(part) for part in kept].count(False) == 1, name
        path.write_bytes(whole)
    assert read_run(copy)[1] == []


@pytest.mark.parametrize("name", ["video.mp4", "decisions.parquet", "chunks.parquet", "frames.parquet", SUMS])
def test_the_page_of_a_damaged_run(copy: Path, name: str) -> None:
    (copy / "first" / "xcache" / name).write_bytes(b"x")
    (copy / "report.json").write_text("{")
    (copy / "reaction.json").write_text('{"rows": [1]}')
    result = CliRunner().invoke(cli.app, ["report", str(copy)])
    assert result.exit_code == 1
    for damaged in (f"first/xcache/{name}", "report.json", "reaction.json"):
        assert f"holdover: {damaged} is damaged" in result.stderr
    text = Text()
    text.feed((copy / "index.html").read_text())
    shown = "".join(text.words)
    assert f"first/xcache/{name} is damaged" in shown
    assert '<h2 id="first">' in (copy / "index.html").read_text()
    assert all((copy / file).exists() for file in text.files)
    assert ("first/xcache/video.mp4" in text.files) == (name not in ("video.mp4", SUMS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rollout.json", b'{"format": 9}'),
        ("rollout.json", b'{"format": 2}'),
        ("rollout.json", b"[]"),
        ("decisions.parquet", b"PAR1"),
        ("frames.parquet", b""),
    ],
)
def test_a_file_that_another_version_wrote_is_named(copy: Path, name: str, content: bytes) -> None:
    folder = copy / "first" / "xcache"
    (folder / name).write_bytes(content)
    sums = subprocess.run(["sha256sum", name], cwd=folder, capture_output=True, text=True, check=True).stdout
    lines = [line for line in (folder / SUMS).read_text().splitlines(keepends=True) if name not in line]
    (folder / SUMS).write_text(sums + "".join(lines))
    assert read_run(copy)[1] == [
        f"first/xcache/{name} is whole, but not what this version writes (format 2); record the run again"
    ]


def test_reaction_curves_are_drawn(copy: Path) -> None:
    rows = [{"policy": "xcache", "event": "brake", "ratio_by_chunk": [0.1, 0.2, None, 1.0]}]
    (copy / "reaction.json").write_text(json.dumps({"rows": rows}))
    assert build_page(copy)[1] == []
    assert (copy / "plots" / "run-reaction.csv").read_text().splitlines()[2:] == [
        "xcache,brake,1,0.2",
        "xcache,brake,2,",
        "xcache,brake,3,1.0",
    ]


def test_parquet_is_flat(run: Path) -> None:
    table = pyarrow.parquet.read_table(run / "first" / "xcache" / "decisions.parquet")
    assert {"score_cosine", "score_threshold", "score_deviation", "reason", "chunk"} <= set(table.column_names)
