"""The bench of all methods: what it runs, what it counts, and on a tiny model that its card is complete and right."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

import holdover
from holdover.decision import Decision
from holdover_world.model.transformer import WorldModel
from lab import methods, methods_settings
from lab.methods import beside_controls, count, fronts, run_methods
from lab.methods_card import verdict
from lab.methods_settings import LEFT_OUT, Setting, by_cadence, settings
from lab.plots import unbeaten
from tests.lab.small import cut_off_before_the_card


@pytest.mark.parametrize("steps", [4, 35])
def test_every_method_of_the_registry_is_run_or_left_out_for_a_reason(steps: int) -> None:
    chosen, left_out = settings(steps)
    run = {setting.method for setting in chosen}
    assert run | left_out.keys() == set(holdover.policies())
    assert not run & left_out.keys()
    assert len({setting.name for setting in chosen}) == len(chosen)
    calibration = {"teacache": {"polynomial": (1.0, 0.0)}, "magcache": {"ratios": (1.0,) * steps}}
    for cadence, some in by_cadence(steps).items():
        for setting in some:
            assert setting.policy(cadence, calibration).name == setting.method
    ran = [setting for some in by_cadence(steps).values() for setting in some]
    assert {setting.name for setting in ran} == {setting.name for setting in chosen}


def test_there_are_settings_for_few_steps_and_for_many() -> None:
    with pytest.raises(ValueError, match="steps=8: give 4"):
        settings(8)


def _decision(chunk: int, index: int, block: int, computed: bool, role: Any = "denoise") -> Decision:
    return Decision(
        stream="default",
        branch="",
        chunk=chunk,
        index=index,
        slot="",
        block=block,
        role=role,
        computed=computed,
        reason="reuse",
        scores={},
        sigma=None,
    )


def test_full_counts_by_hand() -> None:
    """Chunk 0 is warm-up. Of 2 chunks of 2 passes of 2 blocks, 3 calls are reused, in 2 of the 4 passes."""
    computed = {(1, 0): (True, True), (1, 1): (True, False), (2, 0): (True, True), (2, 1): (False, False)}
    decisions = [_decision(0, 0, 0, False)]
    decisions += [_decision(*at, block, done) for at, blocks in computed.items() for block, done in enumerate(blocks)]
    decisions += [_decision(2, 0, 0, True, role="kv_update")]
    assert count(decisions, first=1, chunks=2) == (1.0, 3 / 8)


def test_the_control_has_as_many_full_passes_along_the_same_axis() -> None:
    def row(method: str, over: str, full: float, psnr: float | None, every: int | None = None) -> dict[str, Any]:
        return {
            "name": f"{method} {over} {full}",
            "method": method,
            "over": over,
            "every": every,
            "skip": 1 - full / 35,
            "speedup": 35 / full,
            "full_per_chunk": full,
            "psnr_db": psnr,
        }

    rows = [
        row("fixed_interval", "steps", 9.0, 30.0, 4),
        row("fixed_interval", "steps", 12.0, 33.0, 3),
        row("fixed_interval", "chunks", 10.0, 50.0, 2),
        row("teacache", "steps", 10.0, 31.5),
        row("fbcache", "steps", 12.0, 31.5),
        row("easycache", "steps", 35.0, None),
        row("pab", "steps", 11.0, None),
        row("xcache", "chunks", 9.0, 49.0),
        row("never", "steps", 35.0, None),
    ]
    beside_controls(rows)
    beside = {row["method"]: row["control"] for row in rows}
    third = {"every": [3, 4], "psnr_db": 31.0, "skip": 1 - 10 / 35, "speedup": (2 * 35 / 9 + 35 / 12) / 3}
    assert beside["teacache"]["every"] == [3, 4]
    assert {k: beside["teacache"][k] for k in ("psnr_db", "skip", "speedup", "gain_db")} == pytest.approx(
        {k: third[k] for k in ("psnr_db", "skip", "speedup")} | {"gain_db": 0.5}
    )
    assert (beside["fbcache"]["every"], beside["fbcache"]["gain_db"]) == ([3], -1.5)
    assert (beside["pab"]["psnr_db"], beside["pab"]["gain_db"]) == (pytest.approx(32.0), None)
    assert beside["easycache"] is None  # computes more than any interval
    assert beside["xcache"] is None  # computes less
    assert beside["never"] is beside["fixed_interval"] is None


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 40.0), (2.0, 42.0), (2.0, 30.0), (3.0, 35.0), (2.5, 35.0), (4.0, 10.0)]
    assert unbeaten(points) == [(2.0, 42.0), (3.0, 35.0), (4.0, 10.0)]
    rows = [{"method": "a", "speedup": speed, "psnr_db": psnr} for speed, psnr in ((3.0, 30.0), (2.0, 40.0), (1, None))]
    control = {"method": "fixed_interval", "over": "steps", "speedup": 2.0, "psnr_db": 20.0}
    assert fronts([*rows, control]) == {"a": [(2.0, 40.0), (3.0, 30.0)], "every N steps": [(2.0, 20.0)]}


@pytest.mark.parametrize("steps", [4, 12])
def test_the_bench_is_complete_and_right(
    model: WorldModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """FULL counts follow from the schedules; what a method's control is, it equals where the two are the same."""
    control = {"over": "steps", "span": "all", "front_anchors": 0, "warmup": 0}
    chosen = [
        Setting(method="never"),
        Setting(method="fixed_interval", options={"every": 2, **control}),
        Setting(method="fixed_interval", options={"every": 4, **control}),
        Setting(method="fixed_interval", options={"every": 4, "over": "chunks"}),
        Setting(method="xcache"),
        Setting(method="teacache", options={"threshold": 1e-9}, calibrated=True),
        Setting(method="magcache", options={"threshold": 1e9, "retain": 1}, calibrated=True),
        Setting(method="flowcache", options={"threshold": 1e9}),
        Setting(method="pab", options={}),
        Setting(method="worldcache_htc", options={"retain": 1}),
    ]
    monkeypatch.setattr(methods_settings, "FEW_STEPS" if steps == 4 else "MANY_STEPS", chosen)
    monkeypatch.setattr(methods, "HEAT", 6)
    with Progress(disable=True) as progress:
        run = partial(run_methods, model, tmp_path, steps=steps, chunks=8, clips=clips, progress=progress)
        figures = cut_off_before_the_card(methods, run, monkeypatch)
        with pytest.raises(ValueError, match="chunks=4 has no cycle"):
            run_methods(model, tmp_path, steps=steps, chunks=4, clips=clips, progress=progress)
    assert json.loads((tmp_path / f"methods-{steps}.json").read_text()) == json.loads(json.dumps(figures))
    assert (tmp_path / f"methods-{steps}.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["name"]: row for row in figures["cadences"]["plain"]["rows"]}
    assert rows["never()"]["psnr_db"] is None
    assert rows["never()"]["depth"] == {"abs_rel": 0, "within_1.25": 1}
    assert rows["fixed_interval(every=4, over=steps)"]["depth"]["abs_rel"] > 0
    assert rows["never()"]["full_per_chunk"] == steps
    assert rows["fixed_interval(every=2, over=steps)"]["full_per_chunk"] == steps / 2
    assert rows["fixed_interval(every=4, over=steps)"]["full_per_chunk"] == steps / 4
    assert rows["flowcache(threshold=1000000000.0)"]["full_per_chunk"] == 1  # the first step
    assert rows["flowcache(threshold=1000000000.0)"]["skip"] == 1 - 1 / steps
    magcache = rows["magcache(threshold=1000000000.0, retain=1, calibrated)"]
    assert magcache["full_per_chunk"] == steps / 4  # at most three skips in a row
    assert magcache["control"]["every"] == [4]
    assert magcache["control"]["gain_db"] == 0
    assert rows["pab()"]["speedup_bound"] is None
    window = {row["name"]: row for row in figures["cadences"]["window"]["rows"]}
    control_row = window["fixed_interval(every=4, over=chunks)"]
    assert control_row["full_per_chunk"] == steps / 4  # one chunk of four, in the others the anchor alone
    assert control_row["skip"] == 3 / 4 * 3 / 4
    shares = figures["cadences"]["plain"]["block_shares"]
    assert 0 < shares["block"] < shares["model"] < 1
    bound = rows["flowcache(threshold=1000000000.0)"]["speedup_bound"]
    assert bound == pytest.approx(1 / (1 - shares["block"] * (1 - 1 / steps)))
    assert len(figures["calibration"]["plain"]["magcache"]["ratios"]) == steps
    assert magcache["control"]["skip"] == magcache["skip"]
    text = (tmp_path / f"methods-{steps}.md").read_text()
    assert all(f"| `{name}` |" in text for name in rows)
    assert f"- equal within 0.01 dB: `{magcache['name']}`" in text
    assert all(f"- `{name}` {reason}." in text for name, reason in LEFT_OUT.items())
    assert np.isfinite([row["speedup"] for row in rows.values()]).all()


def test_a_gain_counts_by_what_is_skipped() -> None:
    """Against a control that skips half: better, better with less skipped, equal, worse."""

    def row(name: str, gain: float | None, skip: float) -> dict[str, Any]:
        return {"name": name, "skip": skip, "control": {"gain_db": gain, "skip": 0.5}}

    rows = [row("a", 1.0, 0.5), row("b", 1.0, 0.3), row("c", 0.001, 0.5), row("d", -1.0, 0.9), row("e", None, 0.5)]
    text = verdict([*rows, {"control": None}])
    assert text.splitlines()[2:] == [
        "- better: `a`",
        "- better, but skips less in the other passes: `b`",
        "- equal within 0.01 dB: `c`",
        "- worse: `d`",
    ]
