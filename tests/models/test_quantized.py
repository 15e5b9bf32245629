"""GPTQ, AWQ and compressed-tensors folders: the values that are kept, and how."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ggml_blocks import check_finite, dequantize
from hasten import _native
from hasten.core import Format, Recipe
from hasten.errors import FormatError, ModelError
from hasten.models.families import FAMILIES
from hasten.models.open import open_model
from hasten.models.quantized import QuantizedMatrix, bit_fields
from hasten.models.quantized_formats import quantization_of
from hasten.models.source import Source
from hasten.weights.packed import PackedLinear, pack_linear, pack_model
from hasten.weights.tensors import SourceTensor
from quantized_folders import (
    Make,
    Packing,
    Rounded,
    change_config,
    change_model,
    gptq_parts,
    packed_words,
    rewrite,
    rounded,
)

V2 = {"checkpoint_format": "gptq_v2"}
SYMMETRIC = [
    Packing("gptq"), Packing("gptq", 4, 64), Packing("gptq", 4, 128), Packing("gptq", 4, -1),
    Packing("gptq", 8, 32), Packing("gptq", 3, 32), Packing("gptq", 2, 32), Packing("gptq", 4, 32, config=V2),
    Packing("packed"), Packing("packed", 4, 128, scale=torch.bfloat16), Packing("packed", 4, -1),
    Packing("packed", 8, 64, scale=torch.bfloat16), Packing("packed", 8, -1),
    Packing("plain", 8, -1, scale=torch.bfloat16), Packing("plain", 8, 32),
]  # fmt: skip
ASYMMETRIC = [
    Packing("gptq", 4, 32, False), Packing("gptq", 4, 64, False, config=V2), Packing("gptq", 8, 128, False),
    Packing("awq", 4, 32, False), Packing("awq", 4, 64, False), Packing("awq", 4, 128, False),
    Packing("awq", 4, -1, False),
    Packing("packed", 4, 32, False), Packing("packed", 4, 128, False, torch.bfloat16),
    Packing("packed", 4, -1, False), Packing("packed", 8, 32, False), Packing("plain", 8, -1, False),
]  # fmt: skip
ACT_ORDER = [
    Packing("gptq", 4, 32, ordered=False),
    Packing("gptq", 4, 64, False, ordered=False),
    Packing("packed", 4, 32, ordered=False),
]


def by_name(matrices: dict[str, Rounded]) -> dict[str, Rounded]:
    """Under canonical names; fused matrices are none of these."""
    table = FAMILIES["llama"].hf_names
    return {(table.parts(f"{module}.weight") or ("",))[0]: rounded for module, rounded in matrices.items()}


def unpacked(linear: PackedLinear) -> np.ndarray:
    layout = linear.layout
    return _native.unpack(
        linear.data, linear.rows, linear.cols, layout.bits, layout.group, layout.symmetric, 1
    )


def kept(source: Source, name: str) -> PackedLinear:
    return pack_linear(source.tensors[name], None, threads=1)


def native_group(packing: Packing) -> int:
    return 128 if packing.group == -1 else packing.group


@pytest.mark.parametrize("packing", SYMMETRIC, ids=str)
def test_symmetric_integers_and_scales_are_kept_as_they_are(packing: Packing, quantised: Make) -> None:
    folder, matrices = quantised(packing)
    source = open_model(folder)
    assert source.unused == ()
    for name, twin in by_name(matrices).items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), twin.values())
        linear = kept(source, name)
        assert linear.layout == Format.of(4 if packing.bits <= 4 else 8, native_group(packing))
        assert linear.relative_error == 0
        np.testing.assert_array_equal(unpacked(linear), twin.values())


@pytest.mark.parametrize("packing", ASYMMETRIC, ids=str)
def test_zero_points_move_a_group_by_a_sliver_of_a_step(packing: Packing, quantised: Make) -> None:
    folder, matrices = quantised(packing)
    source = open_model(folder)
    assert {t.dtype[0] for n, t in source.tensors.items() if n in by_name(matrices)} == {"A"}
    for name, twin in by_name(matrices).items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), twin.values())
        linear = kept(source, name)
        assert linear.layout == Format.of(packing.bits, native_group(packing), False)
        off = np.abs(unpacked(linear) - twin.values()) / twin.step()
        bound = twin.zero[:, twin.groups_of] * 2.0**-11
        assert (off <= bound + 2e-6 * 2**packing.bits).all()  # a float's own rounding of the difference
        squares = np.sum(twin.values().astype(np.float64) ** 2)
        error = np.sqrt(np.sum((unpacked(linear).astype(np.float64) - twin.values()) ** 2) / squares)
        assert linear.relative_error == pytest.approx(error, rel=1e-3, abs=1e-9)
        rounded = torch.from_numpy(twin.values()).bfloat16().float().numpy()  # the other choice is no closer
        assert np.sum((unpacked(linear) - twin.values()) ** 2) <= np.sum((rounded - twin.values()) ** 2)


@pytest.mark.parametrize("packing", ACT_ORDER, ids=str)
def test_act_order_keeps_its_values_in_bf16_and_says_so(
    packing: Packing, quantised: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder, matrices = quantised(packing)
    with caplog.at_level(logging.WARNING, "hasten.models"):
        source = open_model(folder)
    assert "14 of 14 quantised matrices" in caplog.text and "act-order" in caplog.text
    for name, twin in by_name(matrices).items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), twin.values())
        linear = kept(source, name)
        assert linear.layout == Format.of(16)
        steps = np.abs(twin.q - twin.zero[:, twin.groups_of])
        assert (np.abs(unpacked(linear) - twin.values()) <= twin.step() * steps * 2.0**-8).all()


def test_an_order_that_is_none_costs_nothing(quantised: Make) -> None:
    folder, _ = quantised(Packing("gptq"))
    change_config(folder, desc_act=True)
    assert open_model(folder).tensors["layers.0.q"].dtype == "S4_32"


def test_groups_that_fit_no_layout_are_kept_in_bf16(
    quantised: Make, caplog: pytest.LogCaptureFixture
) -> None:
    folder, matrices = quantised(Packing("packed", 4, 16))
    source = open_model(folder)
    assert "no multiple of 32" in caplog.text
    for name, twin in by_name(matrices).items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), twin.values())
        assert kept(source, name).layout == Format.of(16)


def test_scales_that_are_no_fp16_numbers_are_rounded_and_measured(quantised: Make) -> None:
    folder, matrices = quantised(Packing("packed", 4, 32, scale=torch.float32))
    source = open_model(folder)
    for name, twin in by_name(matrices).items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), twin.values())
        linear = kept(source, name)
        assert 0 < (linear.relative_error or 0) < 2.0**-11
        off = np.abs(unpacked(linear) - twin.values())
        assert (off <= twin.step() * np.abs(twin.q - 8.0) * 2.0**-11 * 1.001).all()


def test_data_are_made_when_they_are_read(quantised: Make) -> None:
    folder, matrices = quantised(Packing("packed"), "phi3")
    source = open_model(folder)
    fused = matrices["model.layers.1.self_attn.qkv_proj"].values()
    first = 0
    for part in "qkv":
        tensor = source.tensors[f"layers.1.{part}"]
        assert tensor.is_made and tensor.data is not tensor.data
        np.testing.assert_array_equal(dequantize(tensor), fused[first : first + tensor.rows])
        np.testing.assert_array_equal(unpacked(kept(source, tensor.name)), dequantize(tensor))
        first += tensor.rows
    assert not source.tensors["embed"].is_made


def test_recipes_take_quantised_matrices_as_any_other(quantised: Make) -> None:
    folder, matrices = quantised(Packing("awq", 4, 32, False))
    source = open_model(folder)
    packed = pack_model(source, Recipe.parse("w8"), 1)
    for name, twin in by_name(matrices).items():
        plain = np.ascontiguousarray(twin.values()).view(np.uint8).ravel()
        wanted = pack_linear(SourceTensor(name, twin.q.shape, "F32", plain), Format.of(8), threads=1)
        np.testing.assert_array_equal(packed.linears[name].data, wanted.data)


def test_the_head_may_be_quantised_too(quantised: Make, tiny_folder: Callable[..., Path]) -> None:
    """264 outputs, a number of whole words of nibbles."""
    folder, matrices = quantised(Packing("gptq"))
    twin = next(iter(matrices.values()))
    tensors = load_file(folder / "model.safetensors")
    q = np.resize(twin.q, (264, 256))
    tensors["lm_head.qweight"] = packed_words(q, 4).T.contiguous()
    tensors["lm_head.qzeros"] = torch.full((8, 33), 0x77777777, dtype=torch.int32)
    tensors["lm_head.scales"] = torch.full((8, 264), 0.5, dtype=torch.float16)
    del tensors["lm_head.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(264, 256, dtype=torch.float16)
    save_file(tensors, folder / "model.safetensors")
    change_model(folder, vocab_size=264)
    np.testing.assert_array_equal(dequantize(open_model(folder).tensors["head"]), 0.5 * (q - 8.0))


def test_fields_lie_where_the_published_packers_put_them() -> None:
    """Words made by compressed-tensors' pack_to_int32, AutoAWQ's unpacking and AutoGPTQ's loop for 3 bits."""
    ours = bit_fields(np.array([[0xFD20FC87, 0x6D43], [0x018A64D4, 0x8DCD]], np.uint32).view(np.int32), 4, 12)
    wanted = [[-1, 0, 4, 7, -8, -6, 5, 7, -5, -4, 5, -2], [-4, 5, -4, -2, 2, 0, -7, -8, 5, 4, 5, 0]]
    np.testing.assert_array_equal(ours.astype(int) - 8, wanted)
    ours = bit_fields(np.array([[0xC97354D1, 0x4D1F]], np.uint32).view(np.int32), 8, 6)
    np.testing.assert_array_equal(ours.astype(int) - 128, [[81, -44, -13, 73, -97, -51]])
    three = np.array([[0x1F46AF15, 0xFD167185, 0xD584F4A1]], np.uint32).view(np.int32)
    wanted = [
        [5, 2, 4, 7, 2, 5, 1, 2, 7, 3, 4, 2, 0, 3, 4, 3, 6, 2, 4, 6, 7, 3, 0, 5, 4, 6, 3, 2, 0, 3, 5, 6]
    ]
    np.testing.assert_array_equal(bit_fields(three, 3, 32), wanted)


def test_awq_outputs_are_in_their_published_order(quantised: Make) -> None:
    folder, _ = quantised(Packing("awq", 4, 32, False))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.qweight"][3, 1] = 0x0BCA11EE
        tensors["model.layers.0.mlp.up_proj.qzeros"][0, 1] = 0
        tensors["model.layers.0.mlp.up_proj.scales"][0, 8:16] = 1

    rewrite(folder, change)
    values = dequantize(open_model(folder).tensors["layers.0.up"])[8:16, 3]
    np.testing.assert_array_equal(values, [14, 10, 14, 12, 1, 11, 1, 0])


def test_a_zero_point_of_zero_survives_gptq_taking_one_away(quantised: Make) -> None:
    folder, _ = quantised(Packing("gptq"))
    rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.qzeros"].fill_(-1))
    tensor = open_model(folder).tensors["layers.0.up"]
    assert tensor.dtype == "A4_32" and dequantize(tensor).min() >= 0


def test_auto_round_names_its_packing(quantised: Make) -> None:
    folder, matrices = quantised(Packing("gptq", 4, 32, False))
    change_config(
        folder, quant_method="auto-round", packing_format="auto_round:auto_gptq", checkpoint_format=None
    )
    wanted = by_name(matrices)["layers.0.up"].values()
    np.testing.assert_array_equal(dequantize(open_model(folder).tensors["layers.0.up"]), wanted)
    change_config(folder, packing_format="auto_round")
    assert not np.array_equal(dequantize(open_model(folder).tensors["layers.0.up"]), wanted)
    change_config(folder, packing_format="auto_round:fp8")
    with pytest.raises(FormatError, match="packing_format 'auto_round:fp8' is not supported"):
        open_model(folder)
    folder, matrices = quantised(Packing("awq", 4, 32, False))
    change_config(folder, quant_method="intel/auto-round", packing_format="auto_round:auto_awq", version=None)
    tensor = open_model(folder).tensors["layers.0.up"]
    np.testing.assert_array_equal(dequantize(tensor), by_name(matrices)["layers.0.up"].values())


def test_early_gptq_kept_its_options_in_a_file_of_their_own(quantised: Make) -> None:
    folder, matrices = quantised(Packing("gptq", 4, 64))
    change_model(folder, quantization_config=None)
    options = {"bits": 4, "group_size": 64, "damp_percent": 0.01, "desc_act": False, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps(options))
    wanted = by_name(matrices)["layers.0.up"].values()
    np.testing.assert_array_equal(dequantize(open_model(folder).tensors["layers.0.up"]), wanted)
    (folder / "quantize_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"quantize_config\.json must hold an object"):
        open_model(folder)


def test_older_compressed_tensors(quantised: Make) -> None:
    """Zero points unpacked, the configuration under its old name, and scales of activations beside."""
    folder, matrices = quantised(Packing("packed", 4, 32, False))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for module, twin in matrices.items():
            tensors[f"{module}.weight_zero_point"] = torch.from_numpy((twin.zero - 8).astype(np.int8))
        tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.ones(1)

    rewrite(folder, change)
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    source = open_model(folder)
    assert source.unused == ("model.layers.0.mlp.up_proj.input_scale",)
    for name, twin in by_name(matrices).items():
        np.testing.assert_array_equal(dequantize(source.tensors[name]), twin.values())


def test_several_groups_of_modules(quantised: Make) -> None:
    """down_proj in 8 bits, all else in 4."""
    folder, _ = quantised(Packing("packed"))
    eight, wide = quantised(Packing("packed", 8, 64))
    more = load_file(eight / "model.safetensors")
    rewrite(folder, lambda t: t.update({k: v for k, v in more.items() if "down_proj" in k}))
    groups = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, eight)]
    both = {f"group_{i}": one["config_groups"]["group_0"] for i, one in enumerate(groups)}
    change_config(folder, config_groups=both)
    tensors = open_model(folder).tensors
    assert (tensors["layers.0.up"].dtype, tensors["layers.0.down"].dtype) == ("S4_32", "S8_64")
    np.testing.assert_array_equal(
        dequantize(tensors["layers.1.down"]), by_name(wide)["layers.1.down"].values()
    )


def test_one_scale_for_a_whole_matrix(quantised: Make) -> None:
    folder, matrices = quantised(Packing("plain", 8, -1))
    up = "model.layers.0.mlp.up_proj"
    rewrite(folder, lambda t: t.update({f"{up}.weight_scale": torch.tensor([0.25])}))
    values = dequantize(open_model(folder).tensors["layers.0.up"])
    np.testing.assert_array_equal(values, 0.25 * (matrices[up].q - 128.0))


def test_biases_of_zeros_are_no_harm_and_others_are(quantised: Make) -> None:
    folder, _ = quantised(Packing("gptq"))
    bias = "model.layers.0.mlp.up_proj.bias"
    rewrite(folder, lambda t: t.update({bias: torch.zeros(256, dtype=torch.float16)}))
    assert open_model(folder).unused == (bias,)
    rewrite(folder, lambda t: t.update({bias: torch.ones(256, dtype=torch.float16)}))
    with pytest.raises(ModelError, match="bias' is not part of this architecture"):
        open_model(folder)


def test_what_is_not_finite_is_named(quantised: Make) -> None:
    folder, _ = quantised(Packing("awq", 4, 32, False))
    rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.scales"].__setitem__((1, 5), float("inf")))
    tensor = open_model(folder).tensors["layers.1.up"]
    with pytest.raises(ModelError, match=r"'layers.1.up' is not finite: 1 infinities.* row 5, column 32"):
        check_finite(tensor)
    with pytest.raises(ModelError, match=r"layers\.1\.up: the scale of block 1 of row 5"):
        pack_linear(tensor, None, threads=1)
    check_finite(open_model(folder).tensors["layers.0.up"])


def test_the_status_word_of_compressed_tensors_does_not_matter(quantised: Make) -> None:
    folder, matrices = quantised(Packing("packed"))
    for word in ("frozen", "calibration", "initialized", None):
        change_config(folder, quantization_status=word)
        for name, twin in by_name(matrices).items():
            np.testing.assert_array_equal(dequantize(open_model(folder).tensors[name]), twin.values())


@pytest.mark.parametrize("cols, group, dtype", [(96, 64, "S4_32"), (112, 64, "F32"), (64, 128, "S4_64")])
def test_a_last_group_that_is_shorter(cols: int, group: int, dtype: str) -> None:
    rng = np.random.default_rng(cols)
    groups = -(-cols // group)
    q = rng.integers(0, 16, (8, cols), dtype=np.uint8)
    scale = rng.uniform(0.001, 0.01, (8, groups)).astype(np.float16).astype(np.float32)
    matrix = QuantizedMatrix(
        "m", 8, cols, 4, group, np.full((8, groups), 8, np.uint8), None, lambda: (q, scale), ()
    )
    wanted = (q.astype(np.float32) - 8) * scale[:, np.arange(cols) // group]
    tensor = matrix.tensor()
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(dequantize(tensor), wanted)


def test_modules_with_a_width_and_an_order_of_their_own() -> None:
    """`dynamic` of GPTQModel: the first expression that fits a module's name counts."""
    bits = {"model.layers.0.up": 8, "model.layers.1.up": 4}
    tensors = {}
    rng = np.random.default_rng(1)
    wanted = {}
    for module, width in bits.items():
        r = rounded(rng.standard_normal((32, 64)).astype(np.float32), Packing("gptq", width, 32), 1)
        wanted[module] = r.values()
        for part, value in gptq_parts(r, Packing("gptq", width, 32)).items():
            array = value.numpy()
            kind = {"int32": "I32", "float16": "F16"}[str(array.dtype)]
            name = f"{module}.{part}"
            tensors[name] = SourceTensor(
                name, array.shape, kind, np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            )
    dynamic = {"-:.*down": {}, r"+:.*\.0\.up": {"bits": 8}, r".*\.0\..*": {"bits": 2}}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": dynamic}
    quantization = quantization_of({"quantization_config": config}, "here")
    assert quantization is not None
    for matrix in quantization.matrices(tensors, "here"):
        assert matrix.bits == bits[matrix.module]
        np.testing.assert_array_equal(matrix.values(), wanted[matrix.module])


def stored(parts: dict[str, torch.Tensor | np.ndarray]) -> dict[str, SourceTensor]:
    """Tensors as a file holds them."""
    kinds = {"uint8": "U8", "int8": "I8", "float32": "F32", "float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16"}
    found = {}
    for name, value in parts.items():
        tensor = torch.as_tensor(value)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        kind = kinds[str(tensor.dtype).removeprefix("torch.")]
        found[name] = SourceTensor(name, tuple(tensor.shape), kind, raw)
    return found


FP8 = {"quant_method": "fp8"}
FLOATS = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
}  # fmt: skip


@pytest.mark.parametrize(
    "config, part, shape",
    [
        (FP8, "weight_scale", ()),
        (FP8, "weight_scale", (1,)),
        (FLOATS, "weight_scale", (200, 1)),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", (200, 1)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", ()),
        ({**FP8, "weight_block_size": [128, 128]}, "weight_scale_inv", (2, 3)),
        ({**FP8, "weight_block_size": [64, 32]}, "weight_scale_inv", (4, 9)),
    ],
)
def test_fp8_by_tensor_row_and_block(config: dict[str, object], part: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = (torch.randn(200, 260, generator=generator) * 50).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.5
    spread = scale
    if part == "weight_scale_inv":
        high, wide = config["weight_block_size"]  # type: ignore[misc]
        spread = scale.repeat_interleave(high, 0)[:200].repeat_interleave(wide, 1)[:, :260]
    wanted = (codes.float() * spread).numpy()
    quantization = quantization_of({"quantization_config": config}, "here")
    assert quantization is not None
    (matrix,) = quantization.matrices(stored({"m.weight": codes, f"m.{part}": scale}), "here")
    np.testing.assert_array_equal(dequantize(matrix.tensor()), wanted)


def test_bitsandbytes_of_8_bits_keeps_its_integers() -> None:
    rng = np.random.default_rng(1)
    weight, peaks = rng.integers(-127, 128, (8, 64)).astype(np.int8), rng.uniform(1, 2, 8).astype(np.float32)
    quantization = quantization_of({"quantization_config": {"quant_method": "bitsandbytes"}}, "here")
    assert quantization is not None
    parts = {"m.weight": weight, "m.SCB": peaks, "m.weight_format": np.array(0, np.uint8)}
    (matrix,) = quantization.matrices(stored(parts), "here")
    assert matrix.tensor().dtype == "S8_64"
    wanted = weight.astype(np.float32) * (peaks / np.float32(127))[:, None]
    np.testing.assert_array_equal(dequantize(matrix.tensor()), wanted)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_4_bits(nested: bool) -> None:
    rng = np.random.default_rng(1)
    rows, cols, size = 6, 96, 64
    codes, blocks = rng.integers(0, 16, rows * cols), rows * cols // size
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    peaks = rng.uniform(0.01, 0.1, blocks).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": size, "shape": [rows, cols], "dtype": "bfloat16"}
    parts: dict[str, np.ndarray] = {
        "m.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None],
        "m.weight.quant_map": table,
        "m.weight.absmax": peaks,
    }
    if nested:
        state |= {"nested_blocksize": 4, "nested_offset": 0.05}
        levels, most = rng.uniform(-1, 1, 256).astype(np.float32), rng.uniform(0, 1, 3).astype(np.float32)
        chosen = rng.integers(0, 256, blocks).astype(np.uint8)
        more = {"absmax": chosen, "nested_quant_map": levels, "nested_absmax": most}
        parts |= {f"m.weight.{name}": value for name, value in more.items()}
        peaks = levels[chosen] * np.repeat(most, 4)[:blocks] + np.float32(0.05)
    text = json.dumps(state).encode()
    parts["m.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8).copy()
    quantization = quantization_of({"quantization_config": {"quant_method": "bitsandbytes"}}, "here")
    assert quantization is not None
    (matrix,) = quantization.matrices(stored(parts), "here")
    wanted = (table[codes] * np.repeat(peaks, size)).reshape(rows, cols)
    np.testing.assert_allclose(dequantize(matrix.tensor()), wanted, rtol=1e-6)


def test_a_folder_in_fp8_computes_what_its_values_do(
    tiny_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = load_file(tiny_folder("llama") / "model.safetensors")
    own, meant = {}, {}
    for name, value in tensors.items():
        if "_proj" in name and value.dim() == 2:
            scale = value.abs().max().float() / 448
            codes = (value.float() / scale).to(torch.float8_e4m3fn)
            own |= {name: codes, f"{name}_scale": scale}
            meant[name] = (codes.float() * scale).numpy()
        else:
            own[name] = value
    folder = tmp_path / "fp8"
    folder.mkdir()
    for file in tiny_folder("llama").iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(own, folder / "model.safetensors")
    change_model(folder, quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    source = open_model(folder)
    assert "fp8 values" in caplog.text
    for name, wanted in meant.items():
        part = (FAMILIES["llama"].hf_names.parts(name) or ("",))[0]
        np.testing.assert_array_equal(dequantize(source.tensors[part]), wanted)
