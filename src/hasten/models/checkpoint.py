"""A safetensors checkpoint: one file, or several with an index that says which tensor is where."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.cache.reading import NotAFile, is_there, open_file
from hasten.errors import FormatError, ModelError
from hasten.models.mapped import NOT_A_FILE_HINT
from hasten.models.safetensors_file import open_safetensors
from hasten.models.source import SourceTensor

INDEX = "model.safetensors.index.json"
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by the files' own names, and the files."""

    tensors: dict[str, SourceTensor]
    files: tuple[Path, ...]


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        ModelError: it is missing or may not be read.
        FormatError: it holds something else.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_JSON_BYTES:
                raise FormatError(f"{path}: {size} bytes are too many for a configuration")
            value = json.loads(file.read())
    except NotAFile as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=NOT_A_FILE_HINT) from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=f"check it: ls -l {path}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON: {error!s:.100}", hint="download it again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold an object, got {type(value).__name__}")
    return value


def open_checkpoint(folder: Path, integers: bool = False) -> Checkpoint:
    """Map the checkpoint of a folder: by its index, as model.safetensors, or its only .safetensors file.

    Args:
        folder: where it lies.
        integers: whether it may hold tensors of integers, as a quantised one does.

    Raises:
        ModelError: there is none, a file is missing, or a tensor is in two files.
        FormatError: a file cannot be read as what it claims to be, or contradicts the index.
    """
    index = folder / INDEX
    if is_there(index):
        return _sharded(folder, index, integers)
    single = folder / "model.safetensors"
    found = [single] if is_there(single) else sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return Checkpoint(open_safetensors(found[0], integers), (found[0],))
    if found:
        raise ModelError(f"{folder} has {len(found)} .safetensors files and no {INDEX}", hint="add the index")
    others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
    raise ModelError(
        f"{folder} has no .safetensors file" + (f", only {others[0]}" if others else ""),
        hint="save the model with model.save_pretrained(folder), which writes safetensors",
    )


def _sharded(folder: Path, index: Path, integers: bool) -> Checkpoint:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(v, str) for v in names.values()):
        raise FormatError(f"{index}: weight_map must map tensor names to file names")
    shards = sorted(set(names.values()))
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise FormatError(f"{index}: {shard!r} is no name of a file beside it")
        for name, tensor in open_safetensors(folder / shard, integers).items():
            if name in tensors:
                raise ModelError(f"{folder}: tensor {name!r} is in two files, the second is {shard}")
            if names.get(name) != shard:
                raise FormatError(
                    f"{index}: tensor {name!r} is in {shard}, the index says {names.get(name)!r}"
                )
            tensors[name] = tensor
    missing = [name for name in names if name not in tensors]
    if missing:
        raise FormatError(f"{index}: tensor {missing[0]!r} is not in {names[missing[0]]}")
    return Checkpoint(tensors, tuple(folder / shard for shard in shards))
