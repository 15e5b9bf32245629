"""A model of bytes, so that the commands are tested without weights."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import hasten.runtime.executor  # noqa: F401  before `model` puts a stand-in for what it imports
from hasten.errors import UsageError

END = 256


class ByteText:
    """Text of a byte stream, whole characters only."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteTokenizer:
    """One token a byte."""

    eos_ids = (END,)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")

    def stream(self) -> ByteText:
        return ByteText()


@dataclass
class ByteModel:
    """Answers `reply`, then ends. `asked` is every prompt it got; `interrupt_after` raises Ctrl-C there."""

    reply: str = "héllo"
    context: int = 4096
    interrupt_after: int | None = None
    asked: list[str] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)
    name: str = "bytes"
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    recipe: Any = field(default_factory=lambda: SimpleNamespace(name="w8"))
    device: str = "cpu"

    sampling: dict[str, float] = field(default_factory=dict)  # what its authors advise
    requests: list[Any] = field(default_factory=list)
    device_because: str = ""

    def engine(self, options: Any = None) -> ByteModel:
        return self

    def run(self, requests: list[Any]) -> Iterator[Any]:
        (request,) = requests
        self.requests.append(request)
        ids = request.prompt
        if len(ids) > self.context:
            raise UsageError(
                f"the prompt has {len(ids)} tokens, the context {self.context}", hint="raise --context"
            )
        self.asked.append(bytes(ids).decode())
        return self._outputs(request.max_new_tokens)

    def _outputs(self, most: int) -> Iterator[Any]:
        text, whole = ByteText(), [*self.reply.encode(), END]
        for count, token in enumerate(whole[:most]):
            if count == self.interrupt_after:
                raise KeyboardInterrupt
            ended = token == END
            new = "" if ended else text.push(token)
            if count + 1 == len(whole[:most]):
                new += text.flush()
            reason = "stop" if ended else "length" if count + 1 == most else None
            yield SimpleNamespace(token_ids=(token,), text=new, finish_reason=reason)


def _request(prompt: Any, max_new_tokens: int, sampling: Any, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, max_new_tokens=max_new_tokens, sampling=sampling, **more)


@dataclass(frozen=True)
class Sampling:
    """As `SamplingOptions`, unchecked."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ByteModel:
    """What `hasten.load` returns while the test runs."""
    fake = ByteModel()

    def load(ref: str, **options: Any) -> ByteModel:
        fake.loaded = {"ref": ref, **options}
        return fake

    engine, sampling = ModuleType("hasten.engine.model"), ModuleType("hasten.runtime.sampling")
    engine.load = load  # type: ignore[attr-defined]
    sampling.SamplingOptions = Sampling  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hasten.engine.model", engine)
    monkeypatch.setitem(sys.modules, "hasten.runtime.sampling", sampling)
    request = ModuleType("hasten.engine.request")
    request.Request = _request  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hasten.engine.request", request)
    return fake


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with bytes: they become stdin."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give
