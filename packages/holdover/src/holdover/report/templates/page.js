"use strict";
// The comparison players of the page. Frames are never left to two clocks: a frame number is asked of every video, and
// drawn only once each of them says that it shows it.

const DATA = JSON.parse(document.getElementById("page:data").textContent);
const UNCOMPUTED = { 1: "reused", 5: "computed in part", 6: "held: no pass ran" };
const LETTERS = [...document.getElementById("page:player").content.querySelectorAll(".legend .cell")].map((c) => c.textContent.trim());
const MODES = { curtain: "c", "heat map": "h", blink: "b", "side by side": "s" };
const BLINK_MS = 500;

class Film {
  // One video, of which one frame at a time is asked.
  constructor(source, fps) {
    this.fps = fps;
    this.frame = null;
    this.source = source;
    this.video = Object.assign(document.createElement("video"), { muted: true, preload: "auto", playsInline: true, src: source });
  }

  show(frame) {
    if (this.frame === frame) return Promise.resolve();
    const video = this.video;
    return new Promise((resolve, reject) => {
      if (video.error) reject(this.fault());
      video.onerror = () => reject(this.fault());
      const arrived = (shown) => {
        this.frame = shown;
        if (shown === frame) resolve();
        return shown === frame;
      };
      if (video.requestVideoFrameCallback) {
        const look = (_now, meta) => arrived(Math.round(meta.mediaTime * this.fps)) || video.requestVideoFrameCallback(look);
        video.requestVideoFrameCallback(look);
      } else {
        video.onseeked = () => arrived(frame);
      }
      video.currentTime = (frame + 0.5) / this.fps; // the middle of the frame: no rounding leads to its neighbour
    });
  }

  fault() {
    return new Error(`${this.source} cannot be played by this browser`);
  }
}

class Player {
  constructor(root, scenario) {
    this.root = root;
    this.rollouts = scenario.rollouts;
    this.films = new Map();
    this.frame = -1;
    this.chunk = undefined;
    root.append(document.getElementById("page:player").content.cloneNode(true));
    this.find = (selector) => root.querySelector(selector);
    const playable = this.rollouts.filter((r) => r.video);
    this.right = playable.find((r) => r.reference) || playable[playable.length - 1];
    if (!this.right) {
      root.replaceChildren(Object.assign(document.createElement("p"), { textContent: "The videos are missing or damaged." }));
      return;
    }
    this.left = this.referenceOf(this.right);
    this.find(".stage").setAttribute("aria-label", `${scenario.name}: two rollouts at the same frame`);
    this.find(".ribbon .wide").setAttribute("aria-label", `${scenario.name}: decisions of the chunk on display`);
    this.fillControls(playable, scenario.name);
    this.listen();
    this.choose("curtain");
  }

  // What is shown

  referenceOf(rollout) {
    return this.rollouts.find((r) => r.name === rollout.reference && r.video) || this.rollouts.find((r) => r.video);
  }

  get last() {
    return Math.min(this.left.frames, this.right.frames) - 1;
  }

  film(rollout, kind) {
    const source = rollout[kind];
    if (!this.films.has(source)) this.films.set(source, new Film(source, rollout.fps));
    return this.films.get(source);
  }

  shownFilms() {
    if (this.mode === "heat map") return [this.film(this.right, "difference")];
    return [this.film(this.left, "video"), this.film(this.right, "video")];
  }

  // Ask for a frame. While one is on its way only the newest wish is kept.
  async go(frame) {
    this.wish = Math.max(0, Math.min(this.last, frame));
    if (this.busy) return;
    this.busy = true;
    try {
      while (this.stale || this.frame !== this.wish) {
        const [wish, films] = [this.wish, this.shownFilms()];
        this.stale = false;
        await Promise.all(films.map((film) => film.show(wish)));
        if (this.stale) continue;
        this.draw(films, wish);
      }
    } catch (error) {
      this.stop();
      Object.assign(this.find(".fault"), { textContent: error.message, hidden: false });
    } finally {
      this.busy = false;
    }
  }

  refresh() {
    this.stale = true;
    this.go(Math.max(0, this.frame));
  }

  draw(films, frame) {
    const canvases = this.mode === "heat map" ? [".heat"] : [".under", ".over"];
    const owners = this.mode === "heat map" ? [this.right] : [this.left, this.right];
    canvases.forEach((name, i) => {
      const [x, y, width, height] = this.rect(owners[i]);
      const canvas = this.find(name);
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
      canvas.getContext("2d").drawImage(films[i].video, x, y, width, height, 0, 0, width, height);
    });
    this.find(".fault").hidden = true;
    this.frame = frame;
    this.root.dataset.frame = frame;
    this.tell();
  }

  rect(rollout) {
    return rollout.cameras[this.find(".view").value] || [0, 0, ...rollout.size];
  }

  // Controls

  fillControls(playable, name) {
    for (const [side, chosen] of [["left", this.left], ["right", this.right]]) {
      const select = this.find(`.${side}`);
      for (const rollout of playable) select.append(new Option(rollout.name, rollout.name, false, rollout === chosen));
    }
    this.find(".view").append(new Option("all cameras", ""));
    for (const camera of Object.keys(this.right.cameras)) this.find(".view").append(new Option(camera.replaceAll("_", " "), camera));
    for (const mode of Object.keys(MODES)) {
      const radio = Object.assign(document.createElement("input"), { type: "radio", name: `mode ${name}`, value: mode });
      const label = document.createElement("label");
      label.append(radio, ` ${mode}`);
      this.find(".modes").append(label);
    }
  }

  choose(mode) {
    if (mode === "heat map" && !this.right.difference) mode = "curtain";
    this.mode = mode;
    this.root.dataset.mode = mode;
    this.find(`.modes input[value="${mode}"]`).checked = true;
    this.find('.modes input[value="heat map"]').disabled = !this.right.difference;
    this.find(".scale").hidden = mode !== "heat map";
    this.find(".scale .top").textContent = `${Math.round(255 / DATA.gain)} of 255 and more`;
    clearInterval(this.blinking);
    this.root.classList.remove("blinked");
    if (mode === "blink") this.blinking = setInterval(() => this.root.classList.toggle("blinked"), BLINK_MS);
    const [, , width, height] = this.rect(this.right);
    this.find(".stage").style.setProperty("--aspect", width / height);
    this.find(".tag.one").textContent = mode === "heat map" ? `${this.right.name} − ${this.right.reference}` : this.left.name;
    this.find(".tag.two").textContent = this.right.name;
    this.find(".time").max = this.last;
    this.chunk = undefined;
    this.refresh();
  }

  seam(percent) {
    const at = Math.max(0, Math.min(100, percent));
    this.find(".seam-at").value = at;
    this.find(".stage").style.setProperty("--seam", `${at}%`);
  }

  play() {
    if (this.frame >= this.last) this.frame = -1;
    const [start, from] = [performance.now(), Math.max(0, this.frame)];
    this.playing = true;
    this.find(".play").textContent = "Pause";
    const tick = (now) => {
      if (!this.playing) return;
      const due = from + Math.floor(((now - start) / 1000) * this.right.fps);
      this.go(due);
      if (due > this.last) this.stop();
      else requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  stop() {
    this.playing = false;
    this.find(".play").textContent = "Play";
  }

  toggle() {
    if (this.playing) this.stop();
    else this.play();
  }

  step(by) {
    this.stop();
    this.go((this.busy ? this.wish : this.frame) + by);
  }

  stepChunk(by) {
    const list = this.right.chunks;
    const at = this.chunkAt(this.busy ? this.wish : this.frame);
    this.stop();
    if (at === null) return;
    this.go(list[Math.max(0, Math.min(list.length - 1, at + by))].first);
  }

  listen() {
    this.find(".left").onchange = (event) => this.pick("left", event.target.value);
    this.find(".right").onchange = (event) => this.pick("right", event.target.value);
    this.find(".view").onchange = () => this.choose(this.mode);
    this.find(".modes").onchange = (event) => this.choose(event.target.value);
    this.find(".play").onclick = () => this.toggle();
    this.find(".time").oninput = (event) => (this.stop(), this.go(Number(event.target.value)));
    this.find(".seam-at").oninput = (event) => this.seam(Number(event.target.value));
    const stage = this.find(".stage");
    const drag = (event) => {
      const box = stage.getBoundingClientRect();
      this.seam((100 * (event.clientX - box.left)) / box.width);
    };
    stage.onpointerdown = (event) => {
      if (this.mode !== "curtain") return;
      stage.setPointerCapture(event.pointerId);
      drag(event);
    };
    stage.onpointermove = (event) => stage.hasPointerCapture(event.pointerId) && drag(event);
    this.root.onkeydown = (event) => this.key(event);
    const table = this.find(".ribbon table");
    for (const reached of ["pointerover", "focusin"]) {
      table.addEventListener(reached, (event) => this.tellCell(event.target.closest("td")));
    }
  }

  pick(side, name) {
    this[side] = this.rollouts.find((r) => r.name === name);
    if (side === "right") this.left = this.referenceOf(this.right);
    this.find(".left").value = this.left.name;
    this.choose(this.mode);
  }

  key(event) {
    const target = event.target;
    if (event.ctrlKey || event.altKey || event.metaKey || target.matches("select, a, summary, .seam-at, [type=radio]")) return;
    const cell = target.closest("td");
    if (cell && this.moveCell(cell, event.key)) return event.preventDefault();
    const direction = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const mode = Object.keys(MODES).find((name) => MODES[name] === event.key.toLowerCase());
    if (direction) event.shiftKey ? this.stepChunk(direction) : this.step(direction);
    else if (event.key === " " && !target.matches("button")) this.toggle();
    else if (event.key === "Home") this.step(-this.frame);
    else if (event.key === "End") this.step(this.last);
    else if (mode) this.choose(mode);
    else return;
    event.preventDefault();
  }

  // The ribbon

  chunkAt(frame) {
    const at = this.right.chunks.findIndex((g) => frame >= g.first && frame < g.first + g.frames);
    return at < 0 ? null : at;
  }

  tell() {
    const at = this.chunkAt(this.frame);
    const seconds = (this.frame / this.right.fps).toFixed(2);
    this.find(".time").value = this.frame;
    this.find(".time").setAttribute("aria-valuetext", `frame ${this.frame} of ${this.last}, chunk ${at ?? "unknown"}`);
    this.find(".clock").textContent = `${this.frame} of ${this.last} · ${seconds} s`;
    if (at === this.chunk) return;
    this.chunk = at;
    this.tellChunk(at === null ? null : this.right.chunks[at], at);
  }

  tellChunk(chunk, at) {
    const now = [];
    if (chunk) {
      now.push(`chunk ${at}`, `frames ${chunk.first} to ${chunk.first + chunk.frames - 1}`);
      if (chunk.action) now.push(`action ${chunk.action.map((a) => a.toFixed(3)).join(", ")}`);
      if (chunk.skip !== null) now.push(`${(100 * chunk.skip).toFixed(1)} % skipped`);
      now.push(`${Math.round(chunk.ms)} ms`);
    }
    const ribbon = this.right.ribbon;
    if (!ribbon) now.push(this.right.reference ? "its decisions are missing or damaged" : "computed in full: no decisions");
    this.find(".now").textContent = `${this.right.name}: ${now.join(" · ")}`;
    this.find(".cell-text").textContent = "";
    const table = this.find(".ribbon table");
    if (!ribbon || !chunk) return table.replaceChildren();
    if (table.dataset.of !== this.right.name) this.layOut(table, ribbon);
    [...table.querySelectorAll("td")].forEach((cell, i) => {
      const reason = ribbon.reasons[ribbon.cells[at][i]];
      const category = reason ? reason.category : -1;
      cell.className = reason ? `cell c${category}` : "cell";
      cell.textContent = reason ? LETTERS[category] : "";
      const values = ribbon.values[at][i] || [];
      const scores = ribbon.scores.map((name, k) => (values[k] == null ? null : `${name} ${values[k]}`)).filter(Boolean);
      cell.dataset.reason = reason ? reason.reason : "";
      const words = [reason ? UNCOMPUTED[category] || `computed: ${reason.reason}` : "nothing decided", ...scores];
      cell.title = words.join(", ");
      cell.setAttribute("aria-label", `block ${i % ribbon.blocks}, ${cell.title}`);
    });
  }

  layOut(table, ribbon) {
    table.dataset.of = this.right.name;
    const head = table.createTHead();
    head.replaceChildren();
    const blocks = head.insertRow();
    const body = table.tBodies[0] || table.createTBody();
    body.replaceChildren();
    const heading = (row, text, scope) => row.append(Object.assign(document.createElement("th"), { textContent: text, scope }));
    heading(blocks, "block", "col");
    for (let block = 0; block < ribbon.blocks; block++) heading(blocks, block, "col");
    for (const pass of ribbon.passes) {
      const row = body.insertRow();
      heading(row, pass, "row");
      for (let block = 0; block < ribbon.blocks; block++) row.insertCell().tabIndex = -1;
    }
    body.querySelector("td").tabIndex = 0;
  }

  tellCell(cell) {
    if (!cell) return;
    const pass = cell.parentElement.cells[0].textContent;
    this.find(".cell-text").textContent = `${pass}, block ${cell.cellIndex - 1}: ${cell.title}`;
  }

  moveCell(cell, key) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[key];
    if (!by) return false;
    const row = cell.closest("tbody").rows[cell.parentElement.sectionRowIndex + by[0]];
    const next = row && row.cells[cell.cellIndex + by[1]];
    if (next && next.tagName === "TD") {
      [cell.tabIndex, next.tabIndex] = [-1, 0];
      next.focus();
    }
    return true;
  }
}

// A player begins when it comes into sight, so that the page opens at once.
const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      target.player = new Player(target, DATA.scenarios[target.dataset.scenario]);
    }
  },
  { rootMargin: "400px" },
);
document.querySelectorAll(".player").forEach((root) => seen.observe(root));
