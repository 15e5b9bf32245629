"""Gemma 3's text models. Source: Gemma3TextConfig in transformers, and llama.cpp's converter and loader."""

from __future__ import annotations

from dataclasses import replace

from hasten.core import Block, Embedding, Head, ModelSpec, Rotary
from hasten.models.families.decoder import activation_of
from hasten.models.families.family import ATTENTION_BIAS, Family, Fields, Flags, bf16_rounded, layer_types

_LAYERS_OF_1B, _LAYERS_OF_27B = 26, 62


def _slides(fields: Fields, layers: int) -> Flags:
    pattern = fields.integer("sliding_window_pattern", fields.integer("_sliding_window_pattern", 6))
    return layer_types(fields, layers) or tuple((i + 1) % pattern != 0 for i in range(layers))


def _embedding(width: int, embed_dtype: str) -> Embedding:
    """The scale is sqrt(E), rounded as the original does; a file of float32 came from one of float32."""
    scale = float(width) ** 0.5
    return Embedding(scale if embed_dtype == "F32" else bf16_rounded(scale))


def _from_json(spec: ModelSpec, fields: Fields, embed_dtype: str) -> ModelSpec:
    activation = activation_of(
        fields.text("hidden_activation", fields.text("hidden_act", "silu")), fields.where
    )
    scalar = fields.number("query_pre_attn_scalar", None)
    softcap = fields.number("attn_logit_softcapping", None)

    def change(block: Block) -> Block:
        mixer = replace(block.mixer, scale=None if scalar is None else scalar**-0.5, softcap=softcap)
        return replace(block, mixer=mixer, feed_forward=replace(block.feed_forward, activation=activation))

    head = Head(tied=spec.head.tied, softcap=fields.number("final_logit_softcapping", None))
    return replace(spec.with_blocks(change), embedding=_embedding(spec.width, embed_dtype), head=head)


def _from_gguf(spec: ModelSpec, fields: Fields, embed_dtype: str) -> ModelSpec:
    is_27b = len(spec.blocks) == _LAYERS_OF_27B  # llama.cpp knows the model by its layers too

    def change(block: Block) -> Block:
        mixer = block.mixer
        if mixer.scale is None and is_27b:
            mixer = replace(mixer, scale=float((spec.width // mixer.heads) ** -0.5))
        return replace(block, mixer=mixer, feed_forward=replace(block.feed_forward, activation="gelu_tanh"))

    return replace(spec.with_blocks(change), embedding=_embedding(spec.width, embed_dtype))


def _implied_window(layers: int) -> int:
    """The window of the published models: early converters did not write it."""
    return 512 if layers <= _LAYERS_OF_1B else 1024


def _local_theta(fields: Fields, rotary: Rotary) -> float:
    return float(fields.number("rope.freq_base_swa", 10_000.0))


GEMMA3 = Family(
    "gemma3",
    "Gemma3ForCausalLM",
    "gemma3",
    model_types=("gemma3_text", "gemma3"),
    nested_types=("gemma3",),
    defaults={
        "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072, "sliding_window": 4096, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "eos_token_id": 1, "bos_token_id": 2,
    },
    theta=1_000_000.0,
    placement="sandwich",
    qk_norm="head",
    bias_keys=ATTENTION_BIAS,
    sliding=_slides,
    hf_local_theta=10_000.0,
    hf_finish=_from_json,
    stored_less_one=True,
    implied_window=_implied_window,
    window_pattern=6,
    local_theta=_local_theta,
    gguf_finish=_from_gguf,
)  # fmt: skip
