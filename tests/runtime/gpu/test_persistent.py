"""What the persistent decoder loads, on a CPU: layers' tiles in order, biases, kept integers, rotations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hasten.core import ModelSpec
from hasten.errors import MachineError, ModelError
from hasten.recipe import Format
from hasten.runtime.gpu.driver import Device
from hasten.runtime.gpu.persistent import _refuse_device, load_weights, rotation_tables, same_format
from hasten.runtime.gpu.shape import Shape, WeightFormat
from hasten.runtime.gpu.tiles import Weights, kept, rounded, tiled
from hasten.weights.codec import Encoded
from hasten.weights.packed import pack_integers, values_of
from specs import changed, spec

CONFIG = spec("qwen2", 263, 64, 96, 2, 4, 2, 16, 256, qk_norm="head")
WINDOW = {"sliding_window": 7, "sliding_layers": (True, False)}
INT4 = WeightFormat("int4", 32)


def parameters(config: ModelSpec = CONFIG, biases: str = "qkv") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = changed(config, biases=tuple(biases)).parameter_shapes()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("fmt", [WeightFormat("bf16"), WeightFormat("fp8"), INT4], ids=str)
def test_every_layer_is_loaded_in_order(fmt: WeightFormat) -> None:
    shape, given = Shape(CONFIG, same_format(fmt), frozenset("qkv")), parameters()
    found = load_weights(shape, given.get, "cpu").tensors
    for layer in range(len(CONFIG.blocks)):
        qkv = torch.cat([given[f"layers.{layer}.{name}"] for name in "qkv"])
        expected = tiled(rounded(qkv, fmt), shape.layout("qkv"))
        assert torch.equal(found["qkv"][layer], expected)
        bias = torch.cat([given[f"layers.{layer}.{name}.bias"] for name in "qkv"])
        assert torch.equal(found["qkv_bias"][layer], bias)
        up = tiled(rounded(given[f"layers.{layer}.up"], fmt), shape.layout("gate_up"))
        assert torch.equal(found["gate_up"][layer][1::2], up)
        assert torch.equal(found["k_norm"][layer], given[f"layers.{layer}.k_norm"])
    assert found["embedding"].dtype == torch.bfloat16
    assert "o_bias" not in found and "post_attn_norm" not in found


def test_bytes_are_those_of_the_tiles() -> None:
    shape = Shape(CONFIG, same_format(WeightFormat("bf16")), frozenset("qkv"))
    weights = load_weights(shape, parameters().get, "cpu")
    expected = sum(
        shape.layout(name).tiles * shape.layout(name).tile_bytes * (2 if name == "gate_up" else 1) * 2
        for name in ("qkv", "o", "gate_up", "down")
    )
    head = shape.layout("head")
    assert weights.streamed_bytes == expected + head.tiles * head.tile_bytes


def test_a_missing_parameter_is_named() -> None:
    given = parameters()
    del given["layers.1.down"]
    with pytest.raises(ModelError, match=r"layers\.1\.down"):
        load_weights(Shape(CONFIG, same_format(INT4)), given.get, "cpu")


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "cols"), [(32, 96), (64, 192), (128, 100)])
def test_integers_of_an_artifact_keep_their_values(bits: int, symmetric: bool, group: int, cols: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (21, cols), dtype=np.uint8)
    scales, low = (rng.random((21, -(-cols // group))).astype(np.float16) for _ in range(2))
    found = Encoded(Format.of(bits, group, symmetric), codes, scales, None if symmetric else low)
    packed = pack_integers("m", found)
    weights = kept(packed, "cpu")
    assert weights.format.kind == ("int4" if bits == 4 else "int8") and weights.codes.dtype == torch.uint8
    np.testing.assert_allclose(weights.values().numpy(), found.values(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(weights.values().numpy(), values_of(packed), rtol=1e-6, atol=1e-6)


def test_kept_weights_go_to_the_tiles_unrounded() -> None:
    shape, given = Shape(CONFIG, same_format(INT4), frozenset("qkv")), parameters()
    names = [n for n in given if n.split(".")[-1] in ("q", "k", "v", "o", "gate", "up", "down", "head")]
    ready: dict[str, torch.Tensor | Weights] = {**given, **{n: rounded(given[n], INT4) for n in names}}
    from_floats = load_weights(shape, given.get, "cpu").tensors
    from_kept = load_weights(shape, ready.get, "cpu").tensors
    assert all(torch.equal(from_floats[name], from_kept[name]) for name in from_floats)


def test_rotations_of_sliding_layers_are_the_local_ones() -> None:
    config = changed(CONFIG, rope_theta=1e6, rope_local_theta=1e4, rotary_dim=8, **WINDOW)
    cosines, sines = rotation_tables(config, 5)
    assert cosines.shape == sines.shape == (2, 5, 4)
    np.testing.assert_allclose(cosines[0, 3], np.cos(3 * 1e6 ** -(np.arange(4) / 4)), rtol=1e-6)
    np.testing.assert_allclose(sines[1, 3], np.sin(3 * 1e4 ** -(np.arange(4) / 4)), rtol=1e-6)


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device("NVIDIA A100", (8, 0), 108, 166912), "8.0"),
        (Device("NVIDIA H100 MIG 1g", (9, 0), 16, 232448), "16 multiprocessors"),
    ],
)
def test_gpus_it_cannot_run_on_are_refused(device: Device, words: str) -> None:
    with pytest.raises(MachineError, match=words):
        _refuse_device(device, 128)


def test_no_block_is_without_a_tile() -> None:
    shape = Shape(CONFIG, same_format(INT4))
    assert shape.blocks == 8  # of 64 outputs, 8 a tile
    wide = changed(CONFIG, hidden_size=2048, num_heads=32, num_kv_heads=8)
    wide = changed(wide, head_dim=64, intermediate_size=4096, vocab_size=32000)
    assert Shape(wide, same_format(INT4)).blocks == 128
