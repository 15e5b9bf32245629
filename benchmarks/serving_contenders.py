"""Who answers chats in the serving benchmarks, each in a process that is stopped between its turns."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bar import Settings, say
from chat_workloads import Message
from hasten.bench.compare import LOAD_LIMIT_S, PREPARE_LIMIT_S
from hasten.bench.figures import Answer
from hasten.bench.load import Address, Call, figures, run_calls
from hasten.bench.peers import EngineSpec
from hasten.bench.process import ServerProcess, WorkerProcess, free_port
from hasten.core import as_json
from server_process import server_command

CONTEXT = 4096
"""Tokens of prompt plus output that every contender is set up for."""


class Contender(Protocol):
    """Answers chats, all at once."""

    name: str

    def ask(self, chats: Sequence[Sequence[Message]], output: int) -> list[Answer]:
        """One answer a chat, greedily, `output` tokens each if the model does not end before."""
        ...

    def pause(self) -> None:
        """Leave the cores to the others until asked again."""
        ...


@dataclass
class Served:
    """A server that speaks the OpenAI API."""

    name: str
    server: ServerProcess
    model: str

    def ask(self, chats: Sequence[Sequence[Message]], output: int) -> list[Answer]:
        """See `Contender`."""
        self.server.resume()
        shared = {"model": self.model, "max_tokens": output, "temperature": 0}
        calls = [Call({**shared, **self.usage(), "messages": list(chat)}) for chat in chats]
        return run_calls(self.server.address, calls)

    def usage(self) -> dict[str, Any]:
        """What asks for a last event with the tokens counted; llama_cpp.server knows nothing of it."""
        return {} if self.name.startswith("llama") else {"stream_options": {"include_usage": True}}

    def pause(self) -> None:
        """See `Contender`. Ours tidies up when idle: that is not put off to the next round."""
        self.server.settle()
        self.server.pause()


@dataclass
class InProcess:
    """An engine without a server, in a worker process; it gets token ids."""

    name: str
    worker: WorkerProcess
    tokenizer: Any

    def ask(self, chats: Sequence[Sequence[Message]], output: int) -> list[Answer]:
        """See `Contender`."""
        return self.ask_ids([self.tokenizer.encode_chat(list(chat)) for chat in chats], output)

    def ask_ids(self, prompts: Sequence[Sequence[int]], output: int) -> list[Answer]:
        """The same for prompts that are token ids already."""
        records = self.worker.ask("chats", LOAD_LIMIT_S, prompts=list(prompts), output=output)
        return [Answer(**record) for record in records]

    def pause(self) -> None:
        """See `Contender`."""
        self.worker.pause()


def hasten_command() -> list[str]:
    """The `hasten` beside this Python, or the module where there is no such script."""
    script = Path(sys.executable).parent / "hasten"
    return [str(script)] if script.exists() else [sys.executable, "-m", "hasten"]


@contextlib.contextmanager
def our_server(
    settings: Settings, *options: str, context: int = CONTEXT, name: str = "hasten serve"
) -> Iterator[Served]:
    """`hasten serve ARTIFACT`, ready."""
    address = Address("127.0.0.1", free_port())
    command = [*hasten_command(), "serve", settings.artifact, "--host", address.host]
    command += ["--port", str(address.port), "--context", str(context), "--threads", str(settings.threads)]
    with ServerProcess(name, [*command, *options], address, ready="/ready") as server:
        server.wait_ready()
        yield Served(name, server, served_name(settings))


def served_name(settings: Settings) -> str:
    """What `hasten serve` calls the artifact."""
    return Path(settings.artifact).stem


@contextlib.contextmanager
def our_engine(
    settings: Settings,
    tokenizer: Any,
    options: str = "",
    *,
    context: int = CONTEXT,
    name: str = "hasten engine",
) -> Iterator[InProcess]:
    """Our Engine in a worker process; options as `peers.ours.load` reads them."""
    spec = EngineSpec(
        name,
        "hasten.bench.peers.ours",
        options,
        settings.artifact,
        "",
        settings.threads,
        context,
        chats=True,
    )
    with WorkerProcess(name) as worker:
        worker.ask("load", LOAD_LIMIT_S, spec=as_json(spec), prepared=settings.artifact)
        yield InProcess(name, worker, tokenizer)


@contextlib.contextmanager
def openvino(settings: Settings, tokenizer: Any) -> Iterator[InProcess]:
    """OpenVINO GenAI's continuous batching, int4."""
    spec = _peer_spec(settings, "openvino:int4", "hasten.bench.peers.openvino", "int4", chats=True)
    with WorkerProcess(spec.name, settings.peer_python) as worker:
        prepared = worker.ask("prepare", PREPARE_LIMIT_S, spec=as_json(spec))
        about = worker.ask("load", LOAD_LIMIT_S, spec=as_json(spec), prepared=prepared)
        say(f"openvino {about['version']}: {about['notes']}")
        yield InProcess("openvino:int4", worker, tokenizer)


@contextlib.contextmanager
def llama_cpp_served(settings: Settings, probe: Sequence[Message]) -> Iterator[Served]:
    """llama_cpp.server, Q4_0, with the number of decode threads that answers `probe` faster."""
    spec = _peer_spec(settings, "llama.cpp:q4_0", "hasten.bench.peers.llama_cpp", "q4_0")
    with WorkerProcess(spec.name, settings.peer_python) as worker:
        prepared = worker.ask("prepare", PREPARE_LIMIT_S, spec=as_json(spec))
    best = max(
        sorted({1, settings.threads}),
        key=lambda threads: _llama_speed(settings, spec, prepared, threads, probe),
    )
    say(f"llama_cpp.server decodes fastest with {best} thread(s)")
    with _llama_server(settings, spec, prepared, best) as served:
        yield served


def _peer_spec(settings: Settings, name: str, module: str, form: str, chats: bool = False) -> EngineSpec:
    from hasten.bench.compare import peer_source
    from hasten.cache import cache_dir

    source, cache = str(peer_source(settings.model)), str(cache_dir() / "bench")
    return EngineSpec(name, module, form, source, cache, settings.threads, CONTEXT, chats=chats)


def _llama_speed(
    settings: Settings, spec: EngineSpec, prepared: str, threads: int, probe: Sequence[Message]
) -> float:
    with _llama_server(settings, spec, prepared, threads) as served:
        served.ask([probe], 16)
        speed = figures(served.ask([probe], 64)).tok_per_s
    say(f"llama_cpp.server with {threads} decode thread(s): {speed:.1f} tok/s for one chat")
    return speed


@contextlib.contextmanager
def _llama_server(settings: Settings, spec: EngineSpec, prepared: str, threads: int) -> Iterator[Served]:
    address = Address("127.0.0.1", free_port())
    python = settings.peer_python or os.environ.get("HASTEN_PEER_PYTHON") or sys.executable
    command = server_command(python, spec, prepared, address, threads)
    with ServerProcess("llama_cpp.server", command, address) as server:
        server.wait_ready()
        yield Served("llama_cpp.server:q4_0", server, "q4_0")
