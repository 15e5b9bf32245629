"""An engine that repeats its prompt, one byte a token: the server is tested without a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from hasten.engine.request import EngineStats, Output, Request, Usage
from hasten.errors import DeadlineError, HastenError, QueueFull, TokenizerError
from hasten.models.chat_template import prepared
from hasten.models.tool_calls import ToolStyle, tool_style
from hasten.runtime.sampling import TokenLogprob

VOCAB = 300


class ByteTokenizer:
    """One token a byte; a chat is its texts, each after its role."""

    eos_ids = (256,)
    fields = SimpleNamespace(chat_templates={"default": "tools"})

    special_ids = frozenset({256})

    def id_of(self, token: str) -> int | None:
        return None

    def opened(self, ids: list[int]) -> list[int]:
        return ids  # no bos

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def count(self, text: str, add_special: bool = True) -> int:
        return len(text.encode())

    longest_token = 4

    def spelling(self, token: int) -> str | None:
        return f"<{token:02x}>"

    def tool_style(self, architecture: str) -> ToolStyle:
        return tool_style(self.fields.chat_templates, architecture, {})

    def token_bytes(self) -> SimpleNamespace:
        return SimpleNamespace(values=[bytes([i]) for i in range(256)])

    def pieces(self, text: str) -> list[str]:
        return [text]

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Any = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        chat, _ = prepared(messages, tools, self.fields.chat_templates)
        if any("refuse me" in m["content"] for m in chat):
            raise TokenizerError("the template refuses", hint="be polite")
        return "".join(f"<{m['role']}>{m['content']}" for m in chat)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


@dataclass
class StandInModel:
    """As much of a LanguageModel as the server reads."""

    name: str = "stand-in"
    context: int = 4096
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    config: Any = field(
        default_factory=lambda: SimpleNamespace(vocab=VOCAB, architecture="llama", context=1 << 17)
    )
    recipe: Any = field(default_factory=lambda: SimpleNamespace(name="w8"))
    placement: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, float] = field(default_factory=dict)
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class StandInEngine:
    """Answers with `reply`, or the prompt itself, `piece` characters a step."""

    reply: str | None = None
    piece: int = 1
    delay_s: float = 0.0  # between steps
    error: HastenError | None = None  # what a request is refused with
    breaks_after: int | None = None  # steps until an answer ends with an error
    asked: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    steps: int = 0
    closed: bool = False
    failed: bool = False
    is_lost: bool = False

    async def stream(self, request: Request) -> AsyncGenerator[Output, None]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        done = False
        self.running += 1
        try:
            for output in self._outputs(request):
                await asyncio.sleep(self.delay_s)
                self.steps += 1
                done = output.finish_reason is not None and output.index == request.n - 1
                yield output
        finally:
            self.running -= 1
            if not done:
                self.cancelled.append(request.id)

    async def batches(self, request: Request) -> AsyncGenerator[list[Output], None]:
        """What the steps gave while nobody took it, as the engine does it."""
        waiting: list[Output | BaseException] = []
        arrived = asyncio.Event()

        async def step() -> None:
            try:
                async with aclosing(self.stream(request)) as outputs:
                    async for output in outputs:
                        waiting.append(output)
                        arrived.set()
            except BaseException as error:  # noqa: BLE001  whoever takes the outputs raises it
                waiting.append(error)
                arrived.set()

        task, left = asyncio.get_running_loop().create_task(step()), request.n
        try:
            while left:
                await arrived.wait()
                arrived.clear()
                news, waiting[:] = list(waiting), []
                outputs = [one for one in news if isinstance(one, Output)]
                left -= sum(one.finish_reason is not None for one in outputs)
                if outputs:
                    yield outputs
                if len(outputs) < len(news):
                    raise next(one for one in news if not isinstance(one, Output))
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _outputs(self, request: Request) -> Iterator[Output]:
        if request.pooling != "none":
            vector = np.asarray(request.prompt[:3], np.float32)
            yield Output(request.id, 0, embedding=vector, finish_reason="length", usage=usage(request, 0))
            return
        text = bytes(i for i in request.prompt if i < 256).decode() if self.reply is None else self.reply
        finish = "length" if len(text) > request.max_new_tokens else "stop"
        text = text[: request.max_new_tokens]
        pieces = [text[at : at + self.piece] for at in range(0, len(text), self.piece)] or [""]
        for index in range(request.n):
            for number, piece in enumerate(pieces):
                last = number == len(pieces) - 1
                broken = self.breaks_after is not None and number >= self.breaks_after
                yield Output(
                    request.id,
                    index,
                    tuple(piece.encode()),
                    piece,
                    tuple(logprob(token, request.logprobs) for token in piece.encode())
                    if request.logprobs is not None
                    else (),
                    prompt_logprobs=prompt_logprobs(request) if number == 0 else None,
                    finish_reason="error" if broken else finish if last else None,
                    error="the model broke" if broken else "",
                    usage=usage(request, len(text)) if last else None,
                )
                if broken:
                    return

    def stats(self) -> EngineStats:
        values = dict.fromkeys(EngineStats.__dataclass_fields__, 0)
        return EngineStats(**{**values, "running": self.running, "kv_pages": 10, "kv_pages_used": 3})

    async def close(self, drain: bool = True) -> None:
        self.closed = True


def prompt_logprobs(request: Request) -> tuple[TokenLogprob | None, ...] | None:
    if request.prompt_logprobs is None:
        return None
    return (None, *(logprob(token, request.prompt_logprobs) for token in request.prompt[1:]))


def logprob(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, 1, tuple((token + i, -0.5 - i) for i in range(top)))


def usage(request: Request, tokens: int) -> Usage:
    return Usage(len(request.prompt), 2, tokens, 0, 0, 0, 0.5, 1.5, 10.0)


@contextmanager
def refusing(engine: StandInEngine, error: HastenError) -> Iterator[None]:
    """The engine refuses while the context lasts."""
    engine.error = error
    try:
        yield
    finally:
        engine.error = None


FULL = QueueFull("256 requests wait already", hint="come again", retry_after_s=2.4)
LATE = DeadlineError("it would take 900 ms, 5 are given", hint="give more")
