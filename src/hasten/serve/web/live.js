// The live view: /stats once a second while it can be seen, six figures, a minute of each as a line.

import * as api from "./api.js";
import { byId, drawn, element } from "./dom.js";

const PERIOD_MS = 1000;
const RETRY_MS = 5000;
const KEPT = 61; // samples: a minute of differences
const WINDOW = 5; // samples a rate is taken over

/** Difference of a counter over the last `span` samples, null with fewer than two. */
function gained(samples, name, span = WINDOW) {
  const now = samples.at(-1);
  const then = samples.at(-Math.min(span + 1, samples.length));
  return samples.length < 2 ? null : now[name] - then[name];
}

function share(part, whole) {
  return part === null || !whole ? null : part / whole;
}

function rate(samples, name) {
  const seconds = gained(samples, "at");
  return seconds > 0 ? gained(samples, name) / seconds : null;
}

const percent = (value) => `${(100 * value).toFixed(value > 0 && value < 0.01 ? 1 : 0)} %`;
const whole = (value) => String(Math.round(value));

// `read` gives the figure of this moment from the samples so far, null for none. `top` is the least full scale.
const FIGURES = [
  {
    id: "ttft",
    name: "Time to first token",
    about: "mean of recent answers",
    read: (s) => share(gained(s, "ttft_s_sum"), gained(s, "ttft_count")),
    write: (value) => (value < 10 ? `${whole(1000 * value)} ms` : `${value.toFixed(1)} s`),
    top: 0.05,
    lasts: true,
  },
  { id: "rate", name: "Tokens a second", about: "all clients", read: (s) => rate(s, "output_tokens"), write: whole, top: 10 },
  { id: "batch", name: "Batch", about: "answers in the last step", read: (s) => (s.at(-1).running ? s.at(-1).batch : 0), write: whole, top: 4 },
  { id: "queue", name: "Queue", about: "answers that wait", read: (s) => s.at(-1).waiting, write: whole, top: 4 },
  {
    id: "hits",
    name: "Cache hits",
    about: "of prompt tokens, last minute",
    read: (s) => share(gained(s, "prefix_hit_tokens", KEPT), gained(s, "prefix_query_tokens", KEPT)),
    write: percent,
    top: 1,
    lasts: true,
  },
  {
    id: "pages",
    name: "KV memory",
    about: "pages in use",
    read: (s) => share(s.at(-1).kv_pages_used - s.at(-1).kv_pages_cached, s.at(-1).kv_pages),
    write: percent,
    top: 1,
  },
];

/** A line of `values` (null: a gap) in `svg`, the newest at its right edge. */
function plot(svg, values, top) {
  const scale = Math.max(top, ...values.map((value) => value ?? 0));
  const runs = [[]];
  values.forEach((value, index) => {
    const x = 100 - (values.length - 1 - index) * (100 / (KEPT - 1));
    if (value === null) runs.push([]);
    else runs.at(-1).push(`${x.toFixed(1)},${(23 - (22 * value) / scale).toFixed(1)}`);
  });
  const lines = runs.filter((run) => run.length > 1);
  svg.replaceChildren(...lines.map((run) => drawn("polyline", { points: run.join(" ") })));
}

export class Live {
  /** `model()` names the model shown. */
  constructor(model) {
    this.model = model;
    this.tiles = FIGURES.map((figure) => this.tile(figure));
    byId("figures").replaceChildren(...this.tiles.map((tile) => tile.node));
    this.clear();
    document.addEventListener("visibilitychange", () => this.wake());
  }

  tile(figure) {
    const value = element("span", { class: "value", id: `figure-${figure.id}`, text: "\u2013" });
    const line = drawn("svg", { viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" });
    const name = element("dt", { text: figure.name }, element("span", { class: "about", text: figure.about }));
    const node = element("div", { class: "figure" }, name, element("dd", {}, value, line));
    return { figure, value, line, node, history: [], last: null };
  }

  /** Forgets what was seen: another model, or a server that started again. */
  clear() {
    this.samples = [];
    for (const tile of this.tiles) {
      tile.history = [];
      tile.last = null;
      tile.value.textContent = "\u2013";
      tile.line.replaceChildren();
    }
  }

  /** Looks again at once; called when the view is opened, the key or the model changes. */
  wake() {
    clearTimeout(this.timer);
    if (document.hidden || byId("panel").hidden) return;
    this.look();
  }

  async look() {
    const turn = (this.turn = {}); // a newer look makes an older one void
    let pause = PERIOD_MS;
    try {
      const found = await api.stats();
      if (turn === this.turn) this.take(found);
    } catch (error) {
      if (turn === this.turn) this.say(`No figures: ${error.message}`);
      pause = RETRY_MS;
    }
    if (turn !== this.turn) return;
    clearTimeout(this.timer);
    if (!document.hidden && !byId("panel").hidden) this.timer = setTimeout(() => this.look(), pause);
  }

  take({ uptime_s, models }) {
    const figures = models[this.model()];
    if (!figures || figures.loaded === false) {
      this.clear();
      this.say("This model is not loaded; the first request loads it.");
      return;
    }
    const last = this.samples.at(-1);
    if (last && (uptime_s < last.uptime_s || figures.requests < last.requests)) this.clear();
    this.samples.push({ ...figures, uptime_s, at: performance.now() / 1000 });
    this.samples.splice(0, this.samples.length - KEPT);
    for (const tile of this.tiles) this.draw(tile);
    this.say(`${this.model()}, up ${duration(uptime_s)}`);
  }

  draw(tile) {
    const { figure, value, line, history } = tile;
    const now = figure.read(this.samples);
    history.push(now);
    history.splice(0, history.length - KEPT);
    if (now !== null) tile.last = now;
    const shown = now ?? (figure.lasts ? tile.last : null);
    value.textContent = shown === null ? "\u2013" : figure.write(shown);
    plot(line, history, figure.top);
  }

  say(text) {
    byId("live-note").textContent = text;
  }
}

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
