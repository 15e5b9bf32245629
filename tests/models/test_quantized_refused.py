"""Quantised folders that are damaged, contradict themselves or are of a kind that does not open."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ggml_blocks import dequantize
from hasten.errors import FormatError, ModelError
from hasten.models.open import open_model
from hasten.models.quantized_formats import quantization_of
from hasten.weights.packed import pack_linear
from quantized_folders import Make, Packing, change_model, rewrite

Change = Callable[[dict[str, torch.Tensor], str], None]
GPTQ, AWQ, PACKED, PLAIN = (
    Packing("gptq"),
    Packing("awq", 4, 32, False),
    Packing("packed"),
    Packing("plain", 8, -1),
)
ZEROS = Packing("packed", 4, 32, False)


def cut(part: str, axis: int, count: int = 1) -> Change:
    """Takes the last of a tensor's rows or columns away."""

    def change(tensors: dict[str, torch.Tensor], module: str) -> None:
        tensor = tensors[f"{module}.{part}"]
        tensors[f"{module}.{part}"] = tensor.narrow(axis, 0, tensor.shape[axis] - count).contiguous()

    return change


def gone(part: str) -> Change:
    def change(tensors: dict[str, torch.Tensor], module: str) -> None:
        del tensors[f"{module}.{part}"]

    return change


def put(part: str, tensor: torch.Tensor) -> Change:
    return lambda tensors, module: tensors.update({f"{module}.{part}": tensor})


def numbers(*values: int, length: int = 256) -> torch.Tensor:
    """These groups for the first inputs, and for all others the group they are in."""
    usual = torch.arange(length, dtype=torch.int32) // 32
    usual[: len(values)] = torch.tensor(values, dtype=torch.int32)
    return usual


BROKEN: list[tuple[str, Packing, Change, str]] = [
    ("no scales", GPTQ, gone("scales"), r"up_proj.scales' is missing"),
    ("no zeros", GPTQ, gone("qzeros"), r"up_proj.qzeros' is missing"),
    ("no qweight", GPTQ, gone("qweight"), r"up_proj.g_idx' holds integers \(I32\) and is of no quantised"),
    ("short qweight", GPTQ, cut("qweight", 0), r"g_idx' must be I32 \[248\], got I32 \[256\]"),
    ("shorter qweight", GPTQ, cut("qweight", 0, 4), r"scales' must be .* \[7, 256\]"),
    ("narrow qweight", GPTQ, cut("qweight", 1, 8), r"scales' must be .* \[8, 248\], got F16 \[8, 256\]"),
    ("flat qweight", GPTQ, put("qweight", numbers(length=8)), r"\[any, any\], got I32 \[8\]"),
    ("scales of integers", GPTQ, put("scales", numbers()), "must be F16 .* got I32"),
    ("empty scales", GPTQ, put("scales", torch.zeros(0, 256, dtype=torch.float16)), r"got F16 \[0, 256\]"),
    ("short g_idx", GPTQ, cut("g_idx", 0), r"g_idx' must be I32 \[256\], got I32 \[255\]"),
    ("a group too far", GPTQ, put("g_idx", numbers(8)), "names group 8, and there are 8"),
    ("a group before", GPTQ, put("g_idx", numbers(-1)), "names group -1"),
    ("uneven groups", GPTQ, put("g_idx", numbers(1)), "gives group 0 31 inputs, and it has 32"),
    ("twice", GPTQ, put("weight", torch.zeros(256, 256)), "up_proj is there twice"),
    ("awq cut", AWQ, cut("qweight", 0, 32), r"\[7, 256\], got F16 \[8, 256\]"),
    ("awq without zeros", AWQ, gone("qzeros"), "qzeros' is missing"),
    ("awq scales", AWQ, cut("scales", 1), r"\[8, 256\], got F16 \[8, 255\]"),
    ("no shape", PACKED, gone("weight_shape"), "weight_shape' is missing"),
    ("lying shape", PACKED, put("weight_shape", torch.tensor([256, 128])), r"does not hold \[256, 128\]"),
    ("mad shape", PACKED, put("weight_shape", torch.tensor([-1, 0])), r"does not hold \[-1, 0\]"),
    ("packed cut", PACKED, cut("weight_packed", 1), r"does not hold \[256, 256\] values of 4 bits"),
    ("packed rows", PACKED, cut("weight_packed", 0), r"does not hold \[256, 256\]"),
    ("packed scales", PACKED, cut("weight_scale", 1), r"_scale' must be .* \[256, 8\], got F16 \[256, 7\]"),
    ("no packed scale", PACKED, gone("weight_scale"), "weight_scale' is missing"),
    ("no zero point", ZEROS, gone("weight_zero_point"), "weight_zero_point' is missing"),
    ("zero points cut", ZEROS, cut("weight_zero_point", 0), r"must be I32 \[32, 8\], got I32 \[31, 8\]"),
    ("plain without scale", PLAIN, gone("weight_scale"), "weight_scale' is missing"),
    ("plain scales", PLAIN, cut("weight_scale", 0), r"\[256, 1\], got F16 \[255, 1\]"),
]  # fmt: skip


@pytest.mark.parametrize("packing, change, wrong", [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_damaged_module_is_an_error_that_names_it(
    packing: Packing, change: Change, wrong: str, quantised: Make
) -> None:
    folder, _ = quantised(packing)
    rewrite(folder, lambda tensors: change(tensors, "model.layers.1.mlp.up_proj"))
    with pytest.raises(FormatError, match=wrong):
        open_model(folder)


ALL = [
    GPTQ, AWQ, ZEROS, PLAIN, Packing("gptq", 4, 32, ordered=False), Packing("packed", 4, 32, ordered=False),
]  # fmt: skip


def mutated(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """A tensor cut, flattened, doubled, of another type or of noise."""
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64]
    noise = torch.randint(-128, 127, tensor.shape) * (1 << 24 if tensor.dtype == torch.int32 else 1)
    return rng.choice(
        [
            tensor.narrow(0, 0, rng.randrange(tensor.shape[0] + 1)).contiguous(),
            tensor.reshape(-1),
            torch.cat([tensor, tensor]),
            tensor.to(rng.choice(kinds)),
            noise.to(tensor.dtype),
        ]
    )


@pytest.mark.parametrize("packing", ALL, ids=str)
def test_mutations_open_or_are_refused(packing: Packing, quantised: Make) -> None:
    """Nothing but our own errors, whatever a tensor has become; what opens can be read and packed."""
    folder, _ = quantised(packing, "qwen2")
    base, rng = load_file(folder / "model.safetensors"), random.Random(5)
    names = [name for name in base if "layers.0.mlp.up_proj" in name]
    refused = 0
    for _ in range(30):
        name = rng.choice(names)
        save_file({**base, name: mutated(base[name], rng)}, folder / "model.safetensors")
        try:
            tensor = open_model(folder).tensors["layers.0.up"]
            assert dequantize(tensor).shape == tensor.shape
            pack_linear(tensor, None, threads=1)
        except ModelError as error:
            assert "up_proj" in error.message or "layers.0.up" in error.message
            refused += 1
    assert refused > 5


def test_a_matrix_of_another_size_than_the_model_says(quantised: Make) -> None:
    folder, _ = quantised(PACKED)
    change_model(folder, intermediate_size=128)
    with pytest.raises(ModelError, match=r"down_proj.weight' must be \[256, 128\], got \[256, 256\]"):
        open_model(folder)


def test_integers_without_a_configuration_stay_refused(quantised: Make) -> None:
    folder, _ = quantised(GPTQ)
    change_model(folder, quantization_config=None)
    with pytest.raises(FormatError, match="has type 'I32', which is not supported"):
        open_model(folder)


GROUP: dict[str, Any] = {"weights": {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}}


def of_weights(**options: Any) -> dict[str, Any]:
    weights = {**GROUP["weights"], **options}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "hqq"}, "quant_method 'hqq'"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method 'modelopt'"),
    ({"bits": 4}, "quant_method None"),
    ({"quant_method": "gptq", "bits": 5, "group_size": 32}, "bits 5"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "format 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "is_marlin_format": True}, "is_marlin_format"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "pack_dtype": "int64"}, "pack_dtype 'int64'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "rotation": "hadamard"}, "rotation 'hadamard'"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "adapter": {"rank": 8}}, "adapter"),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {".*down.*": {"bits": 5}}},
        r"dynamic \{'\.\*down\.\*': \{'bits': 5\}\}",
    ),
    (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"+:(": {"bits": 8}}},
        r"dynamic '\+:\('",
    ),
    ({"quant_method": "awq", "bits": 8, "group_size": 32}, "bits 8"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "version 'gemv'"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "backend": "llm-awq"}, "backend 'llm-awq'"),
    ({**of_weights(), "format": "float-quantized"}, "format 'float-quantized'"),
    ({**of_weights(), "format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    ({**of_weights(), "format": "marlin-24"}, "format 'marlin-24'"),
    ({**of_weights(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'"),
    ({**of_weights(), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    ({**of_weights(), "config_groups": {}}, "config_groups"),
    ({**of_weights(), "config_groups": {"group_0": ["Linear"]}}, r"config_groups.group_0 \['Linear'\]"),
    (of_weights(type="float"), "weights.type 'float'"),
    (of_weights(num_bits=3), "weights.num_bits 3"),
    (of_weights(strategy="block"), "weights.strategy 'block'"),
    (of_weights(dynamic=True), "weights.dynamic True"),
]


@pytest.mark.parametrize("config, wrong", REFUSED, ids=[wrong for _, wrong in REFUSED])
def test_what_is_not_supported_is_refused_by_name(config: dict[str, Any], wrong: str) -> None:
    with pytest.raises(FormatError, match=wrong) as caught:
        quantization_of({"quantization_config": config}, "config.json")
    assert caught.value.hint is not None and "supported" in caught.value.hint


def test_modules_left_out_are_no_harm() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    for more in (
        {"dynamic": {"-:.*down.*": {}}},
        {"dynamic": {".*up.*": {"bits": 4}}},
        {"extra_config": {"lm_head": {"bits": 16, "data_type": "fp"}}},
        {"dynamic": None},
    ):
        assert quantization_of({"quantization_config": {**gptq, **more}}, "config.json") is not None
    assert quantization_of({"quantization_config": None}, "config.json") is None


@pytest.mark.parametrize("method", ["fp8", "bitsandbytes"])
def test_a_configuration_that_the_weights_do_not_follow(method: str) -> None:
    found = quantization_of({"quantization_config": {"quant_method": method}}, "config.json")
    assert found is not None
    with pytest.raises(FormatError, match=f"the configuration says {method}"):
        found.matrices({}, "here")
