"""`--to gguf`: one file for llama.cpp and what is built on it, tokenizer and chat template included.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the tensor
names and row orders of llama.cpp's converter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten.cache import write_atomic
from hasten.compress import export_gguf_blocks as blocks
from hasten.compress import export_gguf_tokenizer as words
from hasten.compress.export_gguf_config import Factors, config_metadata, refuse
from hasten.compress.export_result import Exported, Progress, Rounding
from hasten.models.artifact import Artifact
from hasten.models.families import FAMILIES
from hasten.models.gguf import MAGIC
from hasten.models.open import interleaved_rows
from hasten.weights.packed import PackedLinear, PackedModel, row_pieces
from hasten.weights.tensors import TYPES

_ALIGN = 32  # general.alignment's default
_VERSION = 3
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # value types of the specification


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: whose rows it holds, one parameter's after another's."""

    name: str
    kind: str
    parts: tuple[str, ...]  # canonical names
    rows: int
    cols: int  # 0: a vector of `rows`

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.cols) if self.cols else (self.rows,)

    @property
    def bytes(self) -> int:
        return TYPES[self.kind].bytes_of(self.shape)


@dataclass(frozen=True)
class GgufPlan:
    """Everything about the file but the weights' bytes."""

    artifact: Artifact
    metadata: dict[str, Any]
    tensors: tuple[_Tensor, ...]
    factors: Factors
    notes: tuple[str, ...]


def plan(artifact: Artifact) -> GgufPlan:
    """Decide what the file will hold; reads no weights.

    Raises:
        UsageError, TokenizerError: the format cannot carry something of the model.
    """
    packed, config = artifact.packed, artifact.packed.config
    biases = packed.config.biases
    metadata, factors = config_metadata(config, biases, artifact.name)
    spoken = words.tokenizer_metadata(artifact.tokenizer, artifact.folder, config.vocab_size)
    metadata |= spoken
    notes = words.check(artifact.tokenizer, metadata)
    return GgufPlan(artifact, metadata, _tensors(packed), factors, notes)


def write(plan: GgufPlan, path: Path, progress: Progress) -> Exported:
    """Write the file: all of it or nothing.

    Raises:
        DiskError: full, read-only or forbidden disk.
        UsageError: a value that fits no type of the format.
    """
    rounding: list[Rounding] = []

    def put(file: BinaryIO) -> None:
        header = _header(plan)
        file.write(header + bytes(-len(header) % _ALIGN))
        for done, tensor in enumerate(plan.tensors):
            progress(done, len(plan.tensors))
            loss = _write_tensor(file, plan.artifact.packed, tensor)
            if not blocks.is_exact(tensor.kind):
                rounding.append(Rounding(tensor.name, tensor.kind, loss))
            file.write(bytes(-tensor.bytes % _ALIGN))
        for values in plan.factors.values():
            file.write(values.tobytes() + bytes(-values.nbytes % _ALIGN))

    write_atomic(path, put)
    kinds = [tensor.kind for tensor in plan.tensors if tensor.cols]
    carried = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return Exported("gguf", path, path.stat().st_size, carried, tuple(rounding), plan.notes)


def _tensors(packed: PackedModel) -> tuple[_Tensor, ...]:
    """The file's tensors in the file's order; Phi-3's fused ones take a type that carries all their parts."""
    config = packed.config
    is_phi = config.architecture == "phi3"
    table = FAMILIES[config.architecture].gguf_names
    modules = [(f"{name}", parts) for name, parts in table.top.items()]
    for layer in range(config.num_layers):
        modules += [
            (f"blk.{layer}.{name}", tuple(f"layers.{layer}.{part}" for part in parts))
            for name, parts in table.block.items()
            if (name != "attn_qkv" and not (is_phi and name in ("attn_q", "attn_k", "attn_v", "ffn_gate")))
            or (is_phi and name == "attn_qkv")
        ]
    found = []
    for name, parts in modules:
        if all(part in packed.linears for part in parts):
            found.append(_matrix(f"{name}.weight", parts, [packed.linears[part] for part in parts]))
        elif parts[0] in packed.vectors:
            found.append(_Tensor(f"{name}.weight", "F32", parts, len(packed.vectors[parts[0]]), 0))
        biases = tuple(f"{part}.bias" for part in parts)
        if all(bias in packed.vectors for bias in biases):
            rows = sum(len(packed.vectors[bias]) for bias in biases)
            found.append(_Tensor(f"{name}.bias", "F32", biases, rows, 0))
    left = {*packed.linears, *packed.vectors} - {part for tensor in found for part in tensor.parts}
    assert not left, left
    return tuple(found)


def _matrix(name: str, parts: tuple[str, ...], linears: Sequence[PackedLinear]) -> _Tensor:
    cols = linears[0].cols
    kind = blocks.carrier([linear.layout for linear in linears], cols)
    return _Tensor(name, kind, parts, sum(linear.rows for linear in linears), cols)


def _header(plan: GgufPlan) -> bytes:
    infos = [(t.name, t.shape, t.kind, t.bytes) for t in plan.tensors]
    infos += [(name, values.shape, "F32", values.nbytes) for name, values in plan.factors.items()]
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(infos), len(plan.metadata))]
    parts += [_string(key) + _value(value) for key, value in plan.metadata.items()]
    at = 0
    for name, shape, kind, size in infos:
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_string(name) + dims + struct.pack("<IQ", TYPES[kind].ggml_id, at))
        at += -(-size // _ALIGN) * _ALIGN
    return b"".join(parts)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = _F32 if value.dtype == np.float32 else _I32
        assert value.dtype in (np.float32, np.int32)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))


def _write_tensor(file: BinaryIO, packed: PackedModel, tensor: _Tensor) -> float:
    """Write all rows; gives the relative rounding error."""
    lost = squares = 0.0
    for part in tensor.parts:
        order = _row_order(part, packed)
        if not tensor.cols:
            values = packed.vectors[part]
            file.write(np.ascontiguousarray(values if order is None else values[order]).data)
            continue
        linear = packed.linears[part]
        pieces = [(0, linear.rows)] if order is not None else row_pieces(linear)
        for first, count in pieces:
            try:
                data, error, square = blocks.encoded(linear, tensor.kind, first, count)
            except OverflowError:
                raise refuse(part, "a value is larger than F16's 65504") from None
            file.write(np.ascontiguousarray(data if order is None else data[order]).data)
            lost, squares = lost + error, squares + square
    return (lost / squares) ** 0.5 if squares else 0.0


def _row_order(part: str, packed: PackedModel) -> npt.NDArray[np.int64] | None:
    """Which row of ours is each row of the file's: q and k of llama lie for interleaved rotation."""
    config = packed.config
    name = part.split(".")[2] if part.startswith("layers.") else ""
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    if name not in ("q", "k") or not FAMILIES[architecture].is_permuted:
        return None
    heads = config.num_heads if name == "q" else config.num_kv_heads
    return np.argsort(interleaved_rows(heads * config.head_dim, config.head_dim))
