"use strict";
// Drives one session: turns keys into actions and shows the chunks.

const $ = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get("token");
const headers = { "content-type": "application/json", ...(token ? { authorization: `Bearer ${token}` } : {}) };

// The limits of a command and its normalisation, as in holdover_world.scene.vehicles.
const MAX_SPEED = 30, MAX_CURVATURE = 0.2, KNEE = 0.01, WHEELBASE = 2.8;
const ROWS = [["front_wide", "front_narrow"], ["left_rear", "left_front", "right_front", "right_rear"], ["rear"]];

const pressed = new Set();
const state = { socket: null, session: null, seq: 0, last: -1, speed: 8, curvature: 0, players: {}, playing: Promise.resolve() };

const normalise = () => [
  state.speed / MAX_SPEED,
  Math.asinh(state.curvature / KNEE) / Math.asinh(MAX_CURVATURE / KNEE),
];

function say(text) { $("state").textContent = text; }

async function call(method, path, body) {
  const answer = await fetch(path, { method, headers, body: body && JSON.stringify(body) });
  const content = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error(typeof content.detail === "string" ? content.detail : answer.statusText);
  return content;
}

function options(select, names) {
  select.replaceChildren(...names.map((name) => new Option(name, name)));
}

function buildRig({ cameras, video, frames, fps }) {
  const known = ROWS.map((row) => row.filter((name) => name in cameras));
  const others = Object.keys(cameras).filter((name) => !ROWS.flat().includes(name));
  const widest = Math.max(...[...known, others].map((row) => row.reduce((sum, name) => sum + cameras[name][0], 0)));
  $("rig").replaceChildren(...[...known, others].filter((row) => row.length).map((row) => {
    const line = document.createElement("div");
    line.className = "row";
    line.append(...row.map((name) => {
      const view = document.createElement(video[name] ? "video" : "canvas");
      [view.width, view.height] = cameras[name];
      view.dataset.camera = name;
      if (!video[name]) view.setAttribute("role", "img");
      view.setAttribute("aria-label", name.replace("_", " "));
      view.style.width = `${(100 * cameras[name][0]) / widest}%`;
      if (video[name]) state.players[name] = player(view, video[name], frames / fps);
      return view;
    }));
    return line;
  }));
}

/** Play fragments of `seconds` each, close to the newest. Returns a function that takes the next fragment. */
function player(view, { type, init }, seconds) {
  const source = new MediaSource(), waiting = [init];
  let buffer = null;
  const next = () => { if (buffer && !buffer.updating && waiting.length) buffer.appendBuffer(waiting.shift()); };
  source.addEventListener("sourceopen", () => {
    buffer = source.addSourceBuffer(type);
    buffer.addEventListener("updateend", () => {
      const known = view.buffered, end = known.length ? known.end(known.length - 1) : 0;
      // Jump if playback is behind (the tab was paused) or ahead (its clock ran on while fragments were late).
      if (view.currentTime < end - 2 * seconds || view.currentTime > end) view.currentTime = end - seconds;
      next();
    });
    next();
  }, { once: true });
  Object.assign(view, { muted: true, autoplay: true, playsInline: true, src: URL.createObjectURL(source) });
  return (fragment) => { waiting.push(fragment); next(); };
}

/** Show the frames of a chunk at the video's rate, after those of the chunk before. */
async function play(message, period) {
  const type = `image/${message.format}`;
  const pictures = await Promise.all(Object.entries(message.frames).map(async ([camera, frames]) =>
    [camera, await Promise.all(frames.map((frame) => createImageBitmap(new Blob([frame], { type }))))]));
  const count = pictures[0][1].length;
  for (let n = 0; n < count; n += 1) {
    for (const [camera, frames] of pictures) {
      $("rig").querySelector(`[data-camera="${camera}"]`).getContext("2d").drawImage(frames[n], 0, 0);
      frames[n].close();
    }
    if (n < count - 1) await new Promise((done) => setTimeout(done, period / count));
  }
}

function drawRibbon({ reasons, grid }) {
  const canvas = $("ribbon"), context = canvas.getContext("2d");
  const cell = 4, columns = grid.length, blocks = grid[0]?.length ?? 0;
  const height = blocks ? canvas.height / blocks : 0, reuse = reasons.indexOf("reuse");
  context.drawImage(canvas, -columns * cell - 1, 0);
  context.fillStyle = "#000";
  context.fillRect(canvas.width - columns * cell - 1, 0, columns * cell + 1, canvas.height);
  grid.forEach((row, pass) => row.forEach((code, block) => {
    context.fillStyle = code === reuse ? "#3b4a63" : "#ffb454";
    context.fillRect(canvas.width - (columns - pass) * cell, block * height, cell, Math.max(1, height - 1));
  }));
  const cells = grid.flat();
  $("skip").textContent = `${Math.round((100 * cells.filter((code) => code === reuse).length) / Math.max(1, cells.length))} %`;
}

function receive(message, hello) {
  if (message.type === "error") {
    if (message.code !== "stale") say(message.detail);
    return;
  }
  if (message.index <= state.last) return;
  state.last = message.index;
  state.socket.send(msgpack.encode({ type: "ack", chunk: message.index }));
  $("chunk").textContent = String(message.index);
  $("latency").textContent = `${message.latency_ms.toFixed(0)} ms${message.late ? ", late" : ""}`;
  $("model").textContent = `${message.milliseconds.toFixed(0)} ms`;
  document.body.dataset.policy = message.policy;
  drawRibbon(message.decisions);
  if (message.format === "mp4") {
    Object.entries(message.frames).forEach(([camera, [fragment]]) => state.players[camera](fragment));
    return;
  }
  const period = (1000 * hello.frames) / hello.fps;
  state.playing = state.playing.then(() => play(message, period)).catch((error) => say(String(error)));
}

function connect() {
  const resume = state.last >= 0 ? `?after=${state.last}` : "";
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const url = `${scheme}//${location.host}/v1/sessions/${state.session}/stream${resume}`;
  const socket = new WebSocket(url, ["holdover.v1", ...(token ? [`bearer.${token}`] : [])]);
  let hello = null;
  socket.binaryType = "arraybuffer";
  state.socket = socket;
  socket.onmessage = ({ data }) => {
    if (state.socket !== socket) return; // an older connection
    const message = msgpack.decode(data);
    if (message.type !== "hello") { receive(message, hello); return; }
    hello = message;
    state.seq = Math.max(state.seq, message.seq + 1);
    options($("policy"), message.policies);
    $("policy").value = message.policy;
    if (!$("rig").childElementCount) buildRig(message);
    say("Driving.");
    send();
  };
  socket.onclose = ({ code }) => {
    if (state.socket !== socket) return;
    if (code === 4409) { say("Another window has taken over this session."); return; }
    if (code === 4404) { say("The session was deleted."); return; }
    say("Connection lost. Connecting again.");
    setTimeout(() => { if (state.socket === socket) connect(); }, 1000);
  };
}

function send() {
  $("speed").textContent = `${(3.6 * state.speed).toFixed(0)} km/h`;
  $("steering").textContent = `${((180 / Math.PI) * Math.atan(WHEELBASE * state.curvature)).toFixed(1)}°`;
  if (state.socket?.readyState !== WebSocket.OPEN) return;
  const action = normalise().map(msgpack.float);
  state.socket.send(msgpack.encode({ type: "action", seq: state.seq, action }));
  state.seq += 1;
}

const KEYS = {
  ArrowUp: "up", KeyW: "up", ArrowDown: "down", KeyS: "down", ArrowLeft: "left", KeyA: "left", ArrowRight: "right",
  KeyD: "right", Space: "brake",
};

/** Apply the pressed keys to the command; called ten times a second. */
function steer() {
  const before = [state.speed, state.curvature].join();
  if (pressed.has("up")) state.speed = Math.min(MAX_SPEED, state.speed + 0.5);
  if (pressed.has("down")) state.speed = Math.max(0, state.speed - 1);
  if (pressed.has("brake")) state.speed = 0;
  const turn = (pressed.has("left") ? 1 : 0) - (pressed.has("right") ? 1 : 0);
  const most = Math.min(MAX_CURVATURE, 4 / Math.max(state.speed, 4) ** 2);
  state.curvature = turn ? Math.max(-most, Math.min(most, state.curvature + turn * most * 0.25)) : 0.6 * state.curvature;
  if (Math.abs(state.curvature) < 1e-4) state.curvature = 0;
  if ([state.speed, state.curvature].join() !== before) send();
}

addEventListener("keydown", (event) => {
  if (!(event.code in KEYS) || event.target.matches("select, button")) return;
  event.preventDefault();
  pressed.add(KEYS[event.code]);
});
addEventListener("keyup", (event) => pressed.delete(KEYS[event.code]));
addEventListener("blur", () => pressed.clear());

$("policy").addEventListener("change", () => {
  if (state.socket?.readyState === WebSocket.OPEN) {
    state.socket.send(msgpack.encode({ type: "policy", policy: $("policy").value }));
  }
  $("rig").focus();
});

$("controls").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    const old = state.session;
    state.socket?.close();
    Object.assign(state, { session: null, socket: null, last: -1, seq: 0, speed: 8, curvature: 0 });
    if (old) await call("DELETE", `/v1/sessions/${old}`);
    $("rig").replaceChildren();
    const body = {
      scenario: $("scenario").value, policy: $("policy").value, format: $("format").value, mode: "realtime",
      seed: Date.now() % 1e6,
    };
    state.session = (await call("POST", "/v1/sessions", body)).id;
    connect();
    $("rig").focus();
  } catch (error) {
    say(error.message);
  }
});

addEventListener("pagehide", () => {
  if (state.session) fetch(`/v1/sessions/${state.session}`, { method: "DELETE", headers, keepalive: true });
});

call("GET", "/v1/scenarios").then((known) => {
  options($("scenario"), known.scenarios);
  options($("policy"), known.policies);
}).catch((error) => say(error.message));
setInterval(steer, 100);
send();
