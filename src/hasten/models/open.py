"""Opening a model, whatever it comes as."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.cache.reading import is_there
from hasten.core import ModelSpec
from hasten.errors import FormatError, ModelError
from hasten.models.families import FAMILIES, gguf_spec, hf_spec
from hasten.models.families.decoder import token_ids
from hasten.models.families.family import Fields, NameTable
from hasten.models.gguf import GgufFile, model_name, models_in, open_parts, other_kind
from hasten.models.hub import has_safetensors
from hasten.models.quantized import Quantization, merged
from hasten.models.quantized_formats import KEYS, quantization_of, without_quantization
from hasten.models.rope import interleaved_rows
from hasten.models.source import ADAPTER_CONFIG, Place, Source, SourceFile, locate, once, read_json_object
from hasten.weights.tensors import INTEGERS, SourceTensor, open_safetensors

Shapes = Mapping[str, tuple[int, ...]]
_log = logging.getLogger("hasten.models")

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


def open_model(ref: str | Path) -> Source:
    """Open a model without reading its weights.

    Args:
        ref: a folder with config.json and safetensors; a .gguf file; a hub id ("Qwen/Qwen3-0.6B") or a file
            of one ("Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf", "Qwen/Qwen3-0.6B-GGUF:Q8_0"); or "demo".
            What is on disk comes first. Behind any of them "+lora:PATH" merges a LoRA adapter.

    Raises:
        ModelError: there is no such model, or it is incomplete or of a kind that is not supported.
        FormatError: a file cannot be read as the format it claims to be.
    """
    return open_place(locate(ref))


def open_place(place: Place) -> Source:
    """Open a model that was located.

    Raises:
        ModelError, FormatError: as `open_model`.
    """
    source = open_folder(place.path) if place.path.is_dir() else open_gguf(place.path)
    files = source.files if place.known is None else (place.known,)
    source = replace(source, name=place.name, files=files)
    for adapter in place.adapters:
        from hasten.models.adapter import with_adapter

        source = with_adapter(source, adapter)
    return source


def open_gguf(path: Path) -> Source:
    """Open a GGUF file, with the parts beside it where it is one part of a split model.

    Raises:
        ModelError, FormatError: as `open_model`.
    """
    file, paths = open_parts(path)
    files = tuple(SourceFile(part, part.stat().st_size) for part in paths)
    return gguf_source(file, model_name(path), files)


def gguf_source(file: GgufFile, name: str, files: tuple[SourceFile, ...]) -> Source:
    """A model from a parsed GGUF file.

    Raises:
        ModelError, FormatError: as `open_model`.
    """
    wrong = other_kind(file)
    if wrong is not None:
        raise wrong
    spec = gguf_spec(file.metadata, file.tensors, file.name)
    family = FAMILIES[spec.architecture]
    tensors, unused = fill(file.tensors, family.gguf_names, spec.parameter_shapes(), file.name)
    if family.is_permuted:
        tensors = {key: _unpermuted(tensor, spec) for key, tensor in tensors.items()}

    def load() -> Tokenizer:
        from hasten.models.tokenizer import Tokenizer

        return Tokenizer.from_gguf(file.metadata)

    general = {key: file.metadata[key] for key in file.metadata if key.startswith("general.")}
    return Source(name, spec, tensors, files, unused, once(load), metadata=general)


def _unpermuted(tensor: SourceTensor, spec: ModelSpec) -> SourceTensor:
    """Give q and k (and their biases) the row order that undoes llama.cpp's permutation."""
    _, layer, part, *_ = *tensor.name.split("."), "", ""
    if part not in ("q", "k"):
        return tensor
    return replace(tensor, row_order=interleaved_rows(tensor.rows, spec.blocks[int(layer)].mixer.head_dim))


def open_folder(folder: Path) -> Source:
    """Open a folder of config.json and safetensors, or one that holds a single GGUF file.

    Raises:
        ModelError, FormatError: as `open_model`.
    """
    if is_there(folder / "plan.json"):
        raise ModelError(
            f"{folder} is an artifact of this program, not a source model",
            hint=f"run it: hasten generate {folder} -p TEXT; to optimize, give the model it was made from",
        )
    if not has_safetensors(folder):
        ggufs = models_in(folder)
        if len(ggufs) == 1:
            return open_gguf(ggufs[0])
        if ggufs:
            names = ", ".join(p.name for p in ggufs[:4])
            raise ModelError(f"{folder} has {len(ggufs)} GGUF files: {names}", hint=f"name one: {ggufs[0]}")
    if not is_there(folder / "config.json"):
        raise _no_model(folder)
    where = str(folder / "config.json")
    values = _with_side_file(read_json_object(folder / "config.json"), folder)
    quantization = quantization_of(values, where)
    checkpoint = open_checkpoint(folder)
    config, tensors, unused = _read_folder(folder, values, checkpoint, quantization)

    def load() -> Tokenizer:
        from hasten.models.tokenizer import Tokenizer

        return Tokenizer.from_folder(folder)

    files = tuple(SourceFile(path, path.stat().st_size) for path in checkpoint.files)
    return Source(folder.resolve().name, config, tensors, files, unused, once(load))


def _no_model(folder: Path) -> ModelError:
    """What a folder without config.json is, as far as its files tell."""
    if is_there(folder / ADAPTER_CONFIG):
        base = read_json_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        shown = base if isinstance(base, str) and base else "BASE"
        return ModelError(
            f"{folder} is a LoRA adapter, a change to another model: {shown}",
            hint=f"open that model with it: hasten generate {shown} --adapter {folder} -p TEXT",
        )
    pickles = _pickles(folder)
    if pickles:
        return ModelError(f"{folder} has no config.json, only {pickles[0]}", hint=_PICKLE_HINT)
    if is_there(folder / "params.json") or next(folder.glob("consolidated*"), None) is not None:
        return ModelError(
            f"{folder} has no config.json: its publisher's own form (params.json, consolidated files)",
            hint="give the folder in Hugging Face's form, or convert it: convert_llama_weights_to_hf.py of "
            "transformers",
        )
    inside = next((one.parent for one in sorted(folder.glob("*/config.json"))), None)
    return ModelError(
        f"{folder} is no model folder: it has no config.json",
        hint=f"a folder in it has one: give {inside}"
        if inside is not None
        else "give a folder with config.json and model.safetensors, or a .gguf file",
    )


_PICKLE_HINT = (
    "a pickle may run any program when it is opened, so none is read here. Convert it where you trust it: "
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').save_pretrained('FOLDER', safe_serialization=True)\"; or take the model's "
    "safetensors or GGUF files"
)


def _pickles(folder: Path) -> list[str]:
    """Files of a folder that hold weights as pickles."""
    return sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(kind))


def _read_folder(
    folder: Path, values: Mapping[str, Any], checkpoint: Checkpoint, quantization: Quantization | None
) -> tuple[ModelSpec, dict[str, SourceTensor], tuple[str, ...]]:
    where = str(folder / "config.json")
    found = checkpoint.tensors
    embed = next((t.dtype for n, t in found.items() if n.endswith("embed_tokens.weight")), "BF16")
    spec = hf_spec(without_quantization(values) if quantization else values, where, embed)
    spec = _with_generation_ids(spec, folder / "generation_config.json")
    family, shapes = FAMILIES[spec.architecture], spec.parameter_shapes()
    spare: tuple[str, ...] = ()
    if quantization is not None:
        names = family.hf_names
        found, spare = merged(quantization, found, lambda name: _is_one_of(name, names, shapes), str(folder))
    spec = _with_own_head(spec, family.hf_names, found, str(folder))
    tensors, unused = fill(found, family.hf_names, spec.parameter_shapes(), str(folder))
    if family.stored_less_one:
        tensors = {k: replace(t, offset=1.0) if k.endswith("norm") else t for k, t in tensors.items()}
    return spec, tensors, unused + spare


def _with_own_head(
    spec: ModelSpec, table: NameTable, tensors: Mapping[str, SourceTensor], where: str
) -> ModelSpec:
    """The model with a head of its own, where the configuration ties it and the file holds another one.

    Fine-tunes and quantisers write such files; transformers 5 goes by the tensors too. Equal copies are not
    used twice. Reads both matrices as far as they are equal.
    """
    if not spec.head.tied:
        return spec
    by_part = {parts: t for name, t in tensors.items() if (parts := table.parts(name)) is not None}
    head, embed = by_part.get(("head",)), by_part.get(("embed",))
    if head is None or embed is None or _equal(head, embed):
        return spec
    _log.warning(
        "%s: tie_word_embeddings is true, and %r differs from the embedding: the file's own head is used",
        where, head.name,
    )  # fmt: skip
    return replace(spec, head=replace(spec.head, tied=False))


def _equal(one: SourceTensor, other: SourceTensor) -> bool:
    """Whether two tensors hold the same bytes of one type; stops at the first difference."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    ours, theirs, step = one.data, other.data, 1 << 22
    return all(
        np.array_equal(ours[at : at + step], theirs[at : at + step]) for at in range(0, len(ours), step)
    )


def _is_one_of(name: str, table: NameTable, shapes: Shapes) -> bool:
    """Whether a file's tensor fills parameters that the model has."""
    return all(part in shapes for part in table.parts(name) or ("",))


def _with_generation_ids(spec: ModelSpec, path: Path) -> ModelSpec:
    """Add the end-of-text ids of generation_config.json, where chat models keep their end of turn."""
    if not is_there(path):
        return spec
    more = token_ids(Fields(read_json_object(path), str(path)), "eos_token_id")
    return replace(spec, eos_token_ids=tuple(dict.fromkeys(spec.eos_token_ids + more)))


def _with_side_file(values: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The configuration, and the quantisation that early GPTQ tools wrote to a file of its own.

    Raises:
        ModelError, FormatError: that file is there and cannot be read.
    """
    side = folder / "quantize_config.json"
    if any(values.get(key) not in (None, {}) for key in KEYS) or not is_there(side):
        return values
    return {**values, KEYS[0]: {"quant_method": "gptq", **read_json_object(side)}}


INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by the files' own names, and the files."""

    tensors: dict[str, SourceTensor]
    files: tuple[Path, ...]


_UNFINISHED = (".incomplete", ".part", ".aria2", ".crdownload", ".download", ".tmp", ".lock")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Map the checkpoint of a folder: by its index, as model.safetensors, or its only .safetensors file.

    Shards whose names say how many there are need no index. Tensors may be of integers, which parts of
    quantised checkpoints and masks are: whoever fills a parameter with one looks at its type.

    Raises:
        ModelError: there is none, a file is missing, or a tensor is in two files.
        FormatError: a file cannot be read as what it claims to be, or contradicts the index.
    """
    index = folder / INDEX
    if is_there(index):
        return _sharded(folder, index)
    single = folder / "model.safetensors"
    found = [single] if is_there(single) else sorted(folder.glob("*.safetensors"))
    shards = _shards_by_name(folder, found)
    if shards:
        return _joined(shards)
    if len(found) == 1:
        return Checkpoint(open_safetensors(found[0], integers=True), (found[0],))
    if found:
        raise ModelError(f"{folder} has {len(found)} .safetensors files and no {INDEX}", hint="add the index")
    others = _pickles(folder)
    if others:
        raise ModelError(f"{folder} has no .safetensors file, only {others[0]}", hint=_PICKLE_HINT)
    begun = next((p.name for p in sorted(folder.iterdir()) if p.suffix in _UNFINISHED), None)
    if begun is not None:
        raise ModelError(
            f"{folder} has no .safetensors file, but a download that was not finished: {begun}",
            hint="start the download again",
        )
    raise ModelError(
        f"{folder} has no .safetensors file",
        hint="save the model with model.save_pretrained(folder), which writes safetensors",
    )


def _shards_by_name(folder: Path, found: Sequence[Path]) -> list[Path]:
    """All shards, where all files are some of one checkpoint by their names; [] where they are not.

    Raises:
        ModelError: one is missing; it is named.
    """
    names = [_SHARD.fullmatch(path.name) for path in found]
    kinds = {(name["stem"], name["count"]) for name in names if name is not None}
    if None in names or len(kinds) != 1:
        return []
    stem, count = kinds.pop()
    shards = [folder / f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    missing = [shard.name for shard in shards if shard not in found]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(
            f"{folder} has {len(found)} of {int(count)} files of a checkpoint: {shown} missing",
            hint="the download was cut off: start it again",
        )
    return shards


def _joined(shards: Sequence[Path]) -> Checkpoint:
    tensors: dict[str, SourceTensor] = {}
    for shard in shards:
        for name, tensor in open_safetensors(shard, integers=True).items():
            if name in tensors:
                raise FormatError(f"{shard}: tensor {name!r} is in another file of the checkpoint too")
            tensors[name] = tensor
    return Checkpoint(tensors, tuple(shards))


def _sharded(folder: Path, index: Path) -> Checkpoint:
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(v, str) for v in names.values()):
        raise FormatError(f"{index}: weight_map must map tensor names to file names")
    names = {name: shard.removeprefix("./") for name, shard in names.items()}
    shards = sorted(set(names.values()))
    tensors: dict[str, SourceTensor] = {}
    stray: list[str] = []
    for shard in shards:
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise FormatError(f"{index}: {shard!r} is no name of a file beside it")
        for name, tensor in open_safetensors(folder / shard, integers=True).items():
            if names.get(name) != shard:  # another model's, or an older one's
                stray.append(f"{name} in {shard}")
                continue
            tensors[name] = tensor
    missing = [name for name in names if name not in tensors]
    if missing:
        raise FormatError(f"{index}: tensor {missing[0]!r} is not in {names[missing[0]]}")
    if stray:
        _log.warning("%s: the index does not name %d tensors (%s): they are left out", folder, len(stray),
                     ", ".join(stray[:2]))  # fmt: skip
    return Checkpoint(tensors, tuple(folder / shard for shard in shards))


def fill(
    tensors: Mapping[str, SourceTensor], table: NameTable, shapes: Shapes, where: str
) -> tuple[dict[str, SourceTensor], tuple[str, ...]]:
    """Match the tensors of a file with the parameters of a model; fused ones are split by rows.

    Args:
        tensors: by the file's names.
        table: what those names mean.
        shapes: the parameters, as `ModelSpec.parameter_shapes` gives them.
        where: what errors call the file.

    Returns:
        (tensors by canonical name, file names of the unused)

    Raises:
        ModelError: a tensor is missing, extra, misshapen or there twice; it is named.
    """
    filled: dict[str, SourceTensor] = {}
    unused: list[str] = []
    extra: list[str] = []
    for name, tensor in tensors.items():
        parts = table.parts(name)
        is_tied_head = parts == ("head",) and "head" not in shapes
        if is_tied_head or table.ignores(name):
            unused.append(name)
        elif parts is None or any(part not in shapes for part in parts):
            _check_type(tensor, where)
            extra.append(name)
        else:
            _place(filled, tensor, parts, shapes, where)
    if extra:
        raise ModelError(
            f"{where}: {_listed(extra, 'tensor')} not part of this architecture",
            hint="the file holds another model than its configuration says, or an unsupported feature",
        )
    missing = [name for name in shapes if name not in filled]
    if missing:
        raise ModelError(
            f"{where}: {_listed(missing, 'parameter')} missing",
            hint=_HEADLESS_HINT if missing == ["head"] else "the checkpoint is incomplete: download it again",
        )
    return filled, tuple(unused)


_HEADLESS_HINT = (
    "the checkpoint holds a decoder without its head (lm_head), as models that embed texts have it. If the "
    'head is the embedding, say so in config.json: "tie_word_embeddings": true'
)


def _place(
    filled: dict[str, SourceTensor], tensor: SourceTensor, parts: tuple[str, ...], shapes: Shapes, where: str
) -> None:
    """Put one tensor, or each part of a fused one, where it belongs."""
    rows = sum(shapes[part][0] for part in parts)
    wanted = (rows, *shapes[parts[0]][1:])
    if tensor.shape != wanted:
        raise ModelError(
            f"{where}: tensor {tensor.name!r} must be {list(wanted)}, got {list(tensor.shape)}",
            hint="the file does not belong to its configuration",
        )
    _check_type(tensor, where)
    first = 0
    for part in parts:
        if part in filled:
            raise ModelError(f"{where}: {part!r} is there twice, the second time as {tensor.name!r}")
        count = shapes[part][0]
        filled[part] = tensor.part(part, first, count)
        first += count


def _check_type(tensor: SourceTensor, where: str) -> None:
    if tensor.dtype in INTEGERS:
        raise FormatError(
            f"{where}: tensor {tensor.name!r} has type {tensor.dtype!r}, which is not supported",
            hint="supported types: F32, F16, BF16; convert the checkpoint to bf16",
        )


def _listed(names: list[str], noun: str) -> str:
    """`tensor 'a' is`, or `12 tensors ('a', 'b', 'c', ...) are`."""
    if len(names) == 1:
        return f"{noun} {names[0]!r} is"
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names)} {noun}s ({shown}{', ...' if len(names) > 3 else ''}) are"
