// A subset of Markdown (CommonMark's names, GitHub's tables) drawn as elements: headings, paragraphs, fenced code,
// lists, quotes, tables, rules. Input is whatever a model wrote: it becomes text nodes and the elements named here,
// a link only for http, https and mailto, an image never. Time is linear in the text; nesting is cut at DEEPEST.

import { element } from "./dom.js";
import { inline } from "./inline.js";

const DEEPEST = 6;
const FENCE = /^( {0,3})(`{3,}|~{3,})/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( {1,4})(.*)|$)/;
const TABLE = /^\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*(?::?-+:?[ \t]*)?)*$/;

/** Lines -> blocks {kind, lines, ...}; `lines` are the block's own, without its marks. */
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const taken =
      code(lines, at) ?? quote(lines, at) ?? single(lines, at) ?? list(lines, at) ?? table(lines, at);
    const block = taken ?? paragraph(lines, at);
    if (block.kind !== "blank") blocks.push(block);
    at = block.end;
  }
  return blocks;
}

function code(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (!fence) return null;
  const [opening, indent, mark] = fence;
  const language = lines[at].slice(opening.length);
  if (mark[0] === "`" && language.includes("`")) return null; // code inside a line
  let end = at + 1;
  const closes = (line) => line.trim().length >= mark.length && line.trim() === mark[0].repeat(line.trim().length);
  while (end < lines.length && !closes(lines[end])) end += 1;
  const body = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent.length, leading(line))));
  return { kind: "code", language: language.trim().split(/\s/)[0], lines: body, end: end + 1 };
}

function quote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  if (end === at) return null;
  return { kind: "quote", lines: lines.slice(at, end).map((line) => line.replace(QUOTE, "")), end };
}

function single(lines, at) {
  const line = lines[at];
  if (line.trim() === "") return { kind: "blank", end: at + 1 };
  const heading = HEADING.exec(line);
  if (heading) return { kind: "heading", level: heading[1].length, lines: [heading[2]], end: at + 1 };
  return RULE.test(line) ? { kind: "rule", lines: [], end: at + 1 } : null;
}

function list(lines, at) {
  const first = ITEM.exec(lines[at]);
  if (!first || first[1].length > 3) return null;
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  let inside = 0; // columns before the current item's text
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const item = ITEM.exec(line);
    const indent = leading(line);
    if (item && indent < Math.max(inside, first[1].length + 2) && !RULE.test(line)) {
      if (/\d/.test(item[2]) !== ordered) break;
      inside = item[1].length + item[2].length + (item[3]?.length ?? 1);
      items.push([item[4] ?? ""]);
    } else if (line.trim() === "" || indent >= 2) {
      items.at(-1).push(line.slice(Math.min(inside, indent)));
    } else if (lines[end - 1].trim() === "" || starts(lines, end)) {
      break;
    } else {
      items.at(-1).push(line);
    }
  }
  return { kind: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, items, end };
}

function table(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length) return null;
  if (!lines[at + 1].includes("|") || !lines[at + 1].includes("-") || !TABLE.test(lines[at + 1].trim())) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const rows = lines.slice(at, end).map(cells);
  const sides = rows[1].map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "end") : "start"));
  return { kind: "table", head: rows[0], sides, rows: rows.slice(2), end };
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== "" && !starts(lines, end)) end += 1;
  return { kind: "paragraph", lines: lines.slice(at, end), end };
}

/** Whether a block other than a paragraph starts in this line. */
function starts(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line)) || table(lines, at) !== null;
}

const leading = (line) => line.length - line.trimStart().length;

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function draw(block, depth) {
  const text = (block.lines ?? []).join("\n");
  switch (block.kind) {
    case "code":
      return drawCode(block, text);
    case "heading":
      return inline(element(`h${block.rank ?? 6}`), text);
    case "rule":
      return element("hr");
    case "quote":
      return fill(element("blockquote"), block.lines, depth + 1);
    case "list":
      return drawList(block, depth);
    case "table":
      return drawTable(block);
    default:
      return inline(element("p"), text.trim());
  }
}

function drawCode(block, text) {
  const name = block.language || "text";
  return element(
    "figure",
    { class: "code" },
    element(
      "figcaption",
      {},
      element("span", { text: name }),
      element("button", { type: "button", class: "small", "data-copy": "code", "aria-label": "Copy this code", text: "Copy" }),
    ),
    element("pre", { tabindex: 0, role: "group", "aria-label": `Code, ${name}` }, element("code", { text })),
  );
}

function drawList(block, depth) {
  const list = block.ordered
    ? element("ol", { start: block.start === 1 ? null : block.start })
    : element("ul");
  for (const lines of block.items) {
    const item = element("li");
    const blocks = depth < DEEPEST ? split(lines) : [];
    if (blocks.length === 0) item.append(lines.join("\n").trim());
    blocks.forEach((inner, index) => {
      if (index === 0 && inner.kind === "paragraph") inline(item, inner.lines.join("\n").trim());
      else item.append(draw(inner, depth + 1));
    });
    list.append(item);
  }
  return list;
}

function drawTable(block) {
  const row = (kind, values) =>
    element(
      "tr",
      {},
      ...block.head.map((_, column) => {
        const side = block.sides[column] ?? "start";
        return inline(element(kind, { class: side, scope: kind === "th" ? "col" : null }), values[column] ?? "");
      }),
    );
  const body = element("tbody", {}, ...block.rows.map((values) => row("td", values)));
  const made = element("table", {}, element("thead", {}, row("th", block.head)), body);
  return element("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table" }, made);
}

function fill(parent, lines, depth) {
  if (depth > DEEPEST) parent.append(lines.join("\n"));
  else parent.append(...split(lines).map((block) => draw(block, depth)));
  return parent;
}

/** Ranks of the top headings, h4 to h6: the first is h4 and none skips one, whatever marks the model took. */
function rank(blocks) {
  let first = null;
  let last = 3;
  for (const block of blocks.filter((one) => one.kind === "heading")) {
    first ??= block.level;
    block.rank = last = Math.min(6, last + 1, Math.max(4, 4 + block.level - first));
  }
  return blocks;
}

/**
 * Draws `text` into `parent`. Called again with a longer text it keeps every block that has not changed, so a
 * streamed answer costs one block a frame, and a selection in a finished block stays.
 */
export function render(parent, text) {
  const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const drawn = (parent.blocks ??= []);
  const blocks = rank(split(lines));
  blocks.forEach((block, index) => {
    const key = JSON.stringify({ ...block, end: 0 });
    const old = drawn[index];
    if (old?.key === key) return;
    if (old?.kind === "code" && block.kind === "code" && old.language === block.language) {
      old.node.querySelector("code").textContent = block.lines.join("\n");
      old.key = key;
      return;
    }
    const node = draw(block, 0);
    if (old) old.node.replaceWith(node);
    else parent.append(node);
    drawn[index] = { key, kind: block.kind, language: block.language, node };
  });
  for (const gone of drawn.splice(blocks.length)) gone.node.remove();
}
