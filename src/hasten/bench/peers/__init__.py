"""Engines to compare with: one file each, and the registry that names them.

A peer's module holds its `PEER` and two functions. It needs nothing of hasten but this package, `hasten.core`
and `hasten.errors`, so that it also runs in a Python where hasten is not installed:

    prepare(spec: EngineSpec) -> str      write whatever the engine needs, once, into the cache; its path
    load(spec: EngineSpec, prepared: str) -> Engine
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

from hasten.bench.figures import Sample
from hasten.errors import UsageError


@dataclass(frozen=True)
class EngineSpec:
    """What a worker process is told to run. Everything in it travels as JSON."""

    name: str  # as the user wrote it: "llama.cpp:q4_0"
    module: str  # Python module of the engine
    format: str  # the engine's own name for its weights
    source: str  # model folder, GGUF file, or what `hasten.load` takes
    cache: str  # folder for what `prepare` writes
    threads: int
    context: int  # tokens of prompt plus output
    batch: int = 1
    chats: bool = False  # many requests at once, each timed for itself: `Engine.chats` in place of `generate`


class Engine(Protocol):
    """A loaded engine."""

    version: str
    format: str
    weight_bytes: int | None  # ours: what one token reads; a peer: all its tensors, the embedding included
    notes: str  # what a reader must know to compare fairly

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        """Run all prompts together from an empty cache, greedily, `output` tokens each, past end tokens."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


@dataclass(frozen=True)
class Peer:
    """What the registry knows of an engine."""

    formats: tuple[str, ...]  # the first is the default
    requires: tuple[str, ...]  # modules that must be importable
    install: str  # what to install, after `pip install`
    install_env: str = ""  # variables to set for that
    crash_hint: str | None = None  # what to do if its process dies

    def install_command(self, python: str) -> str:
        """The exact command that installs this peer for that Python."""
        return f"{self.install_env} {python} -m pip install {self.install}".strip()


PEERS = {
    "llama.cpp": "hasten.bench.peers.llama_cpp",
    "transformers": "hasten.bench.peers.hf_transformers",
    "openvino": "hasten.bench.peers.openvino",
}
"""Name in `--against` -> the module that holds its `PEER`. A new engine is one file and one line here."""


def entry_of(name: str) -> Peer:
    """The entry of an engine that is in PEERS."""
    found: Peer = importlib.import_module(PEERS[name]).PEER
    return found


def parse(name: str) -> tuple[str, Peer, str]:
    """`llama.cpp:q4_0` -> ("llama.cpp", its entry, "q4_0"); without a format, the peer's first.

    Raises:
        UsageError: no such peer, or no such format of it.
    """
    engine, _, form = name.partition(":")
    if engine not in PEERS:
        known = ", ".join(f"{key}:{entry_of(key).formats[0]}" for key in PEERS)
        raise UsageError(f"unknown engine {name!r} in --against", hint=f"use one of {known}")
    entry = entry_of(engine)
    form = form or entry.formats[0]
    if form not in entry.formats:
        raise UsageError(
            f"{engine} has no format {form!r} here",
            hint=f"use {engine}: with one of {', '.join(entry.formats)}",
        )
    return engine, entry, form
