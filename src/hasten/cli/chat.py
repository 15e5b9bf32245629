"""`hasten chat`: a conversation in the terminal, or through a pipe with one turn a line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from hasten.cli.console import note, note_device, opened, speak
from hasten.cli.flags import (
    ContextOption,
    DeviceOption,
    GpuMemoryOption,
    MinPOption,
    ModelArgument,
    NewTokensOption,
    RecipeOption,
    SeedOption,
    TemperatureOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    optional,
)
from hasten.core import EngineOptions
from hasten.errors import HastenError, UsageError
from hasten.stopping import outlived

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel
    from hasten.runtime.sampling import SamplingOptions

KEPT = "The conversation is not stored."
HELP = "/reset starts over, /help shows this, /exit or Ctrl-D leaves; Ctrl-C stops an answer."

SystemOption = Annotated[str, optional("--system", "TEXT", "Instructions the conversation opens with.")]


def command(
    model: ModelArgument,
    system: SystemOption = "",
    max_new_tokens: NewTokensOption = 1024,
    recipe: RecipeOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
) -> None:
    """Talk with a model in the terminal.

    Answers stream to stdout. /reset starts over, /help lists what can be typed, /exit or Ctrl-D leaves;
    Ctrl-C stops an answer and not the program. Through a pipe, every line of stdin is one turn.
    """
    from hasten.runtime.sampling import SamplingOptions

    sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    options = EngineOptions(threads=threads, context=context, device=device, gpu_memory=gpu_memory)
    running = opened(model, recipe, options)
    note_device(running)
    if sys.stdin.isatty():
        note(f"{running.name} [{running.recipe.name}]. {HELP}")
    conversation = Conversation(running, sampling, max_new_tokens, system)
    for line in _typed() if sys.stdin.isatty() else _piped():
        if line == "/exit":
            return
        if line == "/help":
            note(HELP)
        elif line == "/reset":
            conversation.reset()
            note("started over")
        elif line.startswith("/") and " " not in line:
            note(f"unknown command {line}. {HELP}")
        elif line:
            conversation.say(line)


class Conversation:
    """The messages so far and the engine that has computed them.

    Each turn renders and encodes the whole conversation anew; the engine's prefix cache holds what was
    computed before, so a turn costs its own tokens.
    """

    def __init__(
        self, model: LanguageModel, sampling: SamplingOptions, max_new_tokens: int, system: str
    ) -> None:
        self._tokenizer = model.tokenizer
        self._engine = model.engine()
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str) -> None:
        """One turn: the user's `text`, then the model's answer on stdout and its speed on stderr."""
        from hasten.engine.request import Request

        tokenizer = self._tokenizer
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            ids = tokenizer.encode_chat(asked)
            tokens = self._engine.tokens(Request(tuple(ids), self._max_new_tokens, self._sampling))
            answer = speak(tokens, tokenizer, patient=True)
        except HastenError as error:  # the turn fails, the conversation goes on without it
            note(f"error: {error.message}\nhint: {error.hint or '/reset starts over'}")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        note(f"[{answer.line()}]" + (" stopped" if answer.stopped else ""))
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]


def _typed() -> Iterator[str]:
    """Lines from the keyboard; Ctrl-C drops the line, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  its import alone gives input() line editing and history
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            outlived()
            note("\n(/exit or Ctrl-D leaves)")
        except EOFError:
            note("")
            return


def _piped() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").strip()
        except UnicodeDecodeError:
            raise UsageError(
                f"line {number} of stdin is not valid UTF-8",
                hint="convert it first, for example: iconv -f LATIN1 -t UTF-8",
            ) from None
