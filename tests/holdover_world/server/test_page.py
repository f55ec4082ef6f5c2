"""The page in a real browser, driven with the keyboard. Skipped without one: `make browser` installs it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgpack
import numpy as np
import pytest
import torch

from holdover_world.scene.cameras import RIG, STITCH_ROWS
from holdover_world.sessions.world import Start, World
from tests.holdover_world.server.live import Live, running
from tests.holdover_world.server.test_frames import decoded
from tests.holdover_world.sessions.small import POLICIES
from tests.holdover_world.small import latents, small_config, small_model

if TYPE_CHECKING:
    from playwright.sync_api import Page, WebSocket

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright; run `make browser`")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; run `make browser`")


def seven_cameras() -> World:
    model = small_model(sizes=small_config(cameras=RIG, window=2, context=2))
    for parameter in model.parameters():
        parameter.mul_(0.7)
    start = Start(latents=latents(model, 2), actions=torch.zeros(1, 2, 2))
    return World(model, {"town": start, "coast": start}, policies=POLICIES)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with running(tmp_path_factory.mktemp("page"), world=seven_cameras()) as server:
        yield server


@pytest.fixture(scope="module")
def page(live: Live) -> Iterator[Page]:
    """The page. At the end, its console must be empty, and it must have requested nothing from other hosts."""
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


def wait_past(page: Page, chunk: int) -> None:
    page.wait_for_function("n => Number(document.getElementById('chunk').textContent) > n", arg=chunk)


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
    # Faster and to the left: the page shows the commands that the server received.
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
    before = seat.chunk
    page.evaluate("() => state.socket.close()")
    page.wait_for_function("() => document.getElementById('state').textContent.startsWith('Connection lost')")
    page.wait_for_function("() => document.getElementById('state').textContent === 'Driving.'")
    wait_past(page, before)
    page.click("#start")  # a new drive ends the old one
    page.wait_for_function("() => state.last >= 0 && state.last < 50")
    assert [other is seat for other in live.hub.keeper.seats.values()] == [False]


#: Stops the stream, and gives what the front camera's video shows near its end: the frame's number and its pixels.
LOOK = """async () => {
  const socket = state.socket, video = document.querySelector("[data-camera=front_wide]");
  state.socket = null;
  socket.close();
  video.pause();
  video.currentTime = video.buffered.end(0) - 0.04;
  await new Promise((done) => video.addEventListener("seeked", done, { once: true }));
  const context = new OffscreenCanvas(video.videoWidth, video.videoHeight).getContext("2d");
  context.drawImage(video, 0, 0);
  const { data } = context.getImageData(0, 0, video.videoWidth, video.videoHeight);
  return [Math.floor(video.currentTime * 12), [...data]];
}"""


def test_fragments_play_as_they_come(page: Page) -> None:
    received: list[bytes | str] = []

    def take(message: bytes | str) -> None:
        received.append(message)

    def listen(socket: WebSocket) -> None:
        socket.on("framereceived", take)

    page.on("websocket", listen)
    page.select_option("#format", "mp4")
    page.click("#start")
    playing = """all => all.length === 7 && all.every(video =>
        video.currentTime > 0.2 && video.buffered.length === 1 && video.buffered.end(0) > 0.6 && !video.error)"""
    page.wait_for_function(f"() => ({playing})([...document.querySelectorAll('#rig video')])")
    number, pixels = page.evaluate(LOOK)
    hello, *made = (msgpack.unpackb(message) for message in received)
    fragments = [each["frames"]["front_wide"][0] for each in made if each["type"] == "chunk"]
    numbers, frames = decoded(hello["video"]["front_wide"]["init"], fragments)
    assert 6 < number < len(numbers)
    shown = np.array(pixels).reshape(*frames.shape[1:3], 4)[..., :3]
    distances = np.abs(frames.astype(int) - shown).mean((1, 2, 3))  # decoders round colours differently
    assert distances[number] < 6
    assert distances.argmin() == number


def test_the_page_speaks_msgpack(page: Page) -> None:
    sizes = (0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536)
    said = {
        "whole": [0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**53 - 1, -1, -32],
        "others": [0.0, -1.5, math.pi, 1e300, None, True, False],
        "text": ["x" * size for size in sizes[:-1]] + ["Grüße, 世界"],
        "lists": [[1] * size for size in sizes[:6]],
        "maps": [{str(n): n for n in range(size)} for size in sizes[:6]],
    }
    decode = "bytes => msgpack.decode(new Uint8Array(bytes).buffer)"
    heard = page.evaluate(f"bytes => JSON.stringify(({decode})(bytes))", list(msgpack.packb(said)))
    assert json.loads(heard) == said
    binary = [bytes(n % 251 for n in range(size)) for size in sizes]
    heard = page.evaluate(f"bytes => ({decode})(bytes).map((each) => [...each])", list(msgpack.packb(binary)))
    assert [bytes(each) for each in heard] == binary
    told = page.evaluate("() => [...msgpack.encode({ seq: 2 ** 32 - 1, action: [1, -0.25].map(msgpack.float) })]")
    assert msgpack.unpackb(bytes(told)) == {"seq": 2**32 - 1, "action": [1.0, -0.25]}
