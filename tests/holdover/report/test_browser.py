"""The page in a real browser, opened from disk. Skipped where there is none: `make browser` installs it."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3
import numpy as np
import pytest

from holdover.decision import Decision
from holdover.report.decisions import category, ribbon
from holdover.report.page import build_page
from holdover.report.run_read import read_run
from tests.holdover.report import runs

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright; run `make browser`")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; run `make browser`")

LAST = runs.FRAMES - 1
HALF = runs.SIZES["front"][0] // 2
VIEWPORT = {"width": 520, "height": 800}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.write_run(tmp_path_factory.mktemp("run"))
    build_page(folder)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser: Browser, run: Path) -> Iterator[Page]:
    """The page, watched: at the end nothing was wrong on the console, and nothing was fetched from elsewhere."""
    page = browser.new_page(viewport=VIEWPORT)
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((run / "index.html").as_uri())
    yield page
    assert complaints == []
    assert any(url.endswith("video.mp4") for url in asked)
    outside = [url for url in asked if not url.startswith((run.as_uri() + "/", "data:"))]
    assert outside == []


@pytest.fixture
def player(page: Page) -> Locator:
    """The first scenario's player at frame 0, as a curtain, with the keyboard on its picture."""
    player = page.locator(".player").first
    player.scroll_into_view_if_needed()
    page.wait_for_selector(".player[data-frame]")
    player.evaluate("root => { root.player.stop(); root.player.choose('curtain'); root.player.seam(50) }")
    player.evaluate("root => root.player.pick('right', 'xcache')")
    player.locator(".view").select_option("front")
    show(player, 0)
    player.locator(".stage").focus()
    return player


def wait(player: Locator, frame: int) -> None:
    player.page.wait_for_selector(f'.player[data-frame="{frame}"]')


def show(player: Locator, frame: int) -> None:
    player.evaluate("(root, frame) => { root.player.go(frame) }", frame)
    wait(player, frame)


def picture(player: Locator, camera: str = "front") -> np.ndarray[Any, Any]:
    """What the stage shows of a camera that it shows alone, one value for each of the camera's pixels."""
    shot = imageio.v3.imread(io.BytesIO(player.locator(".stage").screenshot()))[..., :3].mean(-1)
    width, height = runs.SIZES[camera]
    rows = ((np.arange(height) + 0.5) * shot.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * shot.shape[1] / width).astype(int)
    return np.asarray(shot[rows][:, columns])


def number(shot: np.ndarray[Any, Any], left: int) -> int:
    """The number burnt in from a column on."""
    middle = [left + 4 + bit * runs.BIT + runs.BIT // 2 for bit in range(runs.BITS)]
    return sum(int(shot[runs.TOP + runs.BIT, x] > 128) << bit for bit, x in enumerate(middle))


def ground(shot: np.ndarray[Any, Any], x: int) -> str:
    """The rollout that is shown in a column."""
    return min(runs.GROUND, key=lambda name: abs(runs.GROUND[name] - shot[-3, x]))


def test_both_sides_show_the_same_frame_at_random_seeks(player: Locator) -> None:
    source = random.Random(0)
    for _ in range(50):
        frame = source.randrange(runs.FRAMES)
        show(player, frame)
        shot = picture(player)
        assert (number(shot, 0), number(shot, HALF)) == (frame, frame)
        assert (ground(shot, 2), ground(shot, -3)) == ("full", "xcache")


def test_a_browser_without_frame_callbacks_stays_in_step(browser: Browser, run: Path) -> None:
    page = browser.new_page(viewport=VIEWPORT)
    page.set_default_timeout(60_000)
    page.add_init_script("delete HTMLVideoElement.prototype.requestVideoFrameCallback")
    page.goto((run / "index.html").as_uri())
    player = page.locator(".player").first
    player.scroll_into_view_if_needed()
    page.wait_for_selector(".player[data-frame]")
    player.locator(".view").select_option("front")
    for frame in (95, 13, 14, 60, 1):
        show(player, frame)
        shown = None
        for _ in range(100):  # without callbacks nothing tells when what was sought has been painted
            shot = picture(player)
            shown = number(shot, 0), number(shot, HALF)
            if shown == (frame, frame):
                break
            page.wait_for_timeout(100)
        assert shown == (frame, frame)
    page.close()


def test_the_seam_follows_the_pointer_and_its_slider(player: Locator, page: Page) -> None:
    box = player.locator(".stage").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 20)
    page.mouse.up()
    page.mouse.move(box["x"] + 5, box["y"] + 20)  # released: it stays where it was
    assert float(player.locator(".seam-at").input_value()) == pytest.approx(80, abs=1)
    shot = picture(player)
    assert [ground(shot, int(0.01 * percent * 2 * HALF)) for percent in (4, 60, 77, 83, 97)] == ["full"] * 3 + [
        "xcache"
    ] * 2
    player.locator(".seam-at").focus()
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    shot = picture(player)
    assert [ground(shot, int(0.01 * percent * 2 * HALF)) for percent in (4, 17, 23, 97)] == ["full"] * 2 + [
        "xcache"
    ] * 2
    assert player.get_attribute("data-frame") == "0"


def test_keys_step_frames_and_chunks_and_play(player: Locator, page: Page) -> None:
    for key, frame in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("Shift+ArrowRight", 4),
        ("Shift+ArrowRight", 8),
        ("Shift+ArrowLeft", 4),
        ("End", LAST),
        ("ArrowRight", LAST),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        page.keyboard.press(key)
        wait(player, frame)
    assert player.locator(".play").inner_text() == "Play"
    page.keyboard.press("Space")
    assert player.locator(".play").inner_text() == "Pause"
    page.wait_for_function("root => root.dataset.frame > 2", arg=player.element_handle())
    page.keyboard.press("Space")
    assert player.locator(".play").inner_text() == "Play"
    page.wait_for_function("root => !root.player.busy", arg=player.element_handle())
    frame = int(player.get_attribute("data-frame") or 0)
    shot = picture(player)
    assert (number(shot, 0), number(shot, HALF)) == (frame, frame)


def test_the_timeline_scrubs(player: Locator, page: Page) -> None:
    slider = player.locator(".time")
    slider.fill("61")
    wait(player, 61)
    assert slider.get_attribute("aria-valuetext") == f"frame 61 of {LAST}, chunk 15"
    assert "61 of 95 · 5.08 s" in player.locator(".clock").inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")
    wait(player, 62)
    page.keyboard.press("Shift+ArrowLeft")
    wait(player, 56)


def test_modes_and_views(player: Locator, page: Page) -> None:
    show(player, 37)
    page.keyboard.press("h")
    page.wait_for_function(
        "root => root.querySelector('.heat').width > 0 && !root.player.busy", arg=player.element_handle()
    )
    shot = picture(player)
    # The grounds differ by 40 of 255, past the end of the scale; black squares and white ones are equal in both.
    assert shot[-3, 2] > 200
    assert shot[runs.TOP + runs.BIT, [4 + runs.BIT // 2, 4 + runs.BIT + runs.BIT // 2]] == pytest.approx([1, 1], abs=8)
    assert "32 of 255" in player.locator(".scale").inner_text()
    page.keyboard.press("b")
    seen = set()
    for blinked in ("true", "false"):
        page.wait_for_function(f"root => root.classList.contains('blinked') === {blinked}", arg=player.element_handle())
        player.evaluate("root => clearInterval(root.player.blinking)")
        shot = picture(player)
        assert (number(shot, 0), number(shot, HALF)) == (37, 37)
        seen.add((ground(shot, 2), ground(shot, -3)))
        player.evaluate("root => root.classList.toggle('blinked')")
    assert seen == {("full", "full"), ("xcache", "xcache")}
    page.keyboard.press("c")
    player.locator(".right").select_option("other")
    page.wait_for_function("root => !root.player.busy", arg=player.element_handle())
    assert ground(picture(player), -3) == "other"
    player.locator(".left").select_option("xcache")
    player.locator(".view").select_option("rear")
    page.wait_for_function("root => !root.player.busy", arg=player.element_handle())
    shot = picture(player, "rear")
    assert (ground(shot, 2), ground(shot, -3)) == ("xcache", "other")
    player.locator(".view").select_option("")
    assert player.locator(".over").evaluate("c => [c.width, c.height]") == [224, 64]


def test_the_ribbon_is_the_trace(player: Locator, run: Path) -> None:
    rollout = next(r for r in read_run(run)[0] if (r.about.scenario, r.about.name) == ("first", "xcache"))
    assert rollout.decisions is not None
    laid = ribbon(rollout.decisions)
    for chunk in (0, 3, 4, 9, 23):
        show(player, 4 * chunk + 1)
        cells = player.locator(".ribbon td").evaluate_all(
            "all => all.map(c => [c.parentElement.rowIndex, c.cellIndex, c.dataset.reason, c.textContent, c.title])"
        )
        assert len(cells) == 5 * 6
        for row, column, reason, letter, title in cells:
            decision: Decision | None = laid.cells[chunk].get((row - 1, column - 1))
            assert reason == (decision.reason if decision else "")
            letters = {"computed": "C", "reused": "·", "anchor": "A", "protected": "K", "warm-up": "W"}
            assert letter == (letters[category(decision)] if decision else "")
            if decision and decision.scores:
                for name, value in decision.scores.items():
                    assert f"{name} {value:.6g}" in title
        action = f"action 0.500, {chunk / 100:.3f}"
        assert action in player.locator(".now").inner_text()


def test_a_cell_tells_its_scores_on_hover_and_on_the_keyboard(player: Locator, page: Page) -> None:
    show(player, 5)
    decision = next(d for d in runs.decisions(1) if (d.chunk, d.index, d.block) == (1, 1, 3))
    cell = player.locator(".ribbon tbody tr").nth(1).locator("td").nth(3)
    cell.hover()
    told = player.locator(".cell-text")
    assert told.inner_text().startswith("step 1, block 3: ")
    assert f"cosine {decision.scores['cosine']:.6g}" in told.inner_text()
    assert "threshold 0.95" in told.inner_text()
    page.mouse.move(0, 0)
    player.locator(".ribbon td").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert told.inner_text().startswith("step 1, block 2: ")
    assert player.get_attribute("data-frame") == "5"


def test_no_serious_accessibility_issue_in_light_and_dark(player: Locator, page: Page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe; run `make browser`").Axe()
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true })")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = axe.run(page).response["violations"]
        serious = [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == [], scheme
    page.emulate_media(color_scheme="light")


def test_a_narrow_window_does_not_scroll_sideways(player: Locator, page: Page) -> None:
    page.set_viewport_size({"width": 340, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 340
    page.set_viewport_size(VIEWPORT)


def test_without_javascript_tables_and_videos_are_shown(browser: Browser, run: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((run / "index.html").as_uri())
    assert page.locator("video:visible").count() == 5
    assert page.locator("table:visible").count() >= 2
    assert page.locator(".plots img:visible").count() == 13
    context.close()


def test_a_damaged_video_leaves_the_rest(browser: Browser, run: Path, tmp_path: Path) -> None:
    for name in ("full", "xcache", "other"):
        shutil.copytree(run / "first" / name, tmp_path / "first" / name)
    (tmp_path / "first" / "xcache" / "video.mp4").write_bytes(b"")
    build_page(tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "index.html").as_uri())
    assert "first/xcache/video.mp4 is damaged" in page.locator(".problems").inner_text()
    page.locator(".player").scroll_into_view_if_needed()
    page.wait_for_selector('.player[data-frame="0"]', timeout=60_000)
    assert page.locator(".right option").all_inner_texts() == ["full", "other"]
    page.close()


def test_a_video_that_cannot_be_played_is_named(browser: Browser, run: Path, tmp_path: Path) -> None:
    for name in ("full", "xcache", "other"):
        shutil.copytree(run / "first" / name, tmp_path / "first" / name)
    build_page(tmp_path)
    (tmp_path / "first" / "xcache" / "video.mp4").write_bytes(b"no video")
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto((tmp_path / "index.html").as_uri())
    player = page.locator(".player")
    player.scroll_into_view_if_needed()
    player.locator(".fault").wait_for()
    assert player.locator(".fault").inner_text() == "first/xcache/video.mp4 cannot be played by this browser"
    player.locator(".right").select_option("other")
    wait(player, 0)
    assert player.locator(".fault").is_hidden()
    page.close()
