// Elements made of names and text. Nothing here, or anywhere in this page, parses markup: text from a model or a
// server only ever becomes a text node.

/**
 * An element. `attributes` are set as attributes, but `on` holds listeners by event name and `text` the content.
 * False, null and undefined leave an attribute out; true sets it empty.
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (key === "text") {
      made.textContent = value;
    } else if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(key, value === true ? "" : String(value));
    }
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes. */
export function drawn(name, attributes = {}) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** JSON kept in the browser's storage; `missing` where there is none, it is damaged or storage is forbidden. */
export function recall(store, key, missing) {
  try {
    return JSON.parse(window[store].getItem(`hasten.${key}`)) ?? missing;
  } catch {
    return missing;
  }
}

/** Keeps JSON in the browser's storage; false where storage is full or forbidden. */
export function keep(store, key, value) {
  try {
    window[store].setItem(`hasten.${key}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
