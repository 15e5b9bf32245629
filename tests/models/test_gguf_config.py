"""GGUF metadata to ModelSpec: what each architecture means, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from gguf_bytes import BOOL, F32, STRING, U32, Gguf, array, floats, scalar, smallest_model
from hasten.errors import ModelError
from hasten.models.families import gguf_spec
from hasten.models.gguf import GgufFile
from hasten.weights.plan import FlatConfig
from specs import flat_of


def read(model: Gguf) -> FlatConfig:
    file = GgufFile.parse(memoryview(model.build()), "test.gguf")
    return flat_of(gguf_spec(file.metadata, file.tensors, "test.gguf"))


def with_keys(architecture: str = "qwen2", layers: int = 1, **values: bytes) -> Gguf:
    """The smallest model with keys changed or added; __ stands for a dot."""
    model = smallest_model(architecture)
    changed = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    changed[f"{architecture}.block_count"] = scalar(U32, layers)
    model.metadata = [(k, v) for k, v in model.metadata if k not in changed] + list(changed.items())
    return model


def test_the_smallest_model() -> None:
    config = read(smallest_model())
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("qwen2", 3, 4)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (1, 2, 1, 2)
    assert (config.tied_head, config.norm_eps, config.rope_theta) == (True, 1e-6, 10_000.0)
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), None)


def test_an_output_tensor_unties_the_head() -> None:
    model = smallest_model()
    model.tensors.append(floats("output.weight", 3, 4))
    assert not read(model).tied_head


def test_ends_of_turn_are_ends_too() -> None:
    model = smallest_model()
    model.metadata += [
        ("tokenizer.ggml.eot_token_id", scalar(U32, 1)),
        ("tokenizer.ggml.eom_token_id", scalar(U32, 2)),
    ]
    assert read(model).eos_token_ids == (2, 1)


def test_gemma_3() -> None:
    window = scalar(U32, 512)
    config = read(with_keys("gemma3", 8, attention__sliding_window=window, rope__freq_base=scalar(F32, 1e6)))
    assert (config.norm_placement, config.qk_norm, config.activation) == ("sandwich", "head", "gelu_tanh")
    assert config.sliding_layers == (True,) * 5 + (False, True, True)
    assert (config.sliding_window, config.rope_theta, config.rope_local_theta) == (512, 1e6, 10_000.0)
    assert (config.embed_scale, config.query_scale) == (2.0, None)
    largest = read(
        with_keys("gemma3", 62, attention__sliding_window=window, attention__key_length=scalar(U32, 8))
    )
    assert largest.query_scale == (4 // 2) ** -0.5


def test_gemma_3_scale_is_rounded_unless_the_embedding_is_float32() -> None:
    model = with_keys("gemma3", embedding_length=scalar(U32, 1152))
    assert read(model).embed_scale == 1152**0.5
    model.tensors[0].kind, model.tensors[0].data = 1, b"\0" * 24
    assert read(model).embed_scale == 34.0


def test_smollm3_and_olmo2() -> None:
    assert read(with_keys("smollm3", 5)).rope_layers == (True, True, True, False, True)
    olmo = read(with_keys("olmo2"))
    assert (olmo.norm_placement, olmo.qk_norm, olmo.sliding_window) == ("post", "full", None)
    third = read(
        with_keys(
            "olmo2", 4, attention__sliding_window=scalar(U32, 16), rope__scaling__type=scalar(STRING, "yarn"),
            rope__scaling__factor=scalar(F32, 8.0),
        )
    )  # fmt: skip
    assert third.sliding_layers == (True, True, True, False) and third.rope_local_theta == third.rope_theta


def test_windows() -> None:
    window = scalar(U32, 9)
    assert read(with_keys("phi3", 2, attention__sliding_window=window)).sliding_layers == (True, True)
    assert read(with_keys("phi3", 2, attention__sliding_window=scalar(U32, 0))).sliding_window is None
    pattern = array(BOOL, [True, False])
    flags = with_keys("qwen2", 2, attention__sliding_window=window, attention__sliding_window_pattern=pattern)
    assert read(flags).sliding_layers == (True, False)
    number = with_keys(
        "qwen2", 4, attention__sliding_window=window, attention__sliding_window_pattern=scalar(U32, 2)
    )
    assert read(number).sliding_layers == (True, False, True, False)


def test_rope_scaling_kinds() -> None:
    factor = scalar(F32, 4.0)
    linear = read(with_keys(rope__scaling__type=scalar(STRING, "linear"), rope__scaling__factor=factor))
    assert (linear.rope_scaling.kind, linear.rope_scaling.factor) == ("linear", 4.0)
    assert read(with_keys(rope__scale_linear=factor)).rope_scaling == linear.rope_scaling
    original = scalar(U32, 2)
    yarn = read(
        with_keys(
            rope__scaling__type=scalar(STRING, "yarn"), rope__scaling__factor=factor,
            rope__scaling__original_context_length=original, rope__scaling__yarn_beta_fast=scalar(F32, 16.0),
        )
    ).rope_scaling  # fmt: skip
    assert (yarn.kind, yarn.factor, yarn.original_context_length, yarn.beta_fast) == ("yarn", 4.0, 2, 16.0)
    assert yarn.attention_factor is None
    assert read(with_keys(rope__scaling__type=scalar(STRING, "none"))).rope_scaling.kind == "default"


def test_factors_of_llama_3_and_phi_3_come_from_tensors() -> None:
    llama = smallest_model("llama")
    llama.tensors.append(floats("rope_freqs.weight", 1, value=8.0))
    scaling = read(llama).rope_scaling
    assert (scaling.kind, scaling.short_factor, scaling.long_factor) == ("longrope", (8.0,), (8.0,))
    assert scaling.attention_factor == 1.0
    phi = with_keys(
        "phi3",
        rope__scaling__attn_factor=scalar(F32, 1.5),
        rope__scaling__original_context_length=scalar(U32, 4),
    )
    phi.tensors += [
        floats("rope_factors_long.weight", 1, value=3.0),
        floats("rope_factors_short.weight", 1, value=1.0),
    ]
    scaling = read(phi).rope_scaling
    assert (scaling.short_factor, scaling.long_factor) == ((1.0,), (3.0,))
    assert (scaling.attention_factor, scaling.original_context_length, scaling.factor) == (1.5, 4, 2.0)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_factors_must_be_finite_and_positive(value: float) -> None:
    model = smallest_model("llama")
    model.tensors.append(floats("rope_freqs.weight", 1, value=value))
    with pytest.raises(ModelError, match=r"'rope_freqs.weight' must hold finite, positive factors"):
        read(model)


def test_heads_of_every_layer_must_be_the_same() -> None:
    assert read(with_keys(attention__head_count_kv=array(U32, [1, 1]))).num_kv_heads == 1
    with pytest.raises(ModelError, match="the same integer for every layer"):
        read(with_keys(attention__head_count_kv=array(U32, [1, 2])))


WRONG: list[tuple[str, dict[str, bytes], str]] = [
    ("mamba", {}, "architecture 'mamba' is not supported"),
    ("qwen2", {"expert_count": scalar(U32, 8)}, "mixture of experts"),
    ("qwen2", {"attention__kv_lora_rank": scalar(U32, 8)}, "latent attention"),
    ("qwen2", {"attention__clamp_kqv": scalar(F32, 8.0)}, "clipping"),
    ("qwen2", {"logit_scale": scalar(F32, 0.5)}, "logit scale"),
    ("qwen2", {"rope__scaling__type": scalar(STRING, "dynamic")}, "rope scaling 'dynamic'"),
    ("qwen2", {"embedding_length": scalar(STRING, "wide")}, "embedding_length must be an integer"),
    ("qwen2", {"embedding_length": scalar(U32, 0)}, "embedding_length must be an integer from 1"),
    ("qwen2", {"attention__key_length": scalar(U32, 2), "attention__head_count": scalar(U32, 3),
               "attention__head_count_kv": scalar(U32, 2)}, "no multiple"),
    ("qwen2", {"attention__value_length": scalar(U32, 7)}, "value_length must be the key length 2"),
    ("qwen2", {"rope__dimension_count": scalar(U32, 3)}, "rotary dimensions must be even"),
    ("llama", {"attention__key_length": scalar(U32, 8),
               "rope__dimension_count": scalar(U32, 4)}, "the head size 8"),
    ("qwen2", {"attention__layer_norm_rms_epsilon": scalar(F32, float("nan"))}, "must be a number"),
    ("gemma3", {"attention__sliding_window": scalar(U32, 4),
                "attention__sliding_window_pattern": array(BOOL, [True, False])}, "must be 1 flags"),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "keys", "message"), WRONG)
def test_what_does_not_fit_is_an_error_that_names_it(
    architecture: str, keys: dict[str, bytes], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        read(with_keys(architecture, **keys))


def test_a_window_that_the_file_does_not_name(caplog: pytest.LogCaptureFixture) -> None:
    assert read(with_keys("gemma3")).sliding_window == 512
    assert "gemma3.attention.sliding_window is missing: 512 is taken" in caplog.text
    assert read(with_keys("gemma3", attention__sliding_window=scalar(U32, 0))).sliding_window is None


def test_a_missing_architecture_is_an_error() -> None:
    with pytest.raises(ModelError, match="architecture None is not supported"):
        read(Gguf())
