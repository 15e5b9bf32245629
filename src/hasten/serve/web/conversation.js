// A conversation: turns, kept over a reload of the tab, and its export.

import { keep, recall } from "./dom.js";

/**
 * Turns are {role: "user" | "assistant", content, note?, reasoning?, stats?}. `note` says why an answer is not
 * whole; `stats` are its figures.
 */
export class Conversation {
  constructor(turns = recall("sessionStorage", "conversation", [])) {
    const whole = Array.isArray(turns) && turns.every((turn) => typeof turn?.content === "string");
    this.turns = whole ? turns : [];
  }

  add(turn) {
    this.turns.push(turn);
    this.save();
    return turn;
  }

  /** Cuts the conversation before turn `index`; returns what was cut. */
  cut(index) {
    const gone = this.turns.splice(index);
    this.save();
    return gone;
  }

  save() {
    keep("sessionStorage", "conversation", this.turns);
  }

  /** Index of the last turn of `role`, -1 for none. */
  last(role) {
    return this.turns.findLastIndex((turn) => turn.role === role);
  }

  /**
   * Messages as the API wants them, the system prompt first. Answers without a word are left out and the
   * questions around them joined: many chat templates insist that the roles take turns.
   */
  messages(system) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { role, content } of this.turns.filter((turn) => turn.content !== "")) {
      const before = messages.at(-1);
      if (before?.role === role) before.content += `\n\n${content}`;
      else messages.push({ role, content });
    }
    return messages;
  }

  /** The document that Export saves: messages, model and settings; never the key. */
  document(model, settings) {
    return {
      schema_version: 1,
      exported_at: new Date().toISOString(),
      model,
      settings,
      messages: this.turns,
    };
  }
}
