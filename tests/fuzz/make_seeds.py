"""Write the fuzzers' seeds, small files of every kind the readers know: `python tests/fuzz/make_seeds.py`."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Gguf,
    Tensor,
    array,
    floats,
    scalar,
    smallest_model,
)
from hasten.weights.tensors import TYPES

CORPUS = Path(__file__).parent / "corpus"


def gguf_seeds() -> dict[str, bytes]:
    seeds = {
        f"model-{name}": smallest_model(name).build()
        for name in ("qwen2", "llama", "gemma3", "phi3", "olmo2")
    }
    scalars = {U8: 200, I8: -3, U16: 9, I16: -9, U32: 7, F32: 0.5, BOOL: 1, U64: 1 << 60, I64: -1, F64: 0.1}
    entries = [(f"k{kind}", scalar(kind, value)) for kind, value in scalars.items()]
    entries += [(f"a{kind}", array(kind, [value] * 2)) for kind, value in scalars.items()]
    entries += [("text", scalar(STRING, "hé")), ("texts", array(STRING, ["a", "", "日"]))]
    seeds["every-value"] = Gguf(entries).build()
    rng = np.random.default_rng(0)
    tensors = []
    for kind in TYPES.values():
        data = rng.integers(0, 256, 256 // kind.block * kind.block_bytes, dtype=np.uint8).tobytes()
        tensors.append(Tensor(kind.name, [256], kind.ggml_id, data))
    seeds["every-type"] = Gguf(tensors=tensors).build()
    seeds["version-2"] = Gguf(entries[:3], version=2).build()
    seeds["aligned-64"] = Gguf(
        [("general.alignment", scalar(U32, 64))], [floats("t", 3)], alignment=64
    ).build()
    seeds["rope-factors"] = Gguf(
        smallest_model("llama").metadata, [*smallest_model("llama").tensors, floats("rope_freqs.weight", 1)]
    ).build()
    seeds["nested"] = Gguf([("a", struct.pack("<IIQ", ARRAY, ARRAY, 1) + b"\0" * 20)]).build()
    seeds["huge-count"] = Gguf(tensor_count=(1 << 64) - 1).build()
    return seeds


def safetensors_seeds() -> dict[str, bytes]:
    shapes = {
        "model.embed_tokens.weight": [3, 4], "model.norm.weight": [4],
        "model.layers.0.input_layernorm.weight": [4], "model.layers.0.post_attention_layernorm.weight": [4],
        "model.layers.0.mlp.gate_up_proj.weight": [12, 4], "model.layers.0.mlp.down_proj.weight": [4, 6],
        "model.layers.0.self_attn.qkv_proj.weight": [8, 4], "model.layers.0.self_attn.qkv_proj.bias": [8],
        "model.layers.0.self_attn.o_proj.weight": [4, 4],
    }  # fmt: skip
    seeds = {
        f"model-{dtype.lower()}": _model(shapes, dtype, size)
        for dtype, size in (("F32", 4), ("BF16", 2), ("F16", 2))
    }
    seeds["empty"] = _raw({})
    seeds["metadata"] = _raw({"__metadata__": {"format": "pt"}})
    seeds["scalar"] = _raw({"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, b"\0" * 4)
    seeds["zero-rows"] = _raw({"z": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}})
    seeds["foreign-type"] = _raw({"i": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8)
    seeds["hole"] = _raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8)
    return seeds


def _model(shapes: dict[str, list[int]], dtype: str, size: int) -> bytes:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + size * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return _raw(header, b"\0" * at)


def _raw(header: Any, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


if __name__ == "__main__":
    for folder, seeds in (("gguf", gguf_seeds()), ("safetensors", safetensors_seeds())):
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (CORPUS / folder / name).write_bytes(data)
