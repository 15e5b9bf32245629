// The server's side: /v1/models, /v1/chat/completions as a stream of events, /stats.

/** What the server refused or failed at: `message`, `hint`, `status` (0: no answer at all), `retryAfter` seconds. */
export class ServerError extends Error {
  constructor(message, { hint = "", status = 0, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { hint, status, retryAfter });
  }
}

let apiKey = "";

/** The key sent from now on; empty for none. */
export function useKey(key) {
  apiKey = key.trim();
}

async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, signal, credentials: "omit", cache: "no-store" };
  let response;
  try {
    response = await fetch(path, { ...options, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", {
      hint: "see whether `hasten serve` still runs, then try again",
    });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const after = parseFloat(response.headers.get("Retry-After"));
  const details = { status: response.status, retryAfter: Number.isFinite(after) ? after : null };
  const body = await response.json().catch(() => null);
  return fault(body, details) ?? new ServerError(`The server answered ${response.status}.`, details);
}

/** The error in a body or event of the form {"error": {"message", "hint"}}, or null. */
function fault(found, details = {}) {
  const error = found?.error ?? found?.detail;
  if (!error) return null;
  if (typeof error === "string") return new ServerError(error, details);
  if (typeof error.message !== "string") return new ServerError(JSON.stringify(error), details);
  return new ServerError(error.message, { ...details, hint: String(error.hint ?? "") });
}

/** Names of the models the server offers. */
export async function models() {
  const answer = await (await ask("v1/models")).json();
  return answer.data.map((model) => String(model.id));
}

/** {uptime_s, models: {name: figures}} of this moment. */
export async function stats() {
  return (await ask("stats", { signal: AbortSignal.timeout(5000) })).json();
}

/**
 * Asks for an answer and yields its events: the decoded JSON of every `data:` line.
 *
 * Throws ServerError for a refusal, an error event, or a stream that ends without [DONE]; AbortError once
 * `signal` fires, which also tells the server to stop.
 */
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", {
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  });
  let complete = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      complete = true;
      break;
    }
    const event = JSON.parse(data);
    const error = fault(event);
    if (error) throw error;
    yield event;
  }
  if (!complete) {
    throw new ServerError("The connection ended before the answer did.", {
      hint: "regenerate the answer; the server's log says why it stopped",
    });
  }
}

/** The data of each server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) return;
      const lines = (pending + value).split(/\r\n|\n|\r(?!$)/);
      pending = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length > 0) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // left early: the connection closes, and the server stops computing
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The connection broke while the answer was written.", {
      hint: "see whether `hasten serve` still runs, then regenerate the answer",
    });
  }
}
