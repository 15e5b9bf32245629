"""What a peer needs on disk, made once: a half-made file is never used, and a folder out of a GGUF file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.bench.peers import EngineSpec
from hasten.errors import PeerError


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
