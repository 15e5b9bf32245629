"""What is trained through a layout's rounding is what is packed, to the bit."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hasten import _native
from hasten.compress.distil import Decoder
from hasten.compress.distil.student import Grid, Student, integer_tensor
from hasten.compress.torch_model import made_tensor, tensor_values
from hasten.core import Format
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.weights import FORMATS
from hasten.weights.packed import PackedLinear, pack_linear
from hasten.weights.tensors import SourceTensor

CPU = torch.device("cpu")
LAYOUTS = [
    Format.of(bits, group, symmetric)
    for bits, group, symmetric in product((4, 5, 6, 8), (32, 64), (True, False))
]


def matrix(rows: int = 24, cols: int = 128, seed: int = 0) -> SourceTensor:
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05
    values[3, :64] = 0  # a group of zeros
    values[5] *= 1e-6  # scales below fp16's normal numbers
    return made_tensor("w", (rows, cols), values)


def values_of(packed: PackedLinear) -> torch.Tensor:
    layout = packed.layout
    found = _native.unpack(packed.data, packed.rows, packed.cols, layout.bits, layout.group, layout.symmetric)
    return torch.from_numpy(np.asarray(found))


def trained(grid: Grid, weight: torch.Tensor) -> torch.Tensor:
    """Move everything that learns away from where it began; the weight it ends with."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in grid.learning().values():
            value += torch.randn(value.shape, generator=random) * 0.1
        return weight + torch.randn(weight.shape, generator=random) * 0.01


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_begins_as_the_native_packer_rounds(layout: Format) -> None:
    tensor = matrix()
    found = Grid.of(tensor, layout, CPU)(tensor_values(tensor))
    torch.testing.assert_close(found.detach(), values_of(pack_linear(tensor, layout)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_is_what_was_trained(layout: Format) -> None:
    tensor = matrix()
    grid = Grid.of(tensor, layout, CPU)
    weight = trained(grid, tensor_values(tensor))
    wanted = grid(weight).detach()
    kept = grid.integers(weight)
    assert kept.codes.max() < 2**layout.bits
    torch.testing.assert_close(torch.from_numpy(kept.values()), wanted, rtol=0, atol=0)
    made = integer_tensor("w", kept)
    torch.testing.assert_close(tensor_values(made), wanted, rtol=0, atol=0)
    packed = pack_linear(made, None)
    assert packed.layout == layout
    torch.testing.assert_close(values_of(packed), wanted, rtol=0, atol=0)


def test_packing_the_values_anew_would_not_do() -> None:
    """Why integers are handed over: a search for scales does not find every grid again."""
    tensor = matrix()
    grid = Grid.of(tensor, Format.of(4), CPU)
    with torch.no_grad():
        grid.growth += 0.6  # steps so large that few groups use their ends
    wanted = grid(tensor_values(tensor)).detach()
    again = values_of(pack_linear(made_tensor("w", tensor.shape, wanted), Format.of(4)))
    assert (again != wanted).any()


def test_a_student_that_comes_in_the_layout_keeps_its_scales() -> None:
    """A model that GPTQ rounded begins where GPTQ left it."""
    grid = Grid.of(matrix(), Format.of(4), CPU)
    given = integer_tensor("w", grid.integers(trained(grid, tensor_values(matrix()))))
    start = Grid.of(given, Format.of(4), CPU)
    torch.testing.assert_close(start(tensor_values(given)).detach(), tensor_values(given), rtol=0, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_straight_through_estimator(symmetric: bool) -> None:
    """Against autograd through the same arithmetic with rounding replaced by itself minus a constant."""
    tensor = matrix()
    grid = Grid.of(tensor, Format.of(4, 32, symmetric), CPU)
    weight = trained(grid, tensor_values(tensor)).requires_grad_()
    out = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    (grid(weight) * out).sum().backward()
    found = [weight.grad, *(value.grad for value in grid.learning().values())]
    other = weight.detach().clone().requires_grad_()
    plain = {name: value.detach().clone().requires_grad_() for name, value in grid.learning().items()}

    def half(x: torch.Tensor) -> torch.Tensor:
        return x + (x.half().float() - x).detach()

    scale = half(grid.scale * plain["growth"].exp())
    zero = torch.zeros_like(scale)
    minimum = zero if grid.minimum is None else half(grid.minimum + plain["shift"] * grid.scale)
    inverse = torch.where(scale == 0, zero, 1 / torch.where(scale == 0, zero + 1, scale))
    steps = (other.view(24, 4, 32) - minimum) * inverse
    whole = steps + (steps.round() - steps).detach()
    low, high = (-8, 7) if symmetric else (0, 15)
    # clamp with gradient 1 at the ends themselves, as the layout's ends are values like others
    clipped = torch.where((whole >= low) & (whole <= high), whole, whole.detach().clamp(low, high))
    ((clipped * scale + minimum).flatten(1) * out).sum().backward()
    wanted = [other.grad, *(value.grad for value in plain.values())]
    zeros = (grid.scale == 0).expand(24, 4, 32).flatten(1)  # nothing comes through a group without a scale
    for one, two in zip(found, wanted, strict=True):
        assert one is not None and two is not None
        if one.shape == zeros.shape:
            one, two = one.masked_fill(zeros, 0), two.masked_fill(zeros, 0)
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_fewer_inputs_than_a_group() -> None:
    tensor = made_tensor("w", (16, 20), torch.randn(16, 20, generator=torch.Generator().manual_seed(3)))
    grid = Grid.of(tensor, Format.of(4, 64), CPU)
    wanted = grid(tensor_values(tensor)).detach()
    assert wanted.shape == (16, 20)
    torch.testing.assert_close(wanted, values_of(pack_linear(tensor, Format.of(4, 64))), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        tensor_values(integer_tensor("w", grid.integers(tensor_values(tensor)))), wanted
    )


def test_small_floats_are_not_trained_through_integers(tmp_path: Path) -> None:
    source = open_folder(tiny_models.save_folder(tiny_models.TINY["llama"], tmp_path))
    model = Decoder.of(source, torch.float32, CPU)
    layouts = {"layers.0.down": FORMATS["mxfp4"], "layers.0.up": FORMATS["fp8-e4m3"], "embed": Format.of(4)}
    assert set(Student.of(source, model, layouts=layouts.get).grids) == {"embed"}


def test_a_group_that_does_not_divide_is_refused() -> None:
    tensor = made_tensor("w", (16, 100), torch.ones(16, 100))
    with pytest.raises(UsageError, match="100 inputs"):
        Grid.of(tensor, Format.of(4, 64), CPU)
