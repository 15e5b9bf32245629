"""A Hugging Face folder of the source, for the engines that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.bench.peers import EngineSpec
from hasten.bench.peers.once import key_of, made_once
from hasten.errors import PeerError


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
