"""The page in a real browser, driven with the keyboard. Skipped where there is none: `make browser` installs it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from holdover.serve.world import Start, World
from holdover.world.cameras import RIG, STITCH_ROWS
from holdover.world.config import WorldConfig
from holdover.world.transformer import WorldModel
from tests.serve.live import Live, running
from tests.serve.small import POLICIES
from tests.world.small import latents

if TYPE_CHECKING:
    from playwright.sync_api import Page

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright; run `make browser`")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; run `make browser`")


def seven_cameras() -> World:
    torch.manual_seed(0)
    model = WorldModel(
        WorldConfig(channels=32, depth=4, heads=2, window=2, context=2, frames_per_latent=2, cameras=RIG)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    start = Start(latents=latents(model, 2), actions=torch.zeros(1, 2, 2))
    return World(model.eval().requires_grad_(False), {"town": start, "coast": start}, policies=POLICIES)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("page"), world=seven_cameras()) as server:
        yield server


@pytest.fixture(scope="module")
def page(live: Live) -> Iterator[Page]:
    """The page, watched: at the end nothing was wrong on the console, and nothing was fetched from elsewhere."""
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if live.address not in request.url else None)
        page.goto(f"http://{live.address}/")
        yield page
        browser.close()
        assert [text for text in complaints if not text.startswith(("blob:", "data:"))] == []


def number(page: Page, id: str) -> float:
    return float(page.inner_text(f"#{id}").split()[0].rstrip("°") or "nan")


def wait_past(page: Page, generation: int) -> None:
    page.wait_for_function("n => Number(document.getElementById('generation').textContent) > n", arg=generation)


def test_driving_with_the_keyboard(page: Page, live: Live) -> None:
    page.wait_for_selector("#scenario option", state="attached")
    assert page.eval_on_selector_all("#policy option", "all => all.map(o => o.value)") == list(POLICIES)
    page.select_option("#scenario", "coast")
    page.click("#start")
    wait_past(page, 1)
    (seat,) = live.hub.keeper.seats.values()
    assert (seat.scenario, seat.mode) == ("coast", "realtime")
    rows = page.eval_on_selector_all(
        "#rig .row", "rows => rows.map(row => [...row.children].map(c => c.dataset.camera))"
    )
    assert [tuple(row) for row in rows] == list(STITCH_ROWS)  # seven cameras as one rig
    lit = "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].some((v, i) => v && i % 4 < 3)"
    page.wait_for_function(f"() => [...document.querySelectorAll('#rig canvas')].every({lit})")
    assert page.eval_on_selector("#ribbon", lit)
    assert "ms" in page.inner_text("#latency")
    # Faster, and to the left: what is shown is what the server was told.
    speed, told = number(page, "speed"), list(seat.action)
    page.keyboard.down("ArrowUp")
    page.keyboard.down("ArrowLeft")
    page.wait_for_function("v => parseFloat(document.getElementById('speed').textContent) > v + 5", arg=speed)
    page.keyboard.up("ArrowUp")
    assert number(page, "steering") > 0
    page.keyboard.up("ArrowLeft")
    assert seat.action[0] > told[0]
    page.keyboard.press("Space")
    page.keyboard.down("Space")
    page.wait_for_function("() => parseFloat(document.getElementById('speed').textContent) === 0")
    page.keyboard.up("Space")
    page.wait_for_timeout(500)
    assert seat.action[0] == 0


def test_everyone_can_use_it(page: Page) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe; run `make browser`").Axe()
    found = axe.run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["target"]) for v in found if v["impact"] in ("serious", "critical")] == []


def test_the_policy_is_switched_live_and_a_broken_connection_resumes(page: Page, live: Live) -> None:
    (seat,) = live.hub.keeper.seats.values()
    page.select_option("#policy", "never")
    page.wait_for_function("() => document.body.dataset.policy === 'never'")
    assert page.inner_text("#skip") == "0 %"
    before = seat.generation
    page.evaluate("() => state.socket.close()")
    page.wait_for_function("() => document.getElementById('state').textContent.startsWith('Connection lost')")
    page.wait_for_function("() => document.getElementById('state').textContent === 'Driving.'")
    wait_past(page, before)
    page.click("#start")  # a new drive ends the old one
    page.wait_for_function("() => state.last >= 0 && state.last < 50")
    assert [other is seat for other in live.hub.keeper.seats.values()] == [False]
