"""`--to gguf`: one file for llama.cpp and what is built on it, tokenizer and chat template included.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and the tensor
names and row orders of llama.cpp's converter.

Integer layouts keep their integers, scales and minimums:

    4 bits  Q4_0, with a minimum Q4_1      6 and 8 bits  Q8_0 (more bytes for 6 bits, the same values)
    5 bits  Q5_0, with a minimum Q5_1      bf16          BF16

A group of 64 or 128 becomes blocks of 32 that repeat its scale. What no type carries (groups of 16, 6 or 8
bits with a minimum) is rounded to F16, and rows that blocks of 32 do not divide go as F32, exactly.

`--to gguf:q4_k_m` and the other names of `FILE_TYPES` round the weights to the types that llama.cpp's file
of this name has; scales are found by a search of our own, for the least squared error.

Source: ggml's block structures and dequantize_row functions (ggml-common.h, ggml-quants.c); of the mixtures,
llama.cpp's llama-quant.cpp.

The metadata is the inverse of hasten.models.families.decoder, and is checked by it.
Whatever the format or llama.cpp has no word for (a sliding window in a llama, soft caps, dynamic rope) comes
back different from the check, and is refused by name before a byte is written.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import write_atomic
from hasten.core import Format, ModelSpec, RopeScaling, Rotary
from hasten.errors import HastenError, UsageError
from hasten.export import Exported, Loss, Progress, Rounding, difference, floats_of
from hasten.export import gguf_tokenizer as words
from hasten.machine.cores import usable_cores
from hasten.models import rope
from hasten.models.artifact import Artifact
from hasten.models.families import FAMILIES, gguf_spec
from hasten.models.gguf import MAGIC, GgufMetadata
from hasten.models.rope import interleaved_rows
from hasten.weights.codec import Encoded
from hasten.weights.packed import PackedLinear, PackedModel, bf16_bits, integers, pack_linear, row_pieces
from hasten.weights.tensors import TYPES, SourceTensor

_ALIGN = 32  # general.alignment's default
_VERSION = 3
_BF16 = 32  # llama.cpp's llama_ftype MOSTLY_BF16; of mixed files no number is true
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # value types of the specification


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: whose rows it holds, one parameter's after another's."""

    name: str
    kind: str
    parts: tuple[str, ...]  # canonical names
    rows: int
    cols: int  # 0: a vector of `rows`
    is_rounded: bool = False  # its type is not the one that keeps the values

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


def plan(artifact: Artifact, type: str = "") -> GgufPlan:
    """See `hasten.export.Format`; `type`: a key of `FILE_TYPES`, or "" to keep the values."""
    config = artifact.packed.config
    metadata, factors = config_metadata(config, artifact.name)
    metadata |= words.tokenizer_metadata(artifact.tokenizer, artifact.folder, config.vocab)
    notes, tensors = words.check(artifact.tokenizer, metadata), _tensors(artifact.packed)
    if type:
        metadata["general.file_type"] = FILE_TYPES[type].number
        tensors = tuple(as_type(tensor, type, config) for tensor in tensors)
        notes += _fallen(tensors, type, config)
    return GgufPlan(artifact, metadata, tensors, factors, notes)


def write(plan: GgufPlan, path: Path, progress: Progress) -> Exported:
    rounding: list[Rounding] = []

    def put(file: BinaryIO) -> None:
        header = _header(plan)
        file.write(header + bytes(-len(header) % _ALIGN))
        for done, tensor in enumerate(plan.tensors):
            progress(done, len(plan.tensors))
            loss = _write_tensor(file, plan.artifact.packed, tensor)
            if tensor.kind == "F16" or tensor.is_rounded:
                rounding.append(Rounding(tensor.name, tensor.kind, loss.relative))
            file.write(bytes(-tensor.bytes % _ALIGN))
        for values in plan.factors.values():
            file.write(values.tobytes() + bytes(-values.nbytes % _ALIGN))

    write_atomic(path, put)
    kinds = [tensor.kind for tensor in plan.tensors if tensor.cols]
    return Exported.of("gguf", path, kinds, plan.notes, rounding)


def _tensors(packed: PackedModel) -> tuple[_Tensor, ...]:
    """The file's tensors in the file's order; Phi-3's fused ones take a type that carries all their parts."""
    config = packed.config
    is_phi = config.architecture == "phi3"
    table = FAMILIES[config.architecture].gguf_names
    modules = [(f"{name}", parts) for name, parts in table.top.items()]
    for layer in range(len(config.blocks)):
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
    kind = carrier([linear.layout for linear in linears], cols)
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


def _write_tensor(file: BinaryIO, packed: PackedModel, tensor: _Tensor) -> Loss:
    """Write all rows; gives what rounding lost."""
    loss = Loss()
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
                data = (rounded if tensor.is_rounded else encoded)(linear, tensor.kind, first, count, loss)
            except OverflowError as large:
                raise refuse(part, str(large)) from None
            file.write(np.ascontiguousarray(data if order is None else data[order]).data)
    return loss


def _row_order(part: str, packed: PackedModel) -> npt.NDArray[np.int64] | None:
    """Which row of ours is each row of the file's: q and k of llama lie for interleaved rotation."""
    config, mixer = packed.config, packed.config.blocks[0].mixer
    name = part.split(".")[2] if part.startswith("layers.") else ""
    architecture = "llama" if config.architecture == "mistral" else config.architecture
    if name not in ("q", "k") or not FAMILIES[architecture].is_permuted:
        return None
    heads = mixer.heads if name == "q" else mixer.kv_heads
    return np.argsort(interleaved_rows(heads * mixer.head_dim, mixer.head_dim))


BLOCK = 32
Bytes = npt.NDArray[np.uint8]
_BY_BITS = {4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}
_WITH_MINIMUM = {4: "Q4_1", 5: "Q5_1"}
_BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_LAYOUTS: dict[str, tuple[int, int, bool]] = {
    "Q4_0": (4, BLOCK, True), "Q4_1": (4, BLOCK, False), "Q5_0": (5, BLOCK, True), "Q5_1": (5, BLOCK, False),
    "Q8_0": (8, BLOCK, True), "BF16": (16, BLOCK, True),
}  # fmt: skip
"""The layout that a type keeps as it is."""


def carrier(layouts: Sequence[Format], cols: int) -> str:
    """The smallest GGUF type that carries all of some layouts; several where a tensor is made of several.

    All but "F16" keep every value.
    """
    if all(layout.bits == 16 for layout in layouts):
        return "BF16"
    if cols % BLOCK:
        return "F32"
    blocked = all(layout.bits != 16 and layout.group % BLOCK == 0 for layout in layouts)
    most = max(layout.bits for layout in layouts)
    if blocked and all(layout.symmetric for layout in layouts):
        return _BY_BITS[most]
    if blocked and not any(layout.symmetric for layout in layouts) and len({x.bits for x in layouts}) == 1:
        return _WITH_MINIMUM.get(most, "F16")
    return "F16"


@dataclass(frozen=True)
class FileType:
    """What llama.cpp's file of a name holds: one type for most matrices, a better one where it pays."""

    number: int  # llama_ftype
    kind: str
    head: str  # of the output matrix, also where it is the embedding
    better: str = ""  # of values and of what comes back from the feed-forward layer, in some layers
    fused: str = ""  # of q, k and v in one matrix
    is_small: bool = False  # fewer layers have better ones

    def kind_of(self, tensor: _Tensor, config: ModelSpec) -> str:
        """The type of a matrix whose rows have a length that its blocks divide."""
        head = "token_embd.weight" if config.head.tied else "output.weight"
        if tensor.name == head:
            return self.head
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if part == "attn_qkv" and self.fused:
            return self.fused
        if part not in ("attn_v", "ffn_down") or not self.better:
            return self.kind
        layer, layers = int(tensor.name.split(".")[1]), len(config.blocks)
        is_better = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        if self.is_small:
            is_better = layer < (4 if part == "attn_v" else layers // 8)
        return self.better if is_better else self.kind


FILE_TYPES = {
    "q4_0": FileType(2, "Q4_0", "Q6_K"),
    "q4_1": FileType(3, "Q4_1", "Q6_K"),
    "q8_0": FileType(7, "Q8_0", "Q8_0"),
    "q5_0": FileType(8, "Q5_0", "Q6_K"),
    "q5_1": FileType(9, "Q5_1", "Q6_K"),
    "q4_k_s": FileType(14, "Q4_K", "Q6_K", "Q5_K", is_small=True),
    "q4_k_m": FileType(15, "Q4_K", "Q6_K", "Q6_K", "Q5_K"),
    "q5_k_s": FileType(16, "Q5_K", "Q6_K"),
    "q5_k_m": FileType(17, "Q5_K", "Q6_K", "Q6_K", "Q6_K"),
    "q6_k": FileType(18, "Q6_K", "Q6_K"),
    "bf16": FileType(_BF16, "BF16", "BF16"),
}
"""The types that weights can be rounded to."""
_FALLS_TO = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # where blocks of 256 do not divide the rows


def as_type(tensor: _Tensor, type: str, config: ModelSpec) -> _Tensor:
    """The tensor as a file of that type has it: one of `FILE_TYPES`. Vectors stay F32."""
    kind = FILE_TYPES[type].kind_of(tensor, config)
    if tensor.cols % TYPES[kind].block:
        kind = _FALLS_TO.get(kind, kind)
    if tensor.cols == 0 or tensor.cols % TYPES[kind].block or kind == tensor.kind:
        return tensor
    return replace(tensor, kind=kind, is_rounded=True)


def _fallen(tensors: Sequence[_Tensor], type: str, config: ModelSpec) -> tuple[str, ...]:
    """Which types stand in for the file's own, in words."""
    wanted = FILE_TYPES[type]
    fallen = [t for t in tensors if t.cols and t.kind != wanted.kind_of(t, config)]
    if not fallen:
        return ()
    kinds = ", ".join(sorted({tensor.kind for tensor in fallen}))
    return (f"{len(fallen)} matrices have rows that the blocks of {type} do not divide: they are {kinds}",)


def rounded(linear: PackedLinear, kind: str, first: int, count: int, loss: Loss) -> Bytes:
    """Rows of a matrix in a type that does not hold their values: arguments and errors as `encoded`."""
    values = np.ascontiguousarray(floats_of(linear, first, count))
    if np.abs(values).max(initial=0.0) > 65504.0:
        raise OverflowError("a value is larger than float16's 65504")
    flat = values.reshape(-1)
    if kind in _FALLS_TO:
        data = _native.quantize_ggml(values, kind, usable_cores())
    else:
        layout = Format.of(*_LAYOUTS[kind])
        packed = pack_linear(SourceTensor("", values.shape, "F32", flat.view(np.uint8)), layout)
        data = encoded(packed, kind, 0, len(values), loss)
    off = _native.dequantize_ggml(data.reshape(-1), kind, flat.size, usable_cores()) - flat
    loss.error += float(np.vdot(off, off))
    loss.squares += float(np.vdot(flat, flat))
    return data


def encoded(linear: PackedLinear, kind: str, first: int, count: int, loss: Loss) -> Bytes:
    """Rows of a matrix as bytes of a GGUF tensor, uint8 [rows, bytes of a row].

    Args:
        kind: what `carrier` gave.
        first: a multiple of 16.
        loss: takes what rounding to F16 loses.

    Raises:
        OverflowError: a value does not fit F16.
    """
    if kind in ("F16", "F32"):
        values = np.ascontiguousarray(floats_of(linear, first, count))
        return (loss.rounded(values) if kind == "F16" else values).view(np.uint8)
    if kind == "BF16":
        return bf16_bits(linear, first, count).view(np.uint8)
    found = integers(linear, first, count)
    return (_with_minimum if found.minimums is not None else _symmetric)(found, kind)


def _blocks(found: Encoded, kind: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Empty blocks uint8 [rows, blocks, bytes], and the group that each block lies in."""
    rows, cols = found.codes.shape
    count = cols // BLOCK
    return np.empty((rows, count, TYPES[kind].block_bytes), np.uint8), (
        np.arange(count) * BLOCK // found.layout.group
    )


def _put(blocks: Bytes, at: int, values: npt.NDArray[np.generic]) -> int:
    """Copy values [rows, blocks, n] to bytes `at` on; gives where they end."""
    data = np.ascontiguousarray(values).view(np.uint8)
    blocks[..., at : at + data.shape[-1]] = data
    return at + int(data.shape[-1])


def _symmetric(found: Encoded, kind: str) -> Bytes:
    """d, then d * (u - zero): Q8_0 as int8, Q4_0 and Q5_0 unsigned with zeros of 8 and 16."""
    blocks, group = _blocks(found, kind)
    at = _put(blocks, 0, found.scales[:, group, None])
    quants = found.signed.reshape(*blocks.shape[:2], BLOCK)
    if kind == "Q8_0":
        _put(blocks, at, quants)
    else:
        _put_low(blocks, at, (quants + (1 << (_BITS[kind] - 1))).astype(np.uint8), kind == "Q5_0")
    return blocks.reshape(len(blocks), -1)


def _with_minimum(found: Encoded, kind: str) -> Bytes:
    """d, m, then d * u + m."""
    assert found.minimums is not None
    blocks, group = _blocks(found, kind)
    at = _put(blocks, 0, found.scales[:, group, None])
    at = _put(blocks, at, found.minimums[:, group, None])
    _put_low(blocks, at, found.codes.reshape(*blocks.shape[:2], BLOCK), kind == "Q5_1")
    return blocks.reshape(len(blocks), -1)


def _put_low(blocks: Bytes, at: int, u: Bytes, has_fifth: bool) -> None:
    """The fifth bits as one little-endian word of 32, then nibbles: value j low and value j + 16 high."""
    if has_fifth:
        at = _put(blocks, at, np.packbits(u >> 4, axis=-1, bitorder="little"))
    low = u & 15
    _put(blocks, at, low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4))


ARCHITECTURES = {name: family.gguf for name, family in FAMILIES.items()}
"""What GGUF calls each architecture; a Mistral without a window is a llama."""
_BIASES = {"llama": frozenset(("q", "k", "v", "o", "gate", "up", "down")), "qwen2": frozenset("qkv")}
Factors = dict[str, npt.NDArray[np.float32]]


def refuse(what: str, why: str) -> UsageError:
    """The error for what GGUF cannot carry."""
    return UsageError(
        f"gguf cannot carry {what}: {why}", hint="--to compressed-tensors carries every architecture"
    )


def config_metadata(config: ModelSpec, name: str) -> tuple[dict[str, Any], Factors]:
    """(metadata, F32 tensors of rope factors) of a model that the file calls `name`.

    Raises:
        UsageError: GGUF, or the program that reads it, cannot say something of the model; it is named.
    """
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        raise refuse(f"the architecture {config.architecture}", f"known are {', '.join(ARCHITECTURES)}")
    strange = sorted(set(config.blocks[0].biases) - _BIASES.get(architecture, frozenset()))
    if strange:
        raise refuse(f"the biases of {', '.join(strange)}", f"{architecture} in GGUF has none there")
    values: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _BF16,
        "general.quantization_version": 2,
    }
    own = _shape(config, architecture)
    scaling, factors = _rope(config)
    values |= {f"{architecture}.{key}": value for key, value in {**own, **scaling}.items()}
    _check(config, values, factors)
    return values, factors


def _shape(config: ModelSpec, architecture: str) -> dict[str, Any]:
    mixer, (rotary, _) = config.blocks[0].mixer, rope.rotations(config)
    window = next((block.mixer.window for block in config.blocks if block.mixer.window is not None), None)
    own: dict[str, Any] = {
        "block_count": len(config.blocks),
        "context_length": config.context,
        "embedding_length": config.width,
        "feed_forward_length": config.blocks[0].feed_forward.width,
        "attention.head_count": mixer.heads,
        "attention.head_count_kv": mixer.kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.final_norm.eps),
        "rope.freq_base": float(rotary.theta),
        "rope.dimension_count": rotary.dim,
        "vocab_size": config.vocab,
    }
    if mixer.head_dim * mixer.heads != config.width or architecture == "gemma3":
        own |= {"attention.key_length": mixer.head_dim, "attention.value_length": mixer.head_dim}
    if architecture == "gemma3" and window is not None:
        own["attention.sliding_window"] = window
    if architecture == "phi3":
        own["attention.sliding_window"] = 0
    return own


def _rope(config: ModelSpec) -> tuple[dict[str, Any], Factors]:
    """Metadata below `ARCHITECTURE.rope.`, and factors by tensor name."""
    rotary, context = rope.rotations(config)[0], config.context
    scaling, kind = rotary.scaling, rotary.scaling.kind
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}, {}
    if kind == "yarn":
        return _yarn(rotary, context), {}
    if kind == "llama3":
        plain, _ = rope.frequencies(replace(rotary, scaling=RopeScaling()), context)
        scaled, _ = rope.frequencies(rotary, context)
        return {}, {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    if kind == "longrope":
        return _longrope(rotary, context)
    if kind != "default":
        raise refuse(f"rope scaling of the kind {kind}", "the format has no word for it")
    return {}, {}


def _yarn(rotary: Rotary, context: int) -> dict[str, Any]:
    scaling = rotary.scaling
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_context_length or context,
    }
    if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        found["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        found["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    _, scale = rope.frequencies(rotary, context)
    usual = 1.0 + 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 1.0
    if not math.isclose(scale, usual, rel_tol=1e-6):
        found["rope.scaling.attn_factor"] = scale / usual
    return found


def _longrope(rotary: Rotary, context: int) -> tuple[dict[str, Any], Factors]:
    scaling = rotary.scaling
    short, long = (np.array(f, np.float32) for f in (scaling.short_factor, scaling.long_factor))
    _, scale = rope.frequencies(rotary, context)
    if scaling.short_factor == scaling.long_factor and scale == 1.0:  # Llama 3 out of a GGUF file
        return {}, {"rope_freqs.weight": short}
    own = {"rope.scaling.attn_factor": float(scale)}
    if scaling.original_context_length:
        own["rope.scaling.original_context_length"] = scaling.original_context_length
    return own, {"rope_factors_long.weight": long, "rope_factors_short.weight": short}


def _check(config: ModelSpec, values: Mapping[str, Any], factors: Factors) -> None:
    """Read the metadata as a file's and compare what it says with the model."""
    kept = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in values.items()}
    nothing = np.zeros((), np.uint8)
    rows, family = config.vocab, FAMILIES[config.architecture]
    tensors = {
        name: SourceTensor(name, value.shape, "F32", value.view(np.uint8)) for name, value in factors.items()
    }
    for name in ("token_embd.weight", *(() if config.head.tied else ("output.weight",))):
        tensors[name] = SourceTensor(name, (rows, 1), "F16", np.broadcast_to(nothing, 2 * rows))
    for name, parts in family.gguf_names.block.items():
        if set(parts) <= set(config.blocks[0].biases):
            bias = f"blk.0.{name}.bias"
            tensors[bias] = SourceTensor(bias, (1,), "F32", np.zeros(4, np.uint8))
    try:
        found = gguf_spec(GgufMetadata(kept), tensors, "the exported file")
    except HastenError as wrong:
        raise refuse("this model", wrong.message) from None
    if other := difference(replace(config, architecture=found.architecture), found):
        raise refuse(other[0], f"the model has {other[1]}, such a file means {other[2]}")
