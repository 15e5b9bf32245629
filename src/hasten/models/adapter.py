"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685), merged into a model when it is opened: W + scale * B A.

An adapter is a folder of PEFT (adapter_config.json, adapter_model.safetensors) or a GGUF file of llama.cpp's
convert_lora_to_gguf.py. Merged weights are made when they are read, in float32; recipe `source` keeps them in
bf16. A merged model is another model for everything that is kept: its files are those of both, and the keys
of caches are made from its weights.

Sources: PEFT's LoraConfig and the names of its saved tensors (peft/tuners/lora, peft/utils/save_and_load.py);
`adapter.*` keys of the GGUF specification and llama-adapter.cpp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hasten.cache.reading import is_there
from hasten.core import ModelSpec
from hasten.errors import ModelError
from hasten.models.families import FAMILIES
from hasten.models.families.family import Family, Fields, NameTable
from hasten.models.gguf import GgufFile
from hasten.models.rope import interleaved_rows
from hasten.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source, SourceFile, once, read_json_object
from hasten.weights.packed import finite_values
from hasten.weights.tensors import SourceTensor, open_safetensors

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(\.(?!weight$)[^.]+)?\.weight")
_SAVED = re.compile(r"(\.modules_to_save)?(\.default)?(?=\.(weight|bias)$)")
_PREFIX = "base_model.model."


@dataclass
class _Change:
    """What an adapter does to one tensor of a file: a product is added, or another tensor takes its place."""

    a: SourceTensor | None = None  # [r, in]
    b: SourceTensor | None = None  # [out, r]
    whole: SourceTensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """Changes by the names that the base model's files have."""

    where: str
    changes: Mapping[str, _Change]
    table: NameTable
    files: tuple[SourceFile, ...]
    family: Family
    is_gguf: bool = False
    folder: Path | None = None  # where a tokenizer of its own lies


def with_adapter(source: Source, path: Path) -> Source:
    """A model with an adapter merged into it.

    Args:
        source: the base model, as it was opened, under the name that `locate` gives it with the adapter.
        path: a folder of PEFT, or a GGUF file; absolute.

    Raises:
        ModelError: it is no LoRA adapter, of a kind that is not supported, or of another model.
        FormatError: a file cannot be read as what it claims to be.
    """
    family = FAMILIES[source.config.architecture]
    adapter = _from_folder(path, family) if path.is_dir() else _from_gguf(path, family)
    tensors, spec = dict(source.tensors), source.config
    for name, change in adapter.changes.items():
        for part, own in _by_part(adapter, name, change, spec, tensors):
            spec = _untied(spec, tensors, part)
            if change.whole is not None and part in ("embed", "head"):
                spec = replace(spec, vocab=own.whole.rows if own.whole is not None else spec.vocab)
            tensors[part] = _merged(adapter, part, tensors[part], own, spec)
    for part in ("embed", "head"):
        if part in tensors and tensors[part].rows != spec.vocab:
            raise ModelError(
                f"{adapter.where} gives one of embedding and head {spec.vocab} rows, and not the other",
                hint="the adapter is incomplete: save it with both in modules_to_save",
            )
    load, folder = source.load_tokenizer, adapter.folder
    if folder is not None and spec.vocab != source.config.vocab:
        load = once(lambda: _tokenizer_of(folder))
    return replace(
        source,
        config=spec,
        tensors=tensors,
        files=source.files + adapter.files,
        adapters=(*source.adapters, str(path)),
        load_tokenizer=load,
    )


def _tokenizer_of(folder: Path) -> Tokenizer:
    from hasten.models.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder)


def _untied(spec: ModelSpec, tensors: dict[str, SourceTensor], part: str) -> ModelSpec:
    """The model with a head of its own where an adapter changes a tied one."""
    if part != "head" or not spec.head.tied:
        return spec
    tensors["head"] = replace(tensors["embed"], name="head")
    return replace(spec, head=replace(spec.head, tied=False))


def _by_part(
    adapter: Adapter, name: str, change: _Change, spec: ModelSpec, tensors: Mapping[str, SourceTensor]
) -> Iterator[tuple[str, _Change]]:
    """The parameters that a change is of, each with its own rows.

    Raises:
        ModelError: the model has no such parameter.
    """
    parts = adapter.table.parts(name)
    known = {**tensors, **({"head": tensors["embed"]} if spec.head.tied else {})}
    if parts is None or any(part not in known for part in parts):
        raise ModelError(
            f"{adapter.where} changes {name!r}, which this model does not have",
            hint="the adapter is of another model: look at base_model_name_or_path in its configuration",
        )
    first = 0
    for part in parts:
        count = known[part].rows
        if len(parts) == 1:
            yield part, change
        else:
            b, whole = (
                t.part(t.name, first, count) if t is not None and first + count <= t.rows else None
                for t in (change.b, change.whole)
            )
            yield part, replace(change, b=b, whole=whole)
        first += count


def _merged(
    adapter: Adapter, part: str, base: SourceTensor, change: _Change, spec: ModelSpec
) -> SourceTensor:
    """A base tensor with its change.

    Raises:
        ModelError: the shapes do not fit.
    """
    if change.whole is not None:
        if change.whole.shape != base.shape and part not in ("embed", "head"):
            raise _misfit(adapter, change.whole, base)
        return replace(change.whole, name=part, offset=base.offset)
    a, b = change.a, change.b
    if a is None or b is None or len(base.shape) != 2:
        raise ModelError(f"{adapter.where}: {part} has one half of a product alone", hint="download it again")
    if a.shape[1:] != base.shape[1:] or b.shape != (base.rows, a.rows):
        raise _misfit(adapter, b, base)
    if adapter.is_gguf and adapter.family.is_permuted and part.endswith((".q", ".k")):
        head_dim = spec.blocks[int(part.split(".")[1])].mixer.head_dim
        b = replace(b, row_order=interleaved_rows(base.rows, head_dim))
    scale, up, down = np.float32(change.scale), b, a

    def data() -> npt.NDArray[np.uint8]:
        values = finite_values(base)
        values += (finite_values(up) * scale) @ finite_values(down)
        return values.view(np.uint8).reshape(-1)

    return SourceTensor(part, base.shape, "F32", data)


def _misfit(adapter: Adapter, tensor: SourceTensor, base: SourceTensor) -> ModelError:
    return ModelError(
        f"{adapter.where}: tensor {tensor.name!r} is {list(tensor.shape)}, which does not fit the model's "
        f"{list(base.shape)}",
        hint="the adapter is of another model: look at base_model_name_or_path in its configuration",
    )


def _from_folder(folder: Path, family: Family) -> Adapter:
    """A folder of PEFT.

    Raises:
        ModelError, FormatError: as `with_adapter`.
    """
    where = str(folder)
    options = _options(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not is_there(path):
        pickled = is_there(folder / "adapter_model.bin")
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}" + (", only adapter_model.bin, a pickle" if pickled else ""),
            hint="save it as safetensors: PeftModel.save_pretrained(FOLDER, safe_serialization=True)",
        )
    changes: dict[str, _Change] = {}
    for name, tensor in open_safetensors(path).items():
        _add(changes, name.removeprefix(_PREFIX), tensor, options)
    if not changes:
        raise ModelError(f"{path} holds no tensors", hint="download the adapter again")
    files = tuple(SourceFile(p, p.stat().st_size) for p in (folder / ADAPTER_CONFIG, path))
    own = folder if is_there(folder / "tokenizer.json") else None
    return Adapter(where, changes, family.hf_names, files, family, folder=own)


def _options(path: Path) -> Fields:
    """adapter_config.json, with what is not supported refused by name."""
    if not is_there(path):
        raise ModelError(f"{path.parent} is no adapter: it has no {path.name}", hint="give a folder of PEFT")
    fields = Fields(read_json_object(path), str(path))
    if (kind := fields.text("peft_type", "LORA")) != "LORA":
        raise ModelError(
            f"{path}: an adapter of the kind {kind!r} is not supported",
            hint="LoRA is; merge others with PEFT",
        )
    for key in ("use_dora", "fan_in_fan_out", "alora_invocation_tokens", "arrow_config"):
        if fields.get(key):
            raise ModelError(
                f"{path}: {key} is not supported", hint="merge it: PeftModel.merge_and_unload() of PEFT"
            )
    return fields


def _add(changes: dict[str, _Change], name: str, tensor: SourceTensor, options: Fields) -> None:
    """One tensor of adapter_model.safetensors.

    Raises:
        ModelError: it is of a kind that is not supported; it is named.
    """
    found = _PAIR.fullmatch(name)
    if found is not None:
        change = changes.setdefault(f"{found['module']}.weight", _Change())
        if found["half"] == "B":
            change.b = tensor
            return
        change.a = tensor
        change.scale = _scale(options, found["module"], tensor.rows)
    elif "lora_" in name:
        raise ModelError(
            f"{options.where}: tensor {name!r} is of a kind of LoRA that is not supported",
            hint="merge it: PeftModel.merge_and_unload() of PEFT",
        )
    else:
        changes.setdefault(_SAVED.sub("", name.replace(".base_layer.", ".")), _Change()).whole = tensor


def _scale(options: Fields, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; a module may have an alpha of its own."""
    own = options.mapping("alpha_pattern")
    alpha = next((v for key, v in own.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
    value = float(options.number("lora_alpha", 8.0) if alpha is None else alpha)
    return value / (math.sqrt(rank) if options.flag("use_rslora") else rank)


def _from_gguf(path: Path, family: Family) -> Adapter:
    """A GGUF file of an adapter.

    Raises:
        ModelError, FormatError: as `with_adapter`.
    """
    file = GgufFile.open(path)
    kind, architecture = (file.metadata.text(key) for key in ("adapter.type", "general.architecture"))
    if kind != "lora" or architecture != family.gguf:
        raise ModelError(
            f"{path} is no LoRA adapter of a {family.gguf} model: adapter.type is {kind!r}, "
            f"general.architecture {architecture!r}",
            hint="give an adapter that was made for this model",
        )
    alpha = Fields(file.metadata, str(path)).number("adapter.lora.alpha", 0.0, low=-1.0)
    changes: dict[str, _Change] = {}
    for name, tensor in file.tensors.items():
        stem, _, half = name.rpartition(".lora_")
        if half not in ("a", "b"):
            raise ModelError(
                f"{path}: tensor {name!r} is no part of a LoRA adapter", hint="download it again"
            )
        change = changes.setdefault(stem, _Change())
        if half == "a":
            change.a, change.scale = tensor, (alpha / tensor.rows if alpha else 1.0)
        else:
            change.b = tensor
    files = (SourceFile(path, path.stat().st_size),)
    return Adapter(str(path), changes, family.gguf_names, files, family, is_gguf=True)
