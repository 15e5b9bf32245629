// The settings form: what is sent with each request, kept in the browser. The key lasts as long as the tab.

import { byId, keep, recall } from "./dom.js";

const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "seed",
  "presence_penalty",
  "frequency_penalty",
  "repetition_penalty",
];
const KEPT = [...NUMBERS, "system", "format", "schema"];

const form = () => byId("settings");

/** Fills the form with what was kept, and keeps what changes. `keyChanged` gets the API key, now and later. */
export function open(keyChanged) {
  const saved = recall("localStorage", "settings", {});
  for (const name of KEPT) {
    if (typeof saved[name] === "string") form().elements[name].value = saved[name];
  }
  form().elements.key.value = recall("sessionStorage", "key", "");
  keyChanged(form().elements.key.value);
  form().addEventListener("submit", (event) => event.preventDefault());
  form().addEventListener("input", (event) => {
    if (event.target.name === "key") keep("sessionStorage", "key", event.target.value);
    else keep("localStorage", "settings", values());
    event.target.setCustomValidity?.("");
    showSchema();
  });
  form().addEventListener("change", (event) => {
    if (event.target.name === "key") keyChanged(event.target.value);
  });
  form().addEventListener("reset", () => {
    keep("localStorage", "settings", {});
    setTimeout(showSchema);
  });
  showSchema();
}

function showSchema() {
  byId("schema-field").hidden = form().elements.format.value !== "json_schema";
}

/** Text of every kept field by name; empty texts left out. The key is not among them. */
export function values() {
  const entries = KEPT.map((name) => [name, form().elements[name].value.trim()]);
  return Object.fromEntries(entries.filter(([, value]) => value !== ""));
}

/** The first field that cannot be sent, its message set, or null. */
export function wrongField() {
  const schema = form().elements.schema;
  schema.setCustomValidity(form().elements.format.value === "json_schema" ? schemaFault(schema.value) : "");
  return [...form().elements].find((field) => field.willValidate && !field.validity.valid) ?? null;
}

function schemaFault(text) {
  try {
    const schema = JSON.parse(text);
    return typeof schema === "object" && schema !== null ? "" : "The schema must be a JSON object.";
  } catch (error) {
    return `The schema is not JSON: ${error.message}`;
  }
}

/** Fields of the request that the settings ask for; a field left empty is not sent, the server's default holds. */
export function requestFields() {
  const given = values();
  const fields = {};
  for (const name of NUMBERS) {
    if (given[name] !== undefined) fields[name] = Number(given[name]);
  }
  if (given.format === "json_object") fields.response_format = { type: "json_object" };
  if (given.format === "json_schema") {
    const json_schema = { name: "answer", schema: JSON.parse(given.schema), strict: true };
    fields.response_format = { type: "json_schema", json_schema };
  }
  return fields;
}

/** The system prompt, or an empty text. */
export const systemPrompt = () => values().system ?? "";
