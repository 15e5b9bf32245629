"""Every format by its name: bytes, codes and values, with the native packer as the other witness."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten import _native
from hasten.core import Recipe, as_json
from hasten.errors import UsageError
from hasten.export import export
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.weights import FORMATS, Format, FormatParts, codec, format_named
from hasten.weights.codec import encode, from_bytes, to_bytes
from hasten.weights.packed import integers, pack_integers, pack_linear, pack_model, values_of
from hasten.weights.tensors import SourceTensor

SHAPES = [(37, 256), (16, 96), (5, 12), (1, 1), (130, 257)]
PANELS = [one for one in FORMATS.values() if not one.table]
TABLES = [one for one in FORMATS.values() if one.table]


def weights(shape: tuple[int, int], seed: int = 3) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
    values[0] *= 1e-3
    values[-1, -1] = 0.7
    return values


def tensor(values: np.ndarray) -> SourceTensor:
    return SourceTensor("layers.0.q", values.shape, "F32", values.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("kind", PANELS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_what_the_engine_reads(kind: Format, shape: tuple[int, int]) -> None:
    assert kind.bytes_of(*shape) == _native.packed_bytes(*shape, *kind.native)


@pytest.mark.parametrize("kind", PANELS, ids=str)
@pytest.mark.parametrize("shape", [(37, 256), (19, 128)])
def test_the_native_packer_gives_the_twins_codes(kind: Format, shape: tuple[int, int]) -> None:
    values = weights(shape)
    twin, linear = encode(values, kind), pack_linear(tensor(values), kind, threads=1)
    np.testing.assert_array_equal(values_of(linear), twin.values())
    if kind.is_integer:
        found = integers(linear)
        np.testing.assert_array_equal(found.codes, twin.codes)
        np.testing.assert_array_equal(found.scales, twin.scales)
        if kind.group != 16:
            again = pack_integers("layers.0.q", twin)
            np.testing.assert_array_equal(again.data, linear.data)


@pytest.mark.parametrize("kind", TABLES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_tables_are_kept_as_bytes(kind: Format, shape: tuple[int, int]) -> None:
    values = weights(shape)
    linear = pack_linear(tensor(values), kind, threads=1)
    assert linear.data.size == kind.bytes_of(*shape)
    found = encode(values, kind)
    np.testing.assert_array_equal(to_bytes(found), linear.data)
    np.testing.assert_array_equal(values_of(linear), found.values())
    np.testing.assert_array_equal(from_bytes(linear.data, kind, *shape).codes, found.codes)
    error = np.square(values - found.values()).sum() / np.square(values).sum()
    assert linear.relative_error == pytest.approx(error**0.5, rel=1e-3)


def test_values_of_fp8_are_those_of_the_specification() -> None:
    table = np.array(FORMATS["fp8-e4m3"].table)
    assert table[0x08] == 2.0**-6 and table[0x01] == 2.0**-9  # the smallest normal and subnormal
    assert table[0x7E] == 448 and table[0xFE] == -448 and np.isnan(table[[0x7F, 0xFF]]).all()
    assert table[0x38] == 1.0 and table[0x39] == 1.125 and math.copysign(1, table[0x80]) == -1


def test_codes_of_e4m3_are_the_nearest_in_its_table() -> None:
    """Its own numbers, the middle of every two, what lies just beside the middle, and random ones."""
    table = np.array(FORMATS["fp8-e4m3"].table, np.float32)
    numbers = table[:127]
    middle = (numbers[:-1] + numbers[1:]) / 2
    beside = np.concatenate([np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(500))])
    noise = np.random.default_rng(3).standard_normal(5000).astype(np.float32)
    values = np.concatenate([numbers, middle, beside, noise, 100 * noise, noise / 1e3, noise / 1e9])
    values = np.concatenate([values, -values]).astype(np.float32).clip(-448, 448)
    distance = np.abs(table[None, np.r_[:127, 128:255]].astype(np.float64) - values[:, None])
    found = codec.e4m3_codes(values)
    own = np.abs(table[found].astype(np.float64) - values)
    assert np.array_equal(own, distance.min(1))
    is_tie = (distance == distance.min(1)[:, None]).sum(1) > 1
    ties = found[is_tie & (table[found] != 0)]
    assert len(ties) > 200 and not (ties & 1).any()
    assert not (found == 128).any()  # one zero


def test_values_of_mxfp4_are_those_of_the_specification() -> None:
    assert FORMATS["mxfp4"].table == (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    values = np.zeros((1, 32), np.float32)
    values[0, :8] = [6, -4, 2.5, 5, 0.25, 0.75, 1.25, -0.2]  # the scale is 1; ties go to the even code
    found = encode(values, FORMATS["mxfp4"])
    assert found.scales.item() == 127
    np.testing.assert_array_equal(found.values()[0, :8], [6, -4, 2, 4, 0, 1, 1, 0])


@pytest.mark.parametrize(
    "kind, most",
    [("fp8-e4m3", 0.03), ("fp8-e4m3-tensor", 0.035), ("fp8-e4m3-block", 0.03), ("mxfp4", 0.13)],
)
def test_error_of_gaussian_weights(kind: str, most: float) -> None:
    values = np.random.default_rng(1).normal(size=(256, 512)).astype(np.float32)
    found = encode(values, FORMATS[kind]).values()
    assert math.sqrt(np.square(values - found).sum() / np.square(values).sum()) < most


def test_each_scale_belongs_to_its_block() -> None:
    values = np.ones((256, 256), np.float32)
    values[:128, 128:] = 1000
    found = encode(values, FORMATS["fp8-e4m3-block"])
    assert found.scales.shape == (2, 2) and found.scales[0, 1] == 1000 * found.scales[0, 0]
    np.testing.assert_allclose(found.values(), values, rtol=1e-6)
    assert encode(values, FORMATS["fp8-e4m3-tensor"]).scales.shape == (1, 1)
    assert encode(values, FORMATS["fp8-e4m3"]).scales.shape == (256, 1)


@pytest.mark.parametrize("kind", TABLES, ids=str)
def test_what_is_zero_stays_zero(kind: Format) -> None:
    assert not encode(np.zeros((40, 40), np.float32), kind).values().any()


def test_names() -> None:
    kind = Format.of(4, 64, False)
    assert str(kind) == "w4-g64-asym" and format_named("w4-g64-asym") == kind
    assert Format.of(16) is FORMATS["bf16"] is FormatParts().format()
    assert all(Recipe.parse(name).default is kind for name, kind in FORMATS.items() if kind.group != 16)
    assert as_json({"a": Format.of(4)}) == {"a": "w4"}
    with pytest.raises(UsageError, match="unknown weight format 'w3'"):
        format_named("w3")
    with pytest.raises(UsageError, match="7 bits does not exist"):
        Format.of(7)
    with pytest.raises(UsageError, match="group size 48"):
        Format.of(4, 48)


def test_recipes_of_tables() -> None:
    assert Recipe.parse("mxfp4-head8").head is FORMATS["w8"]
    assert Recipe.parse("fp8-e4m3-block-kv8").kv == "int8"
    for name in ("mxfp4-gptq", "fp8-e4m3-g64", "mxfp4-asym", "mxfp48", "mxfp4-"):
        with pytest.raises(UsageError) as error:
            Recipe.parse(name)
        assert "fp8-e4m3" in str(error.value.hint) and "mxfp4" in str(error.value.hint)


def test_no_kernel_is_said_with_a_way_out() -> None:
    with pytest.raises(UsageError, match="no kernel of the CPU engine reads weights in mxfp4") as caught:
        _ = FORMATS["mxfp4"].native
    assert "--recipe bf16" in str(caught.value.hint)


def test_recipes_need_no_numpy() -> None:
    script = "import sys, hasten.recipe as r; r.Recipe.parse('mxfp4'); assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["mxfp4", "fp8-e4m3-block"])
def test_an_artifact_without_kernels(name: str, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = open_model(tiny_folder("qwen3"))
    packed = pack_model(source, Recipe.parse(name), 1)
    folder = save(tmp_path / "a.hasten", packed, source, {})
    with pytest.raises(UsageError, match=f"no kernel of the CPU engine reads weights in {name}"):
        hasten.load(folder, threads=1)
    with pytest.raises(UsageError, match="cannot become another recipe"):
        hasten.load(folder, "w4", threads=1)
    with pytest.raises(UsageError, match=f"weights in {name}"):
        hasten.load(source.files[0].path.parent, name, threads=1)
    model = hasten.load(folder, "bf16", threads=1)
    for key, linear in packed.linears.items():
        nearest = encode(values_of(linear), FORMATS["bf16"]).values()
        np.testing.assert_array_equal(values_of(model.packed.linears[key]), nearest)
    assert np.isfinite(model.logits([5, 9, 40, 2])).all()
    with pytest.raises(UsageError, match=f"weights in {name}"):
        export(folder, "gguf", tmp_path / "out.gguf")
