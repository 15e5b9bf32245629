// Text inside a block of Markdown: code, emphasis, strong, struck out, links.

import { element } from "./dom.js";

const DEEPEST = 6;
const LONGEST_LABEL = 1000; // characters of a link's text
const MARK = /[\\`*_~[!]|https?:\/\//g;
const ADDRESS = /https?:\/\/[^\s<>"'`)\]]{1,2000}/y;
const STYLES = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };

/** Appends `text` to `parent` as text nodes and the elements named above; returns `parent`. */
export function inline(parent, text, depth = 0) {
  const hopeless = new Set(); // marks with no partner further on: looked for once, so time stays linear
  let done = 0;
  let at = 0;
  while (depth <= DEEPEST) {
    MARK.lastIndex = at;
    const mark = MARK.exec(text);
    if (!mark) break;
    at = mark.index;
    const piece = take(text, at, mark[0], hopeless, depth);
    if (piece) {
      parent.append(text.slice(done, at), piece.node);
      done = at = piece.end;
    } else {
      at += 1;
    }
  }
  parent.append(text.slice(done));
  return parent;
}

/** What stands at `at`: {node, end}, or null for plain text. */
function take(text, at, mark, hopeless, depth) {
  switch (mark) {
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return code(text, at, hopeless);
    case "[":
      return link(text, at, depth);
    case "!":
      return text[at + 1] === "[" ? link(text, at + 1, depth) : null; // an image: nothing is fetched, a link stays
    case "http://":
    case "https://":
      return bare(text, at);
    default:
      return styled(text, at, hopeless, depth);
  }
}

function code(text, at, hopeless) {
  let run = 1;
  while (text[at + run] === "`") run += 1;
  const ticks = "`".repeat(run);
  const rest = { node: ticks, end: at + run };
  if (hopeless.has(ticks)) return rest;
  for (let end = text.indexOf(ticks, at + run); end >= 0; end = text.indexOf(ticks, end)) {
    let length = run;
    while (text[end + length] === "`") length += 1;
    if (length === run) {
      const inner = text.slice(at + run, end).replaceAll("\n", " ");
      const padded = inner.length > 2 && inner.startsWith(" ") && inner.endsWith(" ");
      return { node: element("code", { text: padded ? inner.slice(1, -1) : inner }), end: end + run };
    }
    end += length;
  }
  hopeless.add(ticks);
  return rest;
}

function styled(text, at, hopeless, depth) {
  const sign = text[at];
  const mark = text[at + 1] === sign ? sign + sign : sign;
  if (!(mark in STYLES) || hopeless.has(mark)) return null;
  if (/\s/.test(text[at + mark.length] ?? " ")) return null;
  if (sign === "_" && /[\p{L}\p{N}]/u.test(text[at - 1] ?? "")) return null;
  const end = partner(text, at + mark.length, mark);
  if (end < 0) {
    hopeless.add(mark);
    return null;
  }
  const inner = text.slice(at + mark.length, end);
  return { node: inline(element(STYLES[mark]), inner, depth + 1), end: end + mark.length };
}

/** Where the mark that closes begins, or -1. */
function partner(text, from, mark) {
  for (let end = text.indexOf(mark, from + 1); end >= 0; end = text.indexOf(mark, end)) {
    let length = mark.length;
    while (text[end + length] === mark[0]) length += 1;
    const inWord = mark[0] === "_" && /[\p{L}\p{N}]/u.test(text[end + length] ?? "");
    const single = mark.length === 1 && length === 2; // two signs close or open something strong
    if (!/\s/.test(text[end - 1]) && !inWord && !single) return end + length - mark.length;
    end += length;
  }
  return -1;
}

function link(text, at, depth) {
  const middle = text.slice(at, at + LONGEST_LABEL).indexOf("](");
  if (middle < 0) return null;
  const target = /^\]\((<?)([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: "[^"\n]*")?\)/.exec(
    text.slice(at + middle, at + middle + 2 * LONGEST_LABEL),
  );
  if (!target) return null;
  const label = text.slice(at + 1, at + middle);
  const end = at + middle + target[0].length;
  const address = safe(target[2]);
  if (!address) return { node: `${label} (${target[2]})`, end };
  return { node: inline(anchor(address), label || target[2], depth + 1), end };
}

function bare(text, at) {
  ADDRESS.lastIndex = at;
  let found = ADDRESS.exec(text)?.[0] ?? "";
  while (".,;:!?*_~".includes(found.at(-1) ?? " ")) found = found.slice(0, -1); // the sentence's, not the address's
  const address = found && safe(found);
  if (!address) return null;
  const node = anchor(address);
  node.textContent = found;
  return { node, end: at + found.length };
}

const anchor = (address) =>
  element("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" });

/** The address if it is whole and of a kind that runs nothing; null otherwise. */
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}
