"""config.json of published models to ModelSpec; its twin is transformers' own reading of the same file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core import ModelSpec
from hasten.errors import HastenError, ModelError
from hasten.models.families import hf_spec
from hasten.models.families.family import bf16_rounded
from hasten.weights.plan import FlatConfig
from specs import flat_of

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "hidden_act": "silu", "rope_theta": 500000.0,
    "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000, "rope_scaling": None,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "rope_interleaved": False,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
    "max_position_embeddings": 32768, "max_window_layers": 21, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False, "tie_word_embeddings": True,
    "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "hidden_act": "silu", "max_position_embeddings": 40960, "max_window_layers": 28, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
    "tie_word_embeddings": True, "attention_bias": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
GEMMA3_1B = {
    "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
    "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None, "sliding_window": 512,
    "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": [1, 106],
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model"},
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
PHI3_128K = {
    "model_type": "phi3", "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu",
    "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": False, "attention_bias": False,
    "rope_scaling": {"type": "longrope", "short_factor": [1.05] * 48, "long_factor": [1.5] * 48},
    "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
}  # fmt: skip
PHI4_MINI = {
    **PHI3_128K, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True, "vocab_size": 200064, "eos_token_id": 199999,
}  # fmt: skip
SMOLLM3 = {
    "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_act": "silu",
    "max_position_embeddings": 65536, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "rope_scaling": None,
    "no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "use_sliding_window": False,
    "sliding_window": None, "layer_types": ["full_attention"] * 36, "attention_bias": False,
    "bos_token_id": 128000, "eos_token_id": 128012, "pad_token_id": 128004,
}  # fmt: skip
OLMO2 = {
    "model_type": "olmo2", "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-06, "rope_theta": 500000, "rope_scaling": None,
    "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": 100257, "pad_token_id": 100277,
}  # fmt: skip
PUBLISHED = {
    "llama": LLAMA, "smollm2": SMOLLM2, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3,
    "mistral-0.3": {**MISTRAL, "sliding_window": None}, "gemma3-1b": GEMMA3_1B,
    "gemma3-4b": GEMMA3_4B, "phi3": PHI3_128K, "phi4-mini": PHI4_MINI, "smollm3": SMOLLM3, "olmo2": OLMO2,
}  # fmt: skip


def read(values: Any) -> ModelSpec:
    return hf_spec(copy.deepcopy(values), "config.json")


def flat(values: Any) -> FlatConfig:
    return flat_of(read(values))


@pytest.mark.parametrize("name", PUBLISHED)
def test_agrees_with_transformers(name: str) -> None:
    from transformers import AutoConfig

    values = copy.deepcopy(PUBLISHED[name])
    twin = AutoConfig.for_model(values.pop("model_type"), **values)  # type: ignore[arg-type]
    twin = getattr(twin, "text_config", twin)
    ours = flat(PUBLISHED[name])

    assert ours.vocab_size == twin.vocab_size
    assert (ours.hidden_size, ours.intermediate_size) == (twin.hidden_size, twin.intermediate_size)
    assert (ours.num_layers, ours.num_heads) == (twin.num_hidden_layers, twin.num_attention_heads)
    assert ours.num_kv_heads == twin.num_key_value_heads
    assert ours.head_dim == (getattr(twin, "head_dim", None) or twin.hidden_size // twin.num_attention_heads)
    assert ours.norm_eps == twin.rms_norm_eps
    assert ours.context_length == twin.max_position_embeddings
    assert ours.tied_head == bool(twin.tie_word_embeddings)
    rope = twin.rope_parameters
    rope = rope.get("full_attention", rope)
    assert (ours.rope_theta, ours.rope_scaling.kind) == (rope["rope_theta"], rope["rope_type"])
    if ours.rope_scaling.kind in ("llama3", "longrope"):
        assert ours.rope_scaling.original_context_length == rope["original_max_position_embeddings"]
    types = getattr(twin, "layer_types", None)
    if types is not None:
        assert (ours.sliding_layers or (False,) * len(types)) == tuple(
            t == "sliding_attention" for t in types
        )
    elif getattr(twin, "sliding_window", None):
        assert ours.sliding_layers == (True,) * ours.num_layers
    if any(ours.sliding_layers):
        assert ours.sliding_window == twin.sliding_window


def test_what_sets_each_apart() -> None:
    llama, gemma, big = flat(LLAMA), flat(GEMMA3_1B), flat(GEMMA3_4B)
    assert llama.eos_token_ids == (128001, 128008, 128009) and llama.rope_scaling.factor == 32
    assert (gemma.norm_placement, gemma.qk_norm, gemma.activation) == ("sandwich", "head", "gelu_tanh")
    assert (gemma.rope_local_theta, gemma.query_scale, gemma.tied_head) == (10_000, 1 / 16, True)
    assert gemma.sliding_layers[:7] == (True,) * 5 + (False, True)
    assert gemma.embed_scale == 34.0  # sqrt(1152) = 33.94, which bf16 does not have
    assert hf_spec(GEMMA3_1B, "x", "F32").embedding.scale == 1152**0.5
    assert (big.rope_scaling.kind, big.rope_scaling.factor, big.num_heads, big.vocab_size) == (
        "linear",
        8,
        8,
        262208,
    )
    assert (flat(OLMO2).norm_placement, flat(OLMO2).qk_norm) == ("post", "full")
    assert flat(SMOLLM3).rope_layers == (True, True, True, False) * 9
    assert (flat(PHI4_MINI).rotary_dim, flat(PHI3_128K).rotary_dim) == (96, None)
    assert flat({**QWEN3, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8,
                 "max_window_layers": 2}).sliding_layers == (False, False, True, True)  # fmt: skip
    without = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    assert flat(without).sliding_window == 4096  # what transformers assumes
    assert flat({**MISTRAL, "sliding_window": None}).sliding_window is None


def test_the_whole_of_gemma_3_speaks_for_its_text_half() -> None:
    """Gemma 3 with images has its end tokens and the tied head beside `text_config`, not in it."""
    whole = read({**GEMMA3_4B, "eos_token_id": [1, 106], "tie_word_embeddings": False})
    assert whole.eos_token_ids == (1, 106) and not whole.head.tied
    assert read(GEMMA3_4B).eos_token_ids == (1,) and read(GEMMA3_4B).head.tied


def test_phi_3_counts_from_4096_where_it_does_not_say() -> None:
    silent = {k: v for k, v in PHI3_128K.items() if k != "original_max_position_embeddings"}
    assert flat(silent).rope_scaling.original_context_length == 4096


def test_biases() -> None:
    assert set(hf_spec(QWEN2, "x").blocks[0].biases) == set("qkv")
    assert set(hf_spec(LLAMA, "x").blocks[0].biases) == set()
    both = {**LLAMA, "attention_bias": True, "mlp_bias": True}
    assert set(hf_spec(both, "x").blocks[0].biases) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert set(hf_spec({**QWEN3, "attention_bias": True}, "x").blocks[0].biases) == set("qkvo")


def test_rope_parameters_of_both_generations_are_the_same() -> None:
    new = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA["rope_scaling"], "rope_theta": 500000.0}  # type: ignore[dict-item]
    assert read(new) == read(LLAMA)
    gemma = {
        k: v for k, v in GEMMA3_1B.items() if k not in ("rope_theta", "rope_local_base_freq", "rope_scaling")
    }
    gemma["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000},
    }
    assert read(gemma) == read(GEMMA3_1B)
    su = {**PHI3_128K, "rope_scaling": {**PHI3_128K["rope_scaling"], "type": "su"}}  # type: ignore[dict-item]
    assert read(su) == read(PHI3_128K)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba"}, "architecture 'mamba' is not supported"),
    ({"model_type": None}, "model_type is missing"),
    ({"model_type": ["llama"]}, "is not supported"),
    ({"hidden_act": "gelu"}, "activation 'gelu' is not supported"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantised checkpoint"),
    ({"num_local_experts": 8}, "mixture of experts"),
    ({"kv_lora_rank": 512}, "latent attention"),
    ({"use_parallel_residual": True}, "parallel residual"),
    ({"rope_scaling": {"type": "xpos", "factor": 2.0}}, "rope kind 'xpos'"),
    ({"rope_scaling": {"type": "default", "mrope_section": [1, 2, 3]}}, "rope kind 'mrope'"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a number greater than 0"),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        "longrope needs 32 positive short factors",
    ),
    ({"rope_scaling": [1]}, "rope_scaling must be an object"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"vocab_size": "big"}, "vocab_size must be an integer"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer from 1 to 1024"),
    ({"num_attention_heads": 0}, "num_attention_heads must be an integer from 1"),
    ({"num_key_value_heads": 5}, "32 query heads are no multiple of 5"),
    ({"head_dim": 1026}, "head_dim must be from 2 to 1024, got 1026"),
    ({"head_dim": 63}, "rotary dimensions must be even"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
    ({"rope_theta": float("inf")}, "rope_theta must be a number"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_does_not_fit_is_an_error_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read({**LLAMA, **change})


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError) as caught:
        read({"model_type": "mamba"})
    hint = caught.value.hint or ""
    assert all(
        name in hint for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2")
    )


def test_layer_lists_must_fit() -> None:
    with pytest.raises(ModelError, match="layer_types must be 26 of"):
        read({**GEMMA3_1B, "layer_types": ["full_attention"]})
    with pytest.raises(ModelError, match="layer_types"):
        read({**GEMMA3_1B, "layer_types": ["chunked_attention"] * 26})
    with pytest.raises(ModelError, match="no_rope_layers"):
        read({**SMOLLM3, "no_rope_layers": [1, 2, 3]})
    with pytest.raises(ModelError, match="must hold an object, got list"):
        read([1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({key for values in PUBLISHED.values() for key in values} | {"rope_parameters", "text_config"})


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(PUBLISHED)), st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3)
)
def test_any_json_gives_a_config_or_our_error(name: str, changes: dict[str, Any]) -> None:
    try:
        config = flat({**PUBLISHED[name], **changes})
    except HastenError:
        return
    assert config.num_layers <= 1024 and config.num_heads % config.num_kv_heads == 0


@settings(max_examples=300, deadline=None)
@given(st.floats(min_value=1e-3, max_value=1e5))
def test_bf16_rounding_is_torch_s(value: float) -> None:
    import torch

    assert bf16_rounded(value) == torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item()
