"""Engines to compare with: one file each, and the registry that names them.

A peer's module has two functions and needs nothing of hasten but this package, `hasten.core` and
`hasten.errors`, so that it also runs in a Python where hasten is not installed:

    prepare(spec: EngineSpec) -> str      write whatever the engine needs, once, into the cache; its path
    load(spec: EngineSpec, prepared: str) -> Engine
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from hasten.bench.peers.llama_cpp_build import LLAMA_CPP, cmake_args
from hasten.bench.sample import Sample
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
    """An entry of the registry."""

    module: str
    formats: tuple[str, ...]  # the first is the default
    requires: tuple[str, ...]  # modules that must be importable
    install: str  # what to install, after `pip install`
    install_env: str = ""  # variables to set for that
    crash_hint: str | None = None  # what to do if its process dies

    def install_command(self, python: str) -> str:
        """The exact command that installs this peer for that Python."""
        return f"{self.install_env} {python} -m pip install {self.install}".strip()


PEERS: dict[str, Peer] = {
    "llama.cpp": Peer(
        module="hasten.bench.peers.llama_cpp",
        formats=("q4_0", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "source"),
        requires=("llama_cpp",),
        install=LLAMA_CPP,
        install_env=cmake_args(),
        crash_hint=f"build it anew: {cmake_args()} pip install --no-cache-dir --force-reinstall {LLAMA_CPP}",
    ),
    "transformers": Peer(
        module="hasten.bench.peers.hf_transformers",
        formats=("bf16", "fp32"),
        requires=("torch", "transformers", "accelerate", "gguf"),
        install='"torch==2.13.0" "transformers>=5,<6" accelerate gguf',
    ),
    "openvino": Peer(
        module="hasten.bench.peers.openvino_pipeline",
        formats=("int4", "int8"),
        requires=("openvino_genai", "optimum.intel", "nncf", "accelerate", "gguf"),
        install='"torch==2.13.0" openvino-genai optimum-intel nncf accelerate gguf',
    ),
}


def parse(name: str) -> tuple[str, Peer, str]:
    """`llama.cpp:q4_0` -> ("llama.cpp", its entry, "q4_0"); without a format, the peer's first.

    Raises:
        UsageError: no such peer, or no such format of it.
    """
    engine, _, form = name.partition(":")
    peer = PEERS.get(engine)
    if peer is None:
        known = ", ".join(f"{key}:{entry.formats[0]}" for key, entry in PEERS.items())
        raise UsageError(f"unknown engine {name!r} in --against", hint=f"use one of {known}")
    form = form or peer.formats[0]
    if form not in peer.formats:
        raise UsageError(
            f"{engine} has no format {form!r} here",
            hint=f"use {engine}: with one of {', '.join(peer.formats)}",
        )
    return engine, peer, form
