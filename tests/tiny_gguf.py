"""Tiny models as GGUF files, laid out as llama.cpp's converter lays them out (its conversion/*.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tiny_models import Tiny
from tiny_tokenizers import CHAT_TEMPLATE, END, VOCAB, vocabulary

# Types that the gguf package can only read: a block's bytes, where its fp16 scale and minimum lie, and how
# many scales one minimum must weigh to centre the values (0: the type has no minimum).
_BLOCKS: dict[str, tuple[int, int, int | None, float]] = {
    "Q2_K": (84, 80, 82, 1.5),
    "Q3_K": (110, 108, None, 0.0),
    "Q4_K": (144, 0, 2, 7.5),
    "Q5_K": (176, 0, 2, 15.5),
    "Q6_K": (210, 208, None, 0.0),
    "IQ4_NL": (18, 0, None, 0.0),
    "IQ4_XS": (136, 0, None, 0.0),
    "IQ3_S": (110, 0, None, 0.0),
    "IQ2_XS": (74, 0, None, 0.0),
    "IQ1_S": (50, 0, None, 0.0),
    "TQ1_0": (54, 52, None, 0.0),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", *_BLOCKS)


def write_gguf(tiny: Tiny, path: Path, dtype: str = "BF16") -> Any:
    """Writes the model; returns the transformers model in float32 that holds exactly the values of the file.

    Matrices whose columns fill whole blocks are written as `dtype`, others as F16, vectors as F32.
    """
    model, config = tiny.model(), tiny.config()
    assert tiny.gguf is not None, f"{tiny.name} has no GGUF form"
    writer = gguf.GGUFWriter(path, tiny.gguf)
    _write_metadata(writer, tiny, config)
    _write_tokenizer(writer)
    names = gguf.get_tensor_name_map(_architecture(tiny.gguf), config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a tied head is not among them
        stem, _, suffix = name.rpartition(".")
        raw, kind, values = _stored(parameter.detach().numpy(), dtype, name)
        parameter.data.copy_(_tensor(values))
        order = _row_order(tiny.gguf, name, config)
        if order is not None:
            raw = raw[order]
        if config.model_type == "gemma3_text" and "norm" in name:
            raw = raw + np.float32(1)
            parameter.data.copy_(_tensor(raw - np.float32(1)))
        mapped = names.get_name(stem)
        assert mapped is not None, name
        writer.add_tensor(f"{mapped}.{suffix}", np.ascontiguousarray(raw), raw_dtype=kind)
    for name, factors in _rope_factors(tiny.gguf, config).items():
        writer.add_tensor(name, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def quantized(values: np.ndarray, dtype: str, seed: str = "") -> np.ndarray:
    """Bytes uint8 [rows, bytes a row] of a matrix in `dtype`.

    For types that the gguf package cannot write they are random valid blocks with the same spread of values.
    """
    if dtype not in _BLOCKS:
        return gguf.quants.quantize(values, Type[dtype]).view(np.uint8)
    size, scale_at, minimum_at, weigh = _BLOCKS[dtype]
    columns = gguf.GGML_QUANT_SIZES[Type[dtype]][0]
    shape = (values.shape[0], values.shape[1] // columns, size)
    rng = np.random.default_rng(list(f"{dtype}{seed}".encode()))
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)

    def put(at: int, numbers: np.ndarray) -> None:
        blocks[..., at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)

    spread = rng.uniform(0.5, 1.5, shape[:2])
    unit = 1e-3
    for scale in (unit, None):  # once to see the spread of values a scale of `unit` gives, then to match it
        if scale is None:
            seen = gguf.quants.dequantize(blocks.reshape(shape[0], -1), Type[dtype]).std()
            scale = float(unit * values.std() / seen)
        put(scale_at, spread * scale)
        if minimum_at is not None:
            put(minimum_at, spread * scale * weigh)
    return blocks.reshape(shape[0], -1)


def _stored(values: np.ndarray, dtype: str, name: str) -> tuple[np.ndarray, Type, np.ndarray]:
    """(what goes to the file, its type, the float32 values that means)."""
    if values.ndim == 1:
        return values, Type.F32, values
    if values.shape[1] % gguf.GGML_QUANT_SIZES[Type[dtype]][0]:
        dtype = "F16"
    if dtype in ("F32", "F16"):
        raw = values.astype(dtype.replace("F", "float"))
        return raw, Type[dtype], raw.astype(np.float32)
    raw = quantized(values, dtype, name)
    return raw, Type[dtype], gguf.quants.dequantize(raw, Type[dtype])


def _tensor(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.array(values, dtype=np.float32))


def _row_order(architecture: str, name: str, config: Any) -> np.ndarray | None:
    """Row r of the file is row order[r] of the checkpoint: llama's q and k are interleaved."""
    if architecture not in ("llama", "smollm3") or not any(f"{p}_proj." in name for p in "qk"):
        return None
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _architecture(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _write_metadata(writer: gguf.GGUFWriter, tiny: Tiny, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None)
    heads = config.num_attention_heads
    writer.add_name(tiny.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if head_dim is not None and tiny.gguf != "phi3":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if tiny.gguf in ("llama", "smollm3"):
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head_dim or config.hidden_size // heads)
    if tiny.gguf == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    _write_rope(writer, tiny, config)


def _write_rope(writer: gguf.GGUFWriter, tiny: Tiny, config: Any) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if tiny.gguf == "phi3":
        ratio = config.max_position_embeddings / config.original_max_position_embeddings
        rotary = int(rope["partial_rotary_factor"] * config.hidden_size) // config.num_attention_heads
        writer.add_rope_dimension_count(rotary)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(
            float(np.sqrt(1 + np.log(ratio) / np.log(config.original_max_position_embeddings)))
        )
        writer.add_sliding_window(0)
    elif rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope_factors(architecture: str, config: Any) -> dict[str, np.ndarray]:
    rope = config.rope_parameters
    if architecture == "phi3":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    dim = config.head_dim
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] / wave
    smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
    smooth = np.clip(smooth, 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)}


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens, merges = vocabulary()
    assert len(tokens) == VOCAB
    kinds = [gguf.TokenType.NORMAL] * (VOCAB - 1) + [gguf.TokenType.CONTROL]
    add: list[tuple[Callable[[Any], None], Any]] = [
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, kinds),
        (writer.add_token_merges, [f"{a} {b}" for a, b in merges]),
        (writer.add_eos_token_id, END),
        (writer.add_chat_template, CHAT_TEMPLATE),
    ]
    for method, value in add:
        method(value)
