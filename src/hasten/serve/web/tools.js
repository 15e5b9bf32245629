// The header's buttons: new chat (with a way back), export, theme, panel; and copying.

import { byId, element, keep, recall } from "./dom.js";
import { announce } from "./view.js";

const THEMES = ["system", "light", "dark"];
const NARROW = "(max-width: 56rem)"; // as in style.css: the panel covers the conversation
const SHOWN_MS = 1500;

/** `page` is {document(), clear() -> turns, restore(turns), panelMoved()}. Returns {copy, openPanel}. */
export function setUpTools(page) {
  setUpTheme();
  const movePanel = setUpPanel(page.panelMoved);
  byId("export").addEventListener("click", () => save(page.document()));
  byId("new").addEventListener("click", () => {
    const gone = page.clear();
    offerUndo(gone, page.restore);
  });
  const openPanel = (name) => {
    movePanel(true);
    byId(name).focus();
  };
  return { copy, openPanel };
}

function setUpTheme() {
  const button = byId("theme");
  const set = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.setAttribute("aria-label", `Theme: ${theme}`);
    button.querySelector("span").textContent = `Theme: ${theme}`;
  };
  let theme = recall("localStorage", "theme", "system");
  if (!THEMES.includes(theme)) theme = "system";
  set(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    keep("localStorage", "theme", theme);
    set(theme);
    announce(`Theme: ${theme}`);
  });
}

function setUpPanel(moved) {
  const button = byId("panel-toggle");
  const narrow = window.matchMedia(NARROW);
  const move = (open) => {
    byId("panel").hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    document.querySelector("main").toggleAttribute("data-covered", open && narrow.matches);
    moved();
  };
  move(!narrow.matches);
  button.addEventListener("click", () => move(byId("panel").hidden));
  narrow.addEventListener("change", () => move(!narrow.matches));
  byId("skip").addEventListener("click", () => narrow.matches && move(false));
  return move;
}

function save(found) {
  const file = new Blob([JSON.stringify(found, null, 2)], { type: "application/json" });
  const address = URL.createObjectURL(file);
  const stamp = found.exported_at.slice(0, 19).replaceAll(":", "-");
  element("a", { href: address, download: `hasten-chat-${stamp}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
  announce("Conversation saved as JSON.");
}

function offerUndo(gone, restore) {
  announce(gone.length ? "New chat. Undo brings the last one back." : "New chat.");
  byId("undo")?.remove();
  if (gone.length === 0) return;
  const back = () => {
    byId("undo")?.remove();
    if (byId("turns").children.length === 0) restore(gone);
    byId("prompt").focus();
  };
  const button = element("button", { type: "button", class: "small", on: { click: back }, text: "Undo" });
  byId("empty").append(element("p", { id: "undo" }, "The last chat was cleared. ", button));
}

async function copy(button, text) {
  const done = await written(text);
  announce(done ? "Copied." : "The browser did not allow copying.");
  const label = button.textContent;
  if (label !== "Copy") return;
  button.textContent = done ? "Copied" : "Not allowed";
  setTimeout(() => (button.textContent = label), SHOWN_MS);
}

async function written(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  return copiedFromBox(text); // plain http from another machine: browsers offer no clipboard object there
}

function copiedFromBox(text) {
  const focused = document.activeElement;
  const box = element("textarea", { class: "unseen", "aria-hidden": "true" });
  box.value = text;
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return done;
}
