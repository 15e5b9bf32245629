"""Engines to compare with: one file each, and the registry that names them.

A peer's module holds its `PEER` and two functions. It needs nothing of hasten but this package, `hasten.core`
and `hasten.errors`, so that it also runs in a Python where hasten is not installed:

    prepare(spec: EngineSpec) -> str      write whatever the engine needs, once, into the cache; its path
    load(spec: EngineSpec, prepared: str) -> Engine

What a peer needs on disk is made once here, by `made_once`: a half-made file is never used.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hasten.bench.figures import Sample
from hasten.errors import PeerError, UsageError


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
    device: str = "cpu"  # "cuda" for a GPU; ours may be told "auto"
    gpu_memory: str | float | None = None  # as `EngineOptions.gpu_memory`
    tensor_parallel: int = 1  # as `EngineOptions.tensor_parallel`
    chats: bool = False  # many requests at once, each timed for itself: `Engine.chats` in place of `generate`


class Engine(Protocol):
    version: str
    format: str
    weight_bytes: int | None  # ours: what one token reads; a peer: all its tensors, the embedding included
    notes: str  # what a reader must know to compare fairly

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        """Run all prompts together from an empty cache, greedily, `output` tokens each, past end tokens."""
        ...


@dataclass(frozen=True)
class Peer:
    """What the registry knows of an engine."""

    formats: tuple[str, ...]  # the first is the default
    requires: tuple[str, ...]  # modules that must be importable
    install: str  # what to install, after `pip install`
    install_env: str = ""  # variables to set for that
    crash_hint: str | None = None  # what to do if its process dies
    devices: tuple[str, ...] = ("cpu",)  # where it can be timed

    def install_command(self, python: str) -> str:
        return f"{self.install_env} {python} -m pip install {self.install}".strip()


PEERS = {
    "llama.cpp": "hasten.bench.peers.llama_cpp",
    "transformers": "hasten.bench.peers.hf_transformers",
    "openvino": "hasten.bench.peers.openvino",
    "vllm": "hasten.bench.peers.vllm",
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


def check_device(name: str, entry: Peer, device: str) -> None:
    """Refuse an engine that cannot be timed on a device.

    Raises:
        UsageError: it computes elsewhere.
    """
    if device not in entry.devices:
        others = [key for key in PEERS if device in entry_of(key).devices]
        raise UsageError(
            f"{name} is timed on {' and '.join(entry.devices)} here, and --device is {device}",
            hint=f"use --device {entry.devices[0]}, or --against {' or '.join(others) or 'nothing'}",
        )


def key_of(source: Path) -> str:
    """Name of a source in the cache: its stem and a hash of path, size and change time."""
    stat = source.stat()
    text = f"{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(path)` into a temporary neighbour first if it is not there yet.

    An interrupted `make` leaves nothing under `target`; of two processes at once, the first wins.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        make(part)
        try:
            part.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
    return target


def hf_folder(spec: EngineSpec) -> Path:
    """The source itself if it is such a folder; else the GGUF, dequantised once by transformers to bf16.

    Raises:
        PeerError: the source is neither.
    """
    source = Path(spec.source)
    if source.is_dir() and (source / "config.json").is_file():
        return source
    if source.suffix != ".gguf" or not source.is_file():
        raise PeerError(
            f"{spec.name} needs a Hugging Face folder or a GGUF file, got {spec.source}",
            hint="give a folder that holds config.json and *.safetensors, or a .gguf file",
        )
    return made_once(Path(spec.cache) / key_of(source) / "hf-bf16", lambda part: _convert(source, part))


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(source.resolve().parent), source.resolve().name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
