// Turns on the page. Each is a list item with a heading, its text, its figures and its buttons.

import { byId, element } from "./dom.js";
import { render } from "./markdown.js";

const ANNOUNCED = 600; // characters of an answer that a screen reader gets at once; the rest is there to read

const list = () => byId("turns");
const scroller = () => byId("conversation");

/** Draws a turn and returns its list item. */
export function show(turn) {
  byId("empty").hidden = true;
  const answer = turn.role === "assistant";
  const item = element(
    "li",
    { class: `turn ${turn.role}`, "data-role": turn.role },
    element("h3", { text: answer ? "Answer" : "You" }),
    element("div", { class: "body", dir: "auto" }),
    element("p", { class: "note", hidden: true }),
    element("div", { class: "foot" }, element("span", { class: "figures" }), element("span", { class: "actions" })),
  );
  list().append(item);
  update(item, turn);
  return item;
}

/** Brings an item in step with its turn: cheap where only the end of the text is new. */
export function update(item, turn) {
  const body = item.querySelector(".body");
  if (turn.role === "user") body.textContent = turn.content;
  else {
    if (turn.reasoning) reasoning(item, turn.reasoning);
    render(body, turn.content);
  }
  const note = item.querySelector(".note");
  note.hidden = !turn.note;
  note.textContent = turn.note ?? "";
  item.querySelector(".figures").textContent = turn.stats ? figures(turn.stats) : "";
}

function reasoning(item, text) {
  let shown = item.querySelector(".reasoning");
  if (!shown) {
    shown = element("details", { class: "reasoning" }, element("summary", { text: "Reasoning" }), element("p"));
    item.querySelector(".body").before(shown);
  }
  shown.querySelector("p").textContent = text;
}

/** An answer's figures in words. */
export function figures({ ttft_ms, tokens, tokens_per_s, prompt_tokens, cached_tokens }) {
  const parts = [];
  if (ttft_ms !== null) parts.push(`first token ${Math.round(ttft_ms)} ms`);
  if (tokens_per_s !== null) parts.push(`${tokens_per_s.toFixed(tokens_per_s < 10 ? 1 : 0)} tokens/s`);
  if (tokens !== null) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (prompt_tokens !== null) parts.push(`prompt ${prompt_tokens}, ${cached_tokens ?? 0} cached`);
  return parts.join(" \u00b7 ");
}

/** Gives every turn the buttons that apply to it now; `busy` while an answer is being written. */
export function offer(conversation, busy) {
  const lastUser = conversation.last("user");
  const lastTurn = conversation.turns.length - 1;
  [...list().children].forEach((item, index) => {
    const turn = conversation.turns[index];
    const names = [];
    if (!(busy && index === lastTurn) && turn?.content) names.push("copy");
    if (!busy && index === lastUser) names.push("edit");
    if (!busy && index === lastTurn) names.push(turn?.role === "assistant" ? "regenerate" : "retry");
    setActions(item.querySelector(".actions"), names);
  });
}

const LABELS = {
  copy: ["Copy", "Copy this message"],
  edit: ["Edit", "Edit your last message"],
  regenerate: ["Regenerate", "Regenerate the last answer"],
  retry: ["Try again", "Try again: ask for the answer"],
};

function setActions(place, names) {
  const shown = [...place.children].map((button) => button.dataset.action);
  if (shown.join() === names.join()) return; // the same buttons stay, and with them the focus
  place.replaceChildren(
    ...names.map((name) => {
      const [text, label] = LABELS[name];
      return element("button", { type: "button", class: "small", "data-action": name, "aria-label": label, text });
    }),
  );
}

/** Takes the items from `index` on off the page. */
export function cut(index) {
  for (const item of [...list().children].slice(index)) item.remove();
  byId("empty").hidden = list().children.length > 0;
}

/** Puts the text of an error at the end of the conversation; a screen reader says it at once. */
export function fail(error, retry) {
  const place = byId("failure");
  const hint = [error.hint && `Hint: ${error.hint}`, error.retryAfter !== null && `Try again in ${error.retryAfter} s.`];
  const lines = hint.filter(Boolean).map((text) => element("p", { class: "hint", text }));
  const button = retry && element("button", { type: "button", class: "small", on: { click: retry.action }, text: retry.text });
  place.replaceChildren(element("p", { class: "message", text: error.message }), ...lines, button ?? "");
  place.hidden = false;
}

export function clearFailure() {
  byId("failure").hidden = true;
  byId("failure").replaceChildren();
}

/** Whether the reader is at the end: only then does the page follow a growing answer. */
export function atEnd() {
  const place = scroller();
  return place.scrollHeight - place.scrollTop - place.clientHeight < 48;
}

export function toEnd() {
  scroller().scrollTop = scroller().scrollHeight;
}

/** Keeps a reader at the end there while the window changes, such as for a phone's keyboard. */
export function stayAtEnd(moved) {
  let there = true;
  scroller().addEventListener("scroll", () => {
    there = atEnd();
    moved(there);
  });
  new ResizeObserver(() => there && toEnd()).observe(scroller());
}

/** Says `text` to a screen reader when it is next free. */
export function announce(text) {
  byId("announcer").textContent = "";
  setTimeout(() => (byId("announcer").textContent = text), 50); // so that the same words are said twice
}

/** Says a finished answer: its words without the marks and buttons around them. */
export function announceAnswer(item, note = "") {
  const blocks = [...item.querySelector(".body").children];
  const words = blocks.map((block) => (block.querySelector("pre") ?? block).innerText).join("\n");
  const short = words.length <= ANNOUNCED ? words : `${words.slice(0, ANNOUNCED)}\u2026 The answer goes on.`;
  announce(`Answer: ${short || "no text."} ${note}`);
}
