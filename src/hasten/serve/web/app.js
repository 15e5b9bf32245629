// Wiring: what a click or a key does. State is the conversation, and the answer being written if there is one.

import * as api from "./api.js";
import { Conversation } from "./conversation.js";
import { byId, element, keep, recall } from "./dom.js";
import { Live } from "./live.js";
import * as settings from "./settings.js";
import { setUpTools } from "./tools.js";
import * as view from "./view.js";

let conversation = new Conversation();
let writing = null; // AbortController of the answer being written
const live = new Live(() => byId("model").value);

async function answer() {
  const turn = conversation.add({ role: "assistant", content: "", stats: null });
  const item = view.show(turn);
  begin(item);
  const body = {
    model: byId("model").value,
    messages: conversation.messages(settings.systemPrompt()),
    ...settings.requestFields(),
  };
  try {
    await write(turn, item, body);
    view.announceAnswer(item, turn.note);
  } catch (error) {
    ended(turn, error);
  }
  finish(turn, item);
}

/** Reads the stream into the turn; the page is drawn at most once a frame. */
async function write(turn, item, body) {
  const started = performance.now();
  const seen = { first: null, last: null, pieces: 0, usage: null };
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follow = view.atEnd();
    view.update(item, turn);
    if (follow) view.toEnd();
    byId("to-end").hidden = view.atEnd();
  };
  try {
    for await (const event of api.chat(body, writing.signal)) {
      const choice = event.choices?.[0];
      const text = choice?.delta?.content ?? "";
      const thought = choice?.delta?.reasoning_content ?? "";
      if (text || thought) {
        seen.first ??= performance.now();
        seen.last = performance.now();
        seen.pieces += 1;
        turn.content += text;
        if (thought) turn.reasoning = (turn.reasoning ?? "") + thought;
        frame ||= requestAnimationFrame(draw);
      }
      if (choice?.finish_reason) turn.note = whyEnded(choice.finish_reason);
      seen.usage = event.usage ?? seen.usage;
    }
  } finally {
    cancelAnimationFrame(frame);
    turn.stats = measured(started, seen);
    draw();
  }
}

/** An answer's figures as this browser saw them; tokens as the server counted them, null where it did not say. */
function measured(started, { first, last, pieces, usage }) {
  const tokens = usage?.completion_tokens ?? null;
  const counted = tokens ?? pieces;
  return {
    ttft_ms: first === null ? null : first - started,
    tokens,
    tokens_per_s: counted > 1 && last > first ? (1000 * (counted - 1)) / (last - first) : null,
    prompt_tokens: usage?.prompt_tokens ?? null,
    cached_tokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
  };
}

function whyEnded(reason) {
  const reasons = {
    stop: undefined,
    length: "Stopped at the most new tokens that were asked for, or at the end of the model's context.",
    content_filter: "Withheld by a filter.",
  };
  return reason in reasons ? reasons[reason] : `Ended: ${reason}.`;
}

function ended(turn, error) {
  if (error.name === "AbortError") {
    turn.note = turn.content ? "Stopped." : "Stopped before the first word.";
    view.announce("Stopped.");
    return;
  }
  const needsKey = error.status === 401 || error.status === 403;
  view.fail(error, needsKey ? { text: "Enter the API key", action: () => tools.openPanel("key") } : null);
  if (turn.content) turn.note = "Not whole: the answer ended with an error.";
  if (!(error instanceof api.ServerError)) console.error(error);
}

function begin(item) {
  writing = new AbortController();
  view.clearFailure();
  item.setAttribute("aria-busy", "true");
  view.announce("Writing the answer.");
  byId("stop").hidden = false;
  byId("send").hidden = true;
  view.offer(conversation, true);
  view.toEnd();
}

function finish(turn, item) {
  writing = null;
  item.removeAttribute("aria-busy");
  view.update(item, turn);
  if (turn.content === "" && !turn.note && !byId("failure").hidden) {
    const index = conversation.turns.indexOf(turn);
    conversation.cut(index);
    view.cut(index);
  }
  conversation.save();
  const focused = document.activeElement === byId("stop");
  byId("stop").hidden = true;
  byId("send").hidden = false;
  if (focused) byId("prompt").focus();
  view.offer(conversation, false);
  if (!byId("failure").hidden) view.toEnd();
  live.wake();
}

// Sending, editing, asking again

let editing = false;

function setEditing(on) {
  editing = on;
  byId("editing").hidden = !on;
  byId("prompt").value = on ? conversation.turns[conversation.last("user")].content : "";
  fit();
  byId("prompt").focus();
}

function send(event) {
  event.preventDefault();
  const text = byId("prompt").value.trim();
  if (!text) return;
  if (writing) {
    view.announce("An answer is being written. Escape stops it.");
    return;
  }
  const wrong = settings.wrongField();
  if (wrong) {
    tools.openPanel(wrong.name);
    wrong.reportValidity();
    return;
  }
  if (editing) cut(conversation.last("user"));
  setEditing(false);
  view.show(conversation.add({ role: "user", content: text }));
  answer();
}

function cut(index) {
  view.cut(index);
  return conversation.cut(index);
}

function again() {
  const wrong = settings.wrongField();
  if (writing || wrong) return wrong && tools.openPanel(wrong.name);
  if (conversation.turns.at(-1)?.role === "assistant") cut(conversation.turns.length - 1);
  byId("prompt").focus();
  return answer();
}

function act(event) {
  const button = event.target.closest("button[data-action], button[data-copy]");
  if (!button) return;
  const item = button.closest("li.turn");
  const index = [...byId("turns").children].indexOf(item);
  if (button.dataset.copy) tools.copy(button, button.closest("figure").querySelector("code").textContent);
  else if (button.dataset.action === "copy") tools.copy(button, conversation.turns[index].content);
  else if (button.dataset.action === "edit") setEditing(true);
  else again();
}

function clear() {
  writing?.abort();
  if (editing) setEditing(false);
  const gone = cut(0);
  view.clearFailure();
  byId("prompt").focus();
  return gone;
}

function restore(turns) {
  conversation = new Conversation(turns);
  conversation.save();
  turns.forEach(view.show);
  view.offer(conversation, false);
  view.toEnd();
}

/** The message box grows with its text, up to what style.css allows. */
function fit() {
  const box = byId("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // and its border
  byId("send").disabled = box.value.trim() === "";
}

function pressed(event) {
  if (event.isComposing) return;
  if (event.key === "Escape") {
    if (writing) writing.abort();
    else if (editing) setEditing(false);
  } else if (event.key === "Enter" && !event.shiftKey && event.target === byId("prompt")) {
    send(event);
  }
}

async function loadModels() {
  const choice = byId("model");
  const wanted = choice.value || recall("localStorage", "model", "");
  try {
    const names = await api.models();
    choice.replaceChildren(...names.map((name) => element("option", { value: name, text: name })));
    if (names.includes(wanted)) choice.value = wanted;
    view.clearFailure();
  } catch (error) {
    ended({ content: "" }, error);
  }
  live.clear();
  live.wake();
}

const tools = setUpTools({
  document: () => conversation.document(byId("model").value, settings.values()),
  clear,
  restore,
  panelMoved: () => live.wake(),
});
settings.open((key) => {
  api.useKey(key);
  loadModels();
});
restore(conversation.turns);
byId("composer").addEventListener("submit", send);
byId("prompt").addEventListener("input", fit);
byId("stop").addEventListener("click", () => writing?.abort());
byId("edit-cancel").addEventListener("click", () => setEditing(false));
byId("conversation").addEventListener("click", act);
view.stayAtEnd((there) => (byId("to-end").hidden = there));
byId("to-end").addEventListener("click", view.toEnd);
byId("model").addEventListener("change", () => {
  keep("localStorage", "model", byId("model").value);
  live.clear();
  live.wake();
});
document.addEventListener("keydown", pressed);
fit();
byId("prompt").focus();
