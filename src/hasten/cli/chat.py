"""`hasten chat`: a conversation in the terminal, or through a pipe with one turn a line."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.console import note, speak
from hasten.cli.flags import AnswerFlags, ModelArgument, fill, grammar_of, parameters, with_flags
from hasten.errors import HastenError, UsageError
from hasten.stopping import outlived

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.engine.model import LanguageModel
    from hasten.runtime.sampling import SamplingOptions

KEPT = "The conversation is not stored."
HELP = """/reset starts over, /undo takes the last turn back, /again asks the last question anew
/system TEXT gives other instructions and starts over; /set NAME VALUE sets temperature, top_k, top_p, min_p,
repetition_penalty, seed or max_new_tokens; /set alone shows them; /save FILE writes the conversation
/help shows this, /exit or Ctrl-D leaves; Ctrl-C stops an answer
a line that ends with a backslash goes on in the next; so does all between two lines of three quotes"""
SHORT = "/help lists what can be typed; Ctrl-C stops an answer, /exit or Ctrl-D leaves."


def command(model: ModelArgument, **flags: Any) -> None:
    """Talk with a model in the terminal.

    Answers stream to stdout, sampled as the model's authors advise unless flags say otherwise. /help lists
    what can be typed; /exit or Ctrl-D leaves; Ctrl-C stops an answer and not the program. Through a pipe,
    every line of stdin is one turn.
    """
    asked: AnswerFlags = fill(AnswerFlags, flags)
    grammar = grammar_of(asked.json_schema)
    asked.sampling()  # a wrong flag is said before the model is loaded
    running = asked.opened(model)
    limits = Limits(asked.max_new_tokens, tuple(asked.stop or ()), grammar)
    conversation = Conversation(running, asked.sampling(running.sampling), limits, asked.system)
    if sys.stdin.isatty():
        note(f"{running.name} [{running.recipe.name}], {conversation.settings()}. {SHORT}")
    for line in _typed() if sys.stdin.isatty() else _piped():
        if line == "/exit":
            return
        _take(conversation, line)


with_flags(command, parameters(AnswerFlags))


def _take(conversation: Conversation, line: str) -> None:
    """One line or block: a command, or a turn."""
    name, _, value = line.partition(" ")
    action = _COMMANDS.get(name)
    if action is not None:
        try:
            action(conversation, value.strip())
        except (HastenError, OSError) as error:
            hint = getattr(error, "hint", None) or "/help lists what can be typed"
            note(f"error: {getattr(error, 'message', error)}\nhint: {hint}")
    elif line.startswith("/") and " " not in line and "\n" not in line:
        note(f"unknown command {line}. {HELP}")
    elif line:
        conversation.say(line)


@dataclass(frozen=True)
class Limits:
    """What bounds an answer."""

    max_new_tokens: int | None = None  # None: until it ends
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None


class Conversation:
    """The messages so far and the engine that has computed them.

    Each turn renders and encodes the whole conversation anew; the engine's prefix cache holds what was
    computed before, so a turn costs its own tokens.
    """

    def __init__(self, model: LanguageModel, sampling: SamplingOptions, limits: Limits, system: str) -> None:
        self._tokenizer = model.tokenizer
        self._engine = model.engine()
        self._context = model.context
        self._sampling = sampling
        self._limits = limits
        self._system = system
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget everything but the system text, or take another one."""
        self._system = self._system if system is None else system
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def undo(self) -> str | None:
        """Take the last turn back; returns what was asked, None where there is no turn."""
        if not any(message["role"] == "user" for message in self.messages):
            return None
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        return self.messages.pop()["content"]

    def set(self, name: str, value: str) -> None:
        """Change one setting.

        Raises:
            UsageError: there is none of that name, or the value is out of its range.
        """
        whole = name in ("top_k", "seed", "max_new_tokens")
        try:
            number = int(value) if whole else float(value)
        except ValueError:
            raise UsageError(f"{value!r} is no number", hint=f"/set {name} 1") from None
        if name == "max_new_tokens":
            self._limits = replace(self._limits, max_new_tokens=int(number))
        elif name in _SETTINGS:
            changed: dict[str, Any] = {name: number}
            self._sampling = replace(self._sampling, **changed)
        else:
            raise UsageError(f"there is no setting {name!r}", hint=f"settings: {', '.join(_SETTINGS)}")

    def settings(self) -> str:
        """How tokens are chosen, in words."""
        if not self._sampling.temperature:
            return "greedy"
        return ", ".join(f"{name} {getattr(self._sampling, name):g}" for name in _SETTINGS)

    def say(self, text: str) -> None:
        """One turn: the user's `text`, then the model's answer on stdout and its speed on stderr."""
        from hasten.engine.request import Request

        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = self._tokenizer.encode_chat(asked)
            most = self._limits.max_new_tokens
            request = Request(
                tuple(ids),
                self._context if most is None else most,
                self._sampling,
                stop=self._limits.stop,
                grammar=self._limits.grammar,
            )
            answer = speak(self._engine.run([request]), patient=True)
        except HastenError as error:  # the turn fails, the conversation goes on without it
            note(f"error: {error.message}\nhint: {error.hint or '/reset starts over'}")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        note(f"[{answer.line()}]" + (" stopped" if answer.stopped else ""))
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]


_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _again(conversation: Conversation, value: str) -> None:
    text = conversation.undo()
    if text is None:
        note("nothing was asked yet")
    else:
        conversation.say(text)


def _reset(conversation: Conversation, value: str) -> None:
    conversation.reset()
    note("started over")


def _system(conversation: Conversation, value: str) -> None:
    conversation.reset(value)
    note("started over with other instructions" if value else "started over without instructions")


def _undo(conversation: Conversation, value: str) -> None:
    text = conversation.undo()
    note("nothing was asked yet" if text is None else f"taken back: {text[:60]}")


def _set(conversation: Conversation, value: str) -> None:
    name, _, number = value.partition(" ")
    if name:
        conversation.set(name, number.strip())
    note(conversation.settings())


def _save(conversation: Conversation, value: str) -> None:
    if not value:
        raise UsageError("/save needs the name of a file", hint="/save talk.json")
    text = json.dumps(conversation.messages, ensure_ascii=False, indent=1)
    Path(value).expanduser().write_text(text, encoding="utf-8")
    note(f"{len(conversation.messages)} messages are in {value}")


_COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": lambda conversation, value: note(HELP),
    "/reset": _reset,
    "/again": _again,
    "/undo": _undo,
    "/system": _system,
    "/set": _set,
    "/save": _save,
}
_QUOTES = '"""'


def _typed() -> Iterator[str]:
    """Lines and blocks from the keyboard; Ctrl-C drops what was typed, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  its import alone gives input() line editing and history
    while True:
        try:
            yield _block()
        except KeyboardInterrupt:
            outlived()
            note("\n(/exit or Ctrl-D leaves)")
        except EOFError:
            note("")
            return


def _block() -> str:
    """A line; one that ends with a backslash goes on, and so does what stands between two lines of quotes."""
    line = input("> ")
    if line.strip() == _QUOTES:
        lines: list[str] = []
        while (line := input(". ")).strip() != _QUOTES:
            lines.append(line)
        return "\n".join(lines)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = input(". ")
    return "\n".join([*lines, line]).strip()


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UsageError(
                f"line {number} of stdin is not valid UTF-8",
                hint="convert it first, for example: iconv -f LATIN1 -t UTF-8",
            ) from None
