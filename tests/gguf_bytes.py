"""GGUF files built byte by byte, so that a test can make any part of one lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    """A value with its type."""
    raw = string(value) if kind == STRING else struct.pack("<" + _FORMATS[kind], value)  # type: ignore[arg-type]
    return struct.pack("<I", kind) + raw


def array(kind: int, values: Sequence[object]) -> bytes:
    """An array with its type, its element type and its length."""
    body = b"".join(scalar(kind, value)[4:] for value in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + body


@dataclass
class Tensor:
    """A tensor's header entry and its bytes; dims innermost first, as the file has them."""

    name: str
    dims: Sequence[int]
    kind: int
    data: bytes
    offset: int | None = None  # None: behind the one before


@dataclass
class Gguf:
    """A whole file. Counts and the version can lie."""

    metadata: list[tuple[str, bytes]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    version: int = 3
    alignment: int = 32
    magic: bytes = b"GGUF"
    tensor_count: int | None = None
    entry_count: int | None = None

    def build(self) -> bytes:
        head = self.magic + struct.pack("<I", self.version)
        head += struct.pack("<Q", len(self.tensors) if self.tensor_count is None else self.tensor_count)
        head += struct.pack("<Q", len(self.metadata) if self.entry_count is None else self.entry_count)
        head += b"".join(string(key) + value for key, value in self.metadata)
        body = b""
        for tensor in self.tensors:
            offset = len(body) if tensor.offset is None else tensor.offset
            head += string(tensor.name) + struct.pack("<I", len(tensor.dims))
            head += b"".join(struct.pack("<Q", n) for n in tensor.dims)
            head += struct.pack("<IQ", tensor.kind, offset)
            body += tensor.data + b"\0" * (-len(tensor.data) % self.alignment)
        return head + b"\0" * (-len(head) % self.alignment) + body


def floats(name: str, *shape: int, value: float = 0.5) -> Tensor:
    """A float32 tensor [outermost, ...]."""
    return Tensor(name, shape[::-1], 0, np.full(shape, value, "<f4").tobytes())


def smallest_model(architecture: str = "qwen2", vocab: int = 3) -> Gguf:
    """A model of one layer and width 4 that opens."""
    prefix = f"{architecture}."
    numbers = {
        "block_count": 1, "context_length": 8, "embedding_length": 4, "feed_forward_length": 6,
        "attention.head_count": 2, "attention.head_count_kv": 1,
    }  # fmt: skip
    metadata = [("general.architecture", scalar(STRING, architecture))]
    metadata += [(prefix + key, scalar(U32, value)) for key, value in numbers.items()]
    metadata += [
        (prefix + "attention.layer_norm_rms_epsilon", scalar(F32, 1e-6)),
        ("tokenizer.ggml.model", scalar(STRING, "gpt2")),
        ("tokenizer.ggml.tokens", array(STRING, [chr(97 + i) for i in range(vocab)])),
        ("tokenizer.ggml.token_type", array(I32, [1] * vocab)),
        ("tokenizer.ggml.eos_token_id", scalar(U32, vocab - 1)),
    ]
    tensors = [
        floats("token_embd.weight", vocab, 4),
        floats("output_norm.weight", 4),
        floats("blk.0.attn_norm.weight", 4),
        floats("blk.0.ffn_norm.weight", 4),
        floats("blk.0.attn_q.weight", 4, 4),
        floats("blk.0.attn_k.weight", 2, 4),
        floats("blk.0.attn_v.weight", 2, 4),
        floats("blk.0.attn_q.bias", 4),
        floats("blk.0.attn_k.bias", 2),
        floats("blk.0.attn_v.bias", 2),
        floats("blk.0.attn_output.weight", 4, 4),
        floats("blk.0.ffn_gate.weight", 6, 4),
        floats("blk.0.ffn_up.weight", 6, 4),
        floats("blk.0.ffn_down.weight", 4, 6),
    ]
    return Gguf(metadata, tensors)
