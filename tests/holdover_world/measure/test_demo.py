"""The demo end to end, its report against figures computed without it."""

from __future__ import annotations

import copy
import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import holdover
from holdover.report.progress import bar
from holdover.report.run_read import read_run
from holdover_world.loop.closed_loop import ClosedLoop
from holdover_world.loop.scenarios import load_scenario
from holdover_world.measure import demo
from holdover_world.measure.demo import DemoOptions, Drive, affordable, run_demo, seconds_of
from holdover_world.measure.tables import result_lines
from holdover_world.model.transformer import WorldModel

CHUNKS = 16
FAST = "held_window+step_hold"


@pytest.fixture(scope="module")
def out(model: WorldModel, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    options = DemoOptions(scenarios=("urban", "uturn-steady"), chunks=CHUNKS, every=16, told=("oracle", "newest"))
    with bar() as progress:
        run_demo(model, folder, options, clips=clips, progress=progress)
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


#: Its drives, and the runs of each in the order of what they prove.
DRIVES = {
    "urban-oracle": (FAST, "xcache", "full"),
    "uturn-steady": ("xcache", "xcache_reactive", "full"),
    "urban-newest": ("frontier+step_hold", "xcache", "full"),
}


def policy_of(report: dict[str, Any], drive: str, name: str) -> dict[str, Any]:
    entry = next(entry for entry in report["scenarios"] if entry["name"] == drive)
    found: dict[str, Any] = next(policy for policy in entry["policies"] if policy["name"] == name)
    return found


def test_the_report_has_the_documented_shape(report: dict[str, Any]) -> None:
    assert [drive["name"] for drive in report["scenarios"]] == list(DRIVES)
    told = ["urban, oracle plan", "uturn, one action held", "urban, newest held"]
    assert [drive["title"] for drive in report["scenarios"]] == told
    assert {"torch", "python", "processor", "dtype"} <= report["environment"].keys()
    number = int | float
    for drive in report["scenarios"]:
        assert drive["frames"] == CHUNKS * 4
        assert [policy["name"] for policy in drive["policies"]] == list(DRIVES[drive["name"]])
        for policy in drive["policies"]:
            assert policy["drive"] == drive["title"]
            assert policy["cycles_timed"] == 3
            for key in ("skip", "speedup", "speedup_bound", "dit_ms_per_chunk", "end_to_end_ms_per_chunk"):
                assert isinstance(policy[key], number), key
            for key in ("speedup_spread", "dit_ms_per_chunk_spread"):
                low, high = policy[key]
                assert low <= high
            assert isinstance(policy["bytes_held"], int)
            assert policy["cameras"].keys() == {"front_wide", "rear"}
            for view in (policy["stitched"], *policy["cameras"].values()):
                assert view.keys() == {"psnr_db", "ssim", "lpips"}
            assert {"brake", "steer"} <= policy["reaction"].keys()
            assert all(isinstance(count, int) for count in policy["reasons"].values())


def frames_alone(
    model: WorldModel, clips: Path, policy: holdover.Policy | None
) -> tuple[dict[str, NDArray[np.uint8]], holdover.Cache | None]:
    scenario = load_scenario("urban", model, clips=clips, chunks=CHUNKS)
    own = copy.deepcopy(model)
    cache = holdover.attach(own, policy) if policy else None
    loop = ClosedLoop(own, scenario.start, scenario.start_actions, seed=0, cache=cache, track=scenario.track)
    pieces = loop.run(scenario.actions, (scenario.plan(g) for g in range(CHUNKS)))
    shown = [model.codec.decode(piece.latents, piece.before) for piece in pieces]
    return {name: np.concatenate([piece[name][0] for piece in shown]) for name in shown[0]}, cache


def dit_seconds(out: Path, drive: str, name: str) -> NDArray[np.float64]:
    found = next(r for r in read_run(out)[0] if (r.about.scenario, r.about.name) == (drive, name))
    return np.array([g.dit_seconds for g in found.chunks or ()], float)


def test_the_figures_equal_those_of_runs_of_their_own(
    out: Path, report: dict[str, Any], model: WorldModel, clips: Path
) -> None:
    full, _ = frames_alone(model, clips, None)
    cached, cache = frames_alone(model, clips, holdover.xcache())
    assert cache is not None
    stats, figures = cache.stats(), policy_of(report, "urban-oracle", "xcache")
    assert figures["reasons"] == dict(stats.reasons)
    assert figures["bytes_held"] == stats.bytes_held > 0
    # Skip and bound are of the chunks whose times enter the medians: here all but the first cycle.
    timed = [d.computed for d in cache.trace if d.role == "denoise" and d.chunk >= 4]
    assert figures["skip"] == pytest.approx(timed.count(False) / len(timed)) != stats.skip
    squares, pixels = 0.0, 0
    for name, frames in cached.items():
        error = (frames.astype(float) - full[name]) ** 2
        assert figures["cameras"][name]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error.mean()))
        squares, pixels = squares + error.sum(), pixels + error.size
    assert figures["stitched"]["psnr_db"] == pytest.approx(10 * np.log10(255**2 * pixels / squares))
    bounds = []
    for g in range(4, CHUNKS, 4):
        calls = [d.computed for d in cache.trace if d.role == "denoise" and d.chunk in range(g, g + 4)]
        bounds.append(1 / (1 - figures["block_share"] * calls.count(False) / len(calls)))
    assert figures["speedup_bound"] == pytest.approx(np.median(bounds))
    whole, own = (dit_seconds(out, "urban-oracle", name).reshape(-1, 4).mean(1)[1:] for name in ("full", "xcache"))
    assert figures["speedup"] == pytest.approx(np.median(whole / own))
    low, high = figures["speedup_spread"]
    assert low <= figures["speedup"] <= high
    assert figures["share_of_bound"] == pytest.approx(figures["speedup"] / figures["speedup_bound"])
    scenario = load_scenario("urban", model, clips=clips, chunks=CHUNKS)
    assert scenario.truth is not None
    off = [((full[name].astype(float) - scenario.truth[name]) ** 2).ravel() for name in full]
    truth = policy_of(report, "urban-oracle", "full")["truth"]
    assert truth["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.concatenate(off).mean()))
    assert policy_of(report, "uturn-steady", "full")["truth"] is None


def test_what_runs_no_pass_counts_as_saved(report: dict[str, Any]) -> None:
    """The plan is kept, so each cycle runs one chunk of four, and in that two passes of four."""
    figures = policy_of(report, "urban-oracle", FAST)
    assert (figures["skip"], figures["idle"], figures["held_chunks"]) == (1 - 2 / 16, 1 - 2 / 16, CHUNKS - 4)
    assert figures["speedup_bound"] == pytest.approx(1 / (1 - figures["pass_share"] * 14 / 16))
    assert figures["block_share"] < figures["pass_share"] < 1
    assert figures["skip_by_block"] == [None] * 4  # the model is one slot
    assert figures["full_chunks"] == 0
    # Two passes of four are held; in the others three chunks of four compute a quarter of the tokens.
    figures = policy_of(report, "urban-newest", "frontier+step_hold")
    assert figures["skip"] == figures["idle"] == pytest.approx(1 / 2 + 1 / 2 * 3 / 4 * 3 / 4)


def test_curves_add_up_to_the_skip(report: dict[str, Any]) -> None:
    for drive in DRIVES:
        figures = policy_of(report, drive, "xcache")
        assert np.mean(figures["skip_by_block"]) == pytest.approx(figures["skip"])
        assert figures["skip_by_block"][0] == 0  # the anchor
        assert np.shape(figures["cosine_by_step_and_block"]) == (4, 4)
        assert [row[0] for row in figures["cosine_by_step_and_block"]] == [None] * 4


def test_the_page_shows_every_drive_and_its_files_exist(out: Path) -> None:
    html = (out / "index.html").read_text()
    for name, title in (("urban-oracle", "urban, oracle plan"), ("uturn-steady", "uturn, one action held")):
        assert f'<h2 id="{name}">{title}</h2>' in html
    assert "Measured in float32" in html
    assert html.index(f">{FAST}</td>") < html.index(">xcache</td>") < html.index(">full</td>")
    named: list[str] = re.findall(r'(?:src|href)="([^"#:]+)"', html)
    assert len([name for name in named if name.endswith("video.mp4")]) >= 9
    for name in named:
        assert (out / name).stat().st_size > 0, name
    assert not list(out.rglob(".partial*"))
    assert "51.37" in html  # the published figure beside one's own


def test_the_recorded_run_is_the_driven_one(out: Path, report: dict[str, Any], model: WorldModel, clips: Path) -> None:
    rollouts, problems = read_run(out)
    assert problems == []
    of = {(r.about.scenario, r.about.name): r for r in rollouts}
    cached = of["urban-oracle", "xcache"]
    assert cached.decisions is not None
    assert cached.chunks is not None
    assert cached.errors is not None
    figures = policy_of(report, "urban-oracle", "xcache")
    assert Counter(d.reason for d in cached.decisions) == figures["reasons"]
    assert cached.chunks[-1].bytes_held == figures["bytes_held"]
    scenario = load_scenario("urban", model, clips=clips, chunks=CHUNKS)
    assert [g.action for g in cached.chunks] == [tuple(action) for action in scenario.actions.tolist()]
    for name, errors in cached.errors.items():
        shown = figures["stitched"] if name == "stitched" else figures["cameras"][name]
        assert 10 * np.log10(255**2 / errors.mean()) == pytest.approx(shown["psnr_db"]), name
    reactive = of["uturn-steady", "xcache_reactive"].about
    assert ("uturn-steady", reactive.reference) in of
    assert of["urban-oracle", "full"].decisions is None
    assert of["urban-oracle", "full"].errors is None
    with (out / "plots" / "urban-oracle-time.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rollout"] == FAST]
    median = 1e3 * float(np.median(dit_seconds(out, "urban-oracle", "full")))
    figures = policy_of(report, "urban-oracle", FAST)
    for g, row in enumerate(rows):  # a chunk that runs no pass leaves the KV update, one that runs two passes of four…
        left = 1 - figures["pass_share"] * (0.5 if g % 4 == 0 else 1)
        assert float(row["bound_milliseconds"]) == pytest.approx(median * left)


@pytest.mark.filterwarnings("ignore:.* could reuse nothing in")
def test_in_the_plain_cadence_xcache_has_nothing_to_skip(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    options = DemoOptions(scenarios=("urban",), chunks=12, cadence="plain")
    with bar() as progress:
        report = run_demo(model, tmp_path, options, clips=clips, progress=progress)
    assert report["scenarios"][0]["title"] == "urban, plain cadence"
    cached = policy_of(report, "urban-plain", "xcache")
    assert (cached["skip"], cached["stitched"]["psnr_db"]) == (0, None)
    assert cached["reasons"].keys() == {"warm-up", "kv cycle", "kv update"}
    assert policy_of(report, "urban-plain", "step_hold")["skip"] == 0.5
    assert report["settings"]["every"] == 4  # a frame of each chunk


def test_by_default_it_drives_what_six_minutes_allow(
    model: WorldModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, three = Drive(kind="urban", told="oracle"), DemoOptions().drives
    assert [drive.title for drive in three] == [f"{kind}, oracle plan" for kind in ("highway", "urban", "uturn")]
    # A chunk of 1.8 s: 183 chunks, of which three drives take 36 once, and 6.3 for each chunk.
    assert affordable(1.8, three, 4) == 24
    assert affordable(1.3, three, 4) == 32  # 254 less 36, by 6.3: 34.6
    assert affordable(9.0, three, 4) == 24  # no fewer, however slow
    assert affordable(0.01, [oracle], 4) == 60
    assert seconds_of(24, 1.8, three) == pytest.approx(1.8 * (24 * 6.3 + 36))
    assert seconds_of(24, 1.8, three) < 360
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(demo, "SHORTEST", 8)
    monkeypatch.setattr(demo, "LONGEST", 12)
    earlier = tmp_path / "urban-steady" / "xcache"
    earlier.mkdir(parents=True)
    (earlier / "SHA256SUMS").touch()
    with bar() as progress, progress.console.capture() as said:
        report = run_demo(model, tmp_path, DemoOptions(scenarios=("urban",)), clips=clips, progress=progress)
    assert "8 chunks of each drive (3 seconds of video) take about 1 min" in " ".join(said.get().split())
    assert not earlier.exists()
    assert (report["settings"]["chunks"], report["scenarios"][0]["frames"]) == (8, 32)
    own = load_scenario("urban", model, clips=clips, chunks=8)
    assert report["scenarios"][0]["actions"] == own.actions.tolist()
    *lines, few = result_lines(report)  # one cycle is timed: no time is given
    assert lines[0].startswith(f"urban, oracle plan, float32: {FAST} –, ")
    assert "full compute – ms" in lines[0]
    assert "fewer than 3 cycles" in few


def test_what_is_driven() -> None:
    def driven(**options: Any) -> list[str]:
        return [drive.name for drive in DemoOptions(**options).drives]

    both: Any = {"scenarios": ("urban", "uturn")}
    assert driven(**both, told=("newest",)) == ["urban-newest", "uturn-newest"]
    assert driven(**both, told=("oracle", "steady"))[1:3] == ["uturn-oracle", "urban-steady"]
    assert driven(scenarios=("urban-steady",), told=("oracle", "newest", "steady")) == ["urban-steady"]
    assert driven(**both, cadence="plain", told=("oracle", "newest")) == ["urban-plain", "uturn-plain"]
    assert Drive(kind="urban", told="steady", cadence="plain").title == "urban, plain cadence, one action held"
    assert len(driven(told=("oracle", "newest", "steady"))) == 9


def test_options_are_checked(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'town' is not one of"):
        DemoOptions(scenarios=("town",))
    with pytest.raises(ValueError, match="no scenario"):
        DemoOptions(scenarios=())
    with pytest.raises(ValueError, match="give some of oracle, newest, steady"):
        DemoOptions(told=("prophecy",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every=0"):
        DemoOptions(every=0)
    with bar() as progress, pytest.raises(ValueError, match="give 8 or more"):
        run_demo(model, tmp_path, DemoOptions(chunks=7), clips=clips, progress=progress)
