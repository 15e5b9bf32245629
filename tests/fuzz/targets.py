"""What the fuzzers run: everything that reads bytes of strangers. Nothing but a HastenError may come out."""

from __future__ import annotations

import json
from pathlib import Path

from ggml_blocks import check_finite, dequantize
from hasten.errors import FormatError, HastenError
from hasten.models.families import FAMILIES, hf_spec
from hasten.models.gguf import GgufFile
from hasten.models.open import fill, gguf_source
from hasten.weights.tensors import SourceTensor, parse_safetensors

CORPUS = Path(__file__).parent / "corpus"
_MAX_VALUES = 1 << 16  # to unpack; a fuzzer is to look for new paths, not to multiply
_WIDTH_4 = {
    "model_type": "qwen2", "vocab_size": 3, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


def gguf(data: bytes) -> bool:
    """Parse, decode all metadata, unpack all tensors, then open as a model. True: all of it worked."""
    try:
        file = GgufFile.parse(memoryview(data), "fuzz.gguf")
        for key in file.metadata:
            assert file.metadata[key] is not None
        _unpack(file.tensors)
        source = gguf_source(file, "fuzz", ())
        _unpack(source.tensors)
    except HastenError as error:
        assert error.message
        return False
    return True


def safetensors(data: bytes) -> bool:
    """Parse, unpack all tensors, then match them with a model's parameters. True: all of it worked."""
    try:
        tensors = parse_safetensors(memoryview(data), "fuzz.safetensors")
        _unpack(tensors)
        translated = hf_spec(_WIDTH_4, "config.json")
        shapes = translated.parameter_shapes()
        filled, _ = fill(tensors, FAMILIES["llama"].hf_names, shapes, "fuzz")
        _unpack(filled)
    except HastenError as error:
        assert error.message
        return False
    return True


def config(data: bytes) -> bool:
    """A config.json. True: it describes a model."""
    try:
        hf_spec(json.loads(data), "config.json")
    except (ValueError, RecursionError):
        return False  # json.loads: `read_json_object` turns these into a FormatError
    except HastenError as error:
        assert error.message and not isinstance(error, FormatError)
        return False
    return True


def _unpack(tensors: dict[str, SourceTensor]) -> None:
    for tensor in tensors.values():
        if 0 < len(tensor.data) <= _MAX_VALUES:
            assert dequantize(tensor).shape == tensor.shape
            check_finite(tensor)
