"""The demo end to end, its report against figures computed without it."""

from __future__ import annotations

import copy
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
from holdover_world.measure.demo import DemoOptions, affordable, run_demo, steady_skip_ceiling
from holdover_world.model.transformer import WorldModel

SCENARIOS = ("urban", "uturn-steady")
CHUNKS = 12


@pytest.fixture(scope="module")
def out(model: WorldModel, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    options = DemoOptions(scenarios=SCENARIOS, chunks=CHUNKS, every=8)
    with bar() as progress:
        run_demo(model, folder, options, clips=clips, progress=progress)
    return folder


@pytest.fixture(scope="module")
def report(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "report.json").read_text())
    return content


def policy_of(report: dict[str, Any], scenario: str, name: str) -> dict[str, Any]:
    entry = next(entry for entry in report["scenarios"] if entry["name"] == scenario)
    found: dict[str, Any] = next(policy for policy in entry["policies"] if policy["name"] == name)
    return found


def test_the_report_has_the_documented_shape(report: dict[str, Any]) -> None:
    assert [scenario["name"] for scenario in report["scenarios"]] == list(SCENARIOS)
    assert {"torch", "python", "processor", "block_share"} <= report["environment"].keys()
    number = int | float
    for scenario in report["scenarios"]:
        assert scenario["frames"] == CHUNKS * 4
        assert [policy["name"] for policy in scenario["policies"]] == ["full", "xcache", "xcache_reactive"]
        for policy in scenario["policies"]:
            for key in ("skip", "speedup", "speedup_bound", "dit_ms_per_chunk", "end_to_end_ms_per_chunk"):
                assert isinstance(policy[key], number), key
            assert isinstance(policy["bytes_held"], int)
            assert policy["cameras"].keys() == {"front_wide", "rear"}
            for view in (policy["stitched"], *policy["cameras"].values()):
                assert view.keys() == {"psnr_db", "ssim", "lpips"}
            assert {"brake", "steer"} <= policy["reaction"].keys()
            assert all(isinstance(count, int) for count in policy["reasons"].values())


def frames_alone(
    model: WorldModel, clips: Path, policy: holdover.Policy | None
) -> tuple[dict[str, NDArray[np.uint8]], holdover.Stats | None]:
    scenario = load_scenario("urban", model, clips=clips, chunks=CHUNKS)
    own = copy.deepcopy(model)
    cache = holdover.attach(own, policy) if policy else None
    loop = ClosedLoop(own, scenario.start, scenario.start_actions, seed=0, cache=cache)
    pieces = [model.codec.decode(piece.latents, piece.before) for piece in loop.run(scenario.actions)]
    video = {name: np.concatenate([piece[name][0] for piece in pieces]) for name in pieces[0]}
    return video, cache.stats() if cache else None


def test_the_figures_equal_those_of_runs_of_their_own(report: dict[str, Any], model: WorldModel, clips: Path) -> None:
    full, _ = frames_alone(model, clips, None)
    cached, stats = frames_alone(model, clips, holdover.xcache())
    figures = policy_of(report, "urban", "xcache")
    assert stats is not None
    assert figures["skip"] == stats.skip > 0
    assert figures["reasons"] == dict(stats.reasons)
    assert figures["bytes_held"] == stats.bytes_held > 0
    squares, pixels = 0.0, 0
    for name, frames in cached.items():
        error = (frames.astype(float) - full[name]) ** 2
        assert figures["cameras"][name]["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error.mean()))
        squares, pixels = squares + error.sum(), pixels + error.size
    assert figures["stitched"]["psnr_db"] == pytest.approx(10 * np.log10(255**2 * pixels / squares))
    share = report["environment"]["block_share"]
    assert figures["speedup_bound"] == pytest.approx(1 / (1 - share * stats.skip))
    assert figures["share_of_bound"] == pytest.approx(figures["speedup"] / figures["speedup_bound"])
    scenario = load_scenario("urban", model, clips=clips, chunks=CHUNKS)
    assert scenario.truth is not None
    error = [((full[name].astype(float) - scenario.truth[name]) ** 2).ravel() for name in full]
    truth = policy_of(report, "urban", "full")["truth"]
    assert truth["psnr_db"] == pytest.approx(10 * np.log10(255**2 / np.concatenate(error).mean()))
    assert policy_of(report, "uturn-steady", "full")["truth"] is None


def test_curves_add_up_to_the_skip(report: dict[str, Any]) -> None:
    for scenario in SCENARIOS:
        for name in ("xcache", "xcache_reactive"):
            figures = policy_of(report, scenario, name)
            assert np.mean(figures["skip_by_block"]) == pytest.approx(figures["skip"])
            assert figures["skip_by_block"][0] == 0  # the anchor
            assert np.shape(figures["cosine_by_step_and_block"]) == (4, 4)
            assert [row[0] for row in figures["cosine_by_step_and_block"]] == [None] * 4


def test_the_page_shows_every_scenario_and_its_files_exist(out: Path) -> None:
    html = (out / "index.html").read_text()
    for scenario in SCENARIOS:
        assert f'<h2 id="{scenario}">' in html
    named: list[str] = re.findall(r'(?:src|href)="([^"#:]+)"', html)
    assert len([name for name in named if name.endswith("video.mp4")]) >= 6
    assert len({name for name in named if name.endswith(".png")}) == 13
    for name in named:
        assert (out / name).stat().st_size > 0, name
    assert not list(out.rglob(".partial*"))
    assert "51.37" in html  # the published figure beside one's own


def test_the_recorded_run_is_the_driven_one(out: Path, report: dict[str, Any], model: WorldModel, clips: Path) -> None:
    rollouts, problems = read_run(out)
    assert problems == []
    of = {(r.about.scenario, r.about.name): r for r in rollouts}
    cached = of["urban", "xcache"]
    assert cached.decisions is not None
    assert cached.chunks is not None
    assert cached.errors is not None
    figures = policy_of(report, "urban", "xcache")
    assert Counter(d.reason for d in cached.decisions) == figures["reasons"]
    assert cached.chunks[-1].bytes_held == figures["bytes_held"]
    scenario = load_scenario("urban", model, clips=clips, chunks=CHUNKS)
    assert [g.action for g in cached.chunks] == [tuple(action) for action in scenario.actions.tolist()]
    for name, errors in cached.errors.items():
        shown = figures["stitched"] if name == "stitched" else figures["cameras"][name]
        assert 10 * np.log10(255**2 / errors.mean()) == pytest.approx(shown["psnr_db"]), name
    reactive = of["urban", "xcache_reactive"].about
    assert ("urban", reactive.reference) in of
    assert of["urban", "full"].decisions is None
    assert of["urban", "full"].errors is None


@pytest.mark.filterwarnings("ignore:.* could reuse nothing in")
def test_in_the_plain_cadence_there_is_nothing_to_skip(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    options = DemoOptions(scenarios=("urban",), chunks=12, cadence="plain")
    with bar() as progress:
        report = run_demo(model, tmp_path, options, clips=clips, progress=progress)
    cached = policy_of(report, "urban", "xcache")
    assert (cached["skip"], cached["stitched"]["psnr_db"]) == (0, None)
    assert report["settings"]["skip_ceiling"] == 0
    assert cached["reasons"].keys() == {"warm-up", "kv cycle", "kv update"}


def test_by_default_it_drives_what_ten_minutes_allow(
    model: WorldModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A chunk of half a second: 12 steps of 6.3 and two scenarios of 22 are 120 chunks, one minute.
    monkeypatch.setattr(demo, "SECONDS", 60.0)
    assert affordable(0.5, ("urban", "urban-steady"), 4) == 12
    assert affordable(0.51, ("urban", "urban-steady"), 4) == 8
    assert affordable(0.5, ("urban-steady",), 4) == 44
    assert affordable(0.5, ("urban", "urban-steady"), 4, "plain") == 8  # 10 steps of 7.4
    assert affordable(9.0, ("urban",), 4) == 8
    assert affordable(0.01, ("urban",), 4) == 60
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    monkeypatch.setattr(demo, "LONGEST", CHUNKS)
    with bar() as progress, progress.console.capture() as said:
        report = run_demo(model, tmp_path, DemoOptions(scenarios=("urban",)), clips=clips, progress=progress)
    assert "drives 8 chunks per scenario in ten minutes (3 seconds" in " ".join(said.get().split())
    assert (report["settings"]["chunks"], report["scenarios"][0]["frames"]) == (8, 32)
    own = load_scenario("urban", model, clips=clips, chunks=8)
    assert report["scenarios"][0]["actions"] == own.actions.tolist()


def test_the_ceiling_of_the_shipped_cadence(model: WorldModel) -> None:
    assert steady_skip_ceiling(model) == 0.75 * 3 / 4


def test_options_are_checked(model: WorldModel, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'town' is not one of"):
        DemoOptions(scenarios=("town",))
    with pytest.raises(ValueError, match="no scenario"):
        DemoOptions(scenarios=())
    with pytest.raises(ValueError, match="every=0"):
        DemoOptions(every=0)
    with bar() as progress, pytest.raises(ValueError, match="give 8 or more"):
        run_demo(model, tmp_path, DemoOptions(chunks=7), clips=clips, progress=progress)
