"""Whole models by recipe: what goes into which layout, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ggml_blocks import dequantize
from hasten import _native
from hasten.core import Attention, Block, FeedForward, Format, ModelSpec, Recipe, Rotary
from hasten.errors import ModelError, UsageError
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.weights.packed import PackedLinear, PackedModel, pack_linear, pack_model, values_of
from hasten.weights.tensors import SourceTensor


@pytest.fixture(scope="module")
def tied(tiny_folder: Callable[..., Path]) -> Source:
    return open_model(tiny_folder("qwen2"))


@pytest.fixture(scope="module")
def untied(tiny_folder: Callable[..., Path]) -> Source:
    return open_model(tiny_folder("qwen3"))


@pytest.fixture(scope="module")
def aligned(tiny_gguf: Callable[..., tuple[Path, object]]) -> Source:
    """256 inputs everywhere; only the vocabulary of 263 rows is no multiple of 16."""
    return open_model(tiny_gguf("llama-wide")[0])


def changed(source: Source, name: str, values: np.ndarray) -> Source:
    """The model with another float32 tensor in a tensor's place."""
    data = np.ascontiguousarray(values, np.float32).view(np.uint8).ravel()
    tensor = replace(source.tensors[name], dtype="F32", data=data)
    return replace(source, tensors={**source.tensors, name: tensor})


def floats(packed: PackedModel, name: str) -> np.ndarray:
    linear = packed.linears[name]
    layout = linear.layout
    return _native.unpack(linear.data, linear.rows, linear.cols, layout.bits, layout.group, layout.symmetric)


def test_every_parameter_is_there(tied: Source, untied: Source) -> None:
    for source in (tied, untied):
        packed = pack_model(source, Recipe.parse("w4"), 1)
        assert set(packed.linears) == set(source.config.linear_shapes()) | {"embed"}
        assert set(packed.linears) | set(packed.vectors) == set(source.tensors)
        for name, linear in packed.linears.items():
            assert (linear.rows, linear.cols) == source.tensors[name].shape
        assert all(v.dtype == np.float32 and v.ndim == 1 for v in packed.vectors.values())


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_bf16_keeps_every_bit(tiny_folder: Callable[..., Path], name: str) -> None:
    source = open_model(tiny_folder(name))
    packed = pack_model(source, Recipe.parse("bf16"), 1)
    for key, linear in packed.linears.items():
        tensor = source.tensors[key]
        wanted = dequantize(tensor)
        np.testing.assert_array_equal(floats(packed, key), wanted)
        assert linear.relative_error == 0


def test_the_head_by_itself(tied: Source, untied: Source) -> None:
    """The embedding follows the head, tied or not: only rows of it are read."""
    packed = pack_model(untied, Recipe.parse("w4-head8"), 1)
    assert packed.linears["head"].layout == packed.linears["embed"].layout == Format.of(8)
    assert packed.linears["layers.0.q"].layout == Format.of(4)
    assert pack_model(tied, Recipe.parse("w4-head8"), 1).linears["embed"].layout == Format.of(8)
    assert pack_model(tied, Recipe.parse("w4"), 1).linears["embed"].layout == Format.of(4)


def test_single_layers(untied: Source) -> None:
    layers = {"layers.1.down": Format.of(6), "layers.0.q": Format.of(16), "head": Format.of(5, 64)}
    packed = pack_model(untied, Recipe("mix", Format.of(4), None, layers), 1)
    for name, linear in packed.linears.items():
        assert linear.layout == layers.get(name, Format.of(4))


@pytest.mark.parametrize("name", ["layers.9.q", "layers.0.nothing", "final_norm", "layers.0.attn_norm", ""])
def test_layers_that_are_not_there(untied: Source, name: str) -> None:
    recipe = Recipe("mine", Format.of(4), None, {name: Format.of(8)})
    with pytest.raises(UsageError, match="mine names layers") as caught:
        pack_model(untied, recipe, 1)
    assert caught.value.hint and "layers.0" in caught.value.hint


def test_the_head_of_a_tied_model_is_its_embedding(tied: Source) -> None:
    with pytest.raises(UsageError, match="head"):
        pack_model(tied, Recipe("mine", Format.of(4), None, {"head": Format.of(8)}), 1)
    assert pack_model(tied, Recipe("mine", Format.of(4), None, {"embed": Format.of(8)}), 1)


@pytest.mark.parametrize("recipe, layer", [("w4-g64", "down"), ("w8-g64", "down")])
def test_groups_that_do_not_divide(untied: Source, recipe: str, layer: str) -> None:
    """96 inputs and groups of 64."""
    with pytest.raises(UsageError, match=layer) as caught:
        pack_model(untied, Recipe.parse(recipe), 1)
    assert "groups of 64" in caught.value.message and "32" in str(caught.value.hint)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", ["w8", "w4", "w5-head6"])
@pytest.mark.parametrize("name", ["layers.1.up", "embed"])
def test_values_that_are_no_numbers(untied: Source, name: str, recipe: str, bad: float) -> None:
    tensor = untied.tensors[name]
    values = dequantize(tensor).copy()
    values[17, 33] = bad
    with pytest.raises(ModelError, match=rf"{name}.*row 17, column 33") as caught:
        pack_model(changed(untied, name, values), Recipe.parse(recipe), 1)
    assert caught.value.hint


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_matrices_that_stay_floats_are_checked_too(untied: Source, bad: float) -> None:
    values = dequantize(untied.tensors["layers.0.k"]).copy()
    values[3, 5] = bad
    with pytest.raises(ModelError, match=r"layers\.0\.k"):
        pack_model(changed(untied, "layers.0.k", values), Recipe.parse("bf16"), 1)


@pytest.mark.parametrize("name", ["final_norm", "layers.2.mlp_norm", "layers.0.q_norm"])
def test_norms_that_are_no_numbers(untied: Source, name: str) -> None:
    values = dequantize(untied.tensors[name]).copy()
    values[4] = np.nan
    with pytest.raises(ModelError, match=rf"{name}: value 4 is nan"):
        pack_model(changed(untied, name, values), Recipe.parse("w4"), 1)


@pytest.mark.parametrize("recipe", ["bf16", "w8", "w6", "w5", "w4", "w4-g64", "w5-g128-head8", "w4-head16"])
def test_bits_are_what_the_recipe_says(aligned: Source, recipe: str) -> None:
    parsed = Recipe.parse(recipe)
    packed = pack_model(aligned, parsed, 1)
    assert packed.bits_per_weight == pytest.approx(parsed.bits_per_weight(aligned.config), rel=1e-12)
    layers = [linear for name, linear in packed.linears.items() if name.startswith("layers")]
    for linear in layers:
        assert linear.bytes * 8 == linear.layout.bits_per_weight * linear.rows * linear.cols
    head = packed.linears["head"]  # 263 rows take 17 panels of 16
    assert head.bytes * 8 == head.layout.bits_per_weight * 272 * head.cols
    assert packed.weight_bytes == head.bytes + sum(linear.bytes for linear in layers)


def test_a_mixture_stores_all_experts_and_reads_those_that_a_token_chooses() -> None:
    """2 of 8 experts, an embedding table beside the head: what is stored is all, what is read is not."""
    mixer = Attention(4, 2, 32, rotary=Rotary(32))
    block = Block(mixer, FeedForward(96, "experts", experts=8, chosen=2))
    spec = ModelSpec("mixed", 128, 64, 4096, (block, block))
    layout, shapes = Format.of(16), {"embed": (128, 64), **spec.linear_shapes()}
    linears = {
        name: PackedLinear(layout, *shape, np.zeros(layout.bytes_of(*shape), np.uint8))
        for name, shape in shapes.items()
    }
    packed = PackedModel(spec, Recipe.parse("bf16"), linears)
    expert, embed = 3 * 96 * 64 * 2, 128 * 64 * 2
    assert packed.stored_bytes == sum(linear.bytes for linear in linears.values())
    assert packed.weight_bytes == packed.stored_bytes - embed - 2 * (8 - 2) * expert


def test_a_tied_head_counts_once(tied: Source) -> None:
    packed = pack_model(tied, Recipe.parse("w4-head8"), 1)
    assert packed.weight_bytes == packed.stored_bytes == sum(x.bytes for x in packed.linears.values())
    assert packed.bits_per_weight == pytest.approx(Recipe.parse("w4-head8").bits_per_weight(tied.config))


@pytest.mark.parametrize("dtype, bits", [("Q8_0", 8), ("Q4_0", 4), ("Q6_K", 6)])
def test_source_keeps_the_values_of_the_file(
    tiny_gguf: Callable[..., tuple[Path, object]], dtype: str, bits: int
) -> None:
    source = open_model(tiny_gguf("llama-wide", dtype)[0])
    packed = pack_model(source, Recipe("source"), 1)
    for name, linear in packed.linears.items():
        tensor = source.tensors[name]
        wanted = dequantize(tensor)
        error = np.abs(floats(packed, name) - wanted).max()
        assert error <= (1e-3 * np.abs(wanted).max() if linear.relative_error else 0)
    assert packed.linears["layers.0.up"].layout.bits == bits


def test_threads_do_not_change_the_bytes(untied: Source) -> None:
    one, three = (pack_model(untied, Recipe.parse("w5"), threads) for threads in (1, 3))
    for name, linear in one.linears.items():
        np.testing.assert_array_equal(three.linears[name].data, linear.data)


def test_rounding_error_is_measured(untied: Source) -> None:
    errors = [
        pack_linear(untied.tensors["layers.0.up"], Format.of(bits), threads=1).relative_error
        for bits in (8, 6, 5, 4)
    ]
    assert all(e is not None for e in errors)
    assert 0.002 < errors[0] < errors[1] < errors[2] < errors[3] < 0.12


@pytest.mark.parametrize("recipe", ["fp8-e4m3", "mxfp4"])
def test_tables_of_matrices_whose_rows_change_places(
    tiny_gguf: Callable[..., tuple[Path, object]], recipe: str
) -> None:
    """Llama's GGUF files hold the rows of q and k in another order than the engine."""
    source = open_model(tiny_gguf("llama-wide")[0])
    assert any(tensor.row_order is not None for tensor in source.tensors.values())
    packed, plain = pack_model(source, Recipe.parse(recipe), 1), pack_model(source, Recipe.parse("source"), 1)
    for name, linear in packed.linears.items():
        exact = values_of(plain.linears[name])
        off = np.sqrt(np.square(values_of(linear) - exact).sum() / np.square(exact).sum())
        assert off == pytest.approx(linear.relative_error, rel=1e-3, abs=1e-6) and off < 0.2, name


def test_a_matrix_narrower_than_a_group() -> None:
    values = np.random.default_rng(0).standard_normal((20, 24)).astype(np.float32)
    tensor = SourceTensor("narrow", (20, 24), "F32", values.view(np.uint8).ravel())
    linear = pack_linear(tensor, Format.of(8), threads=1)
    back = _native.unpack(linear.data, 20, 24, 8, 32, True)
    np.testing.assert_allclose(back, values, atol=np.abs(values).max() / 127)
