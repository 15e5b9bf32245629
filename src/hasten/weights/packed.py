"""Weights into the layouts of the native engine, by recipe, and back to the integers they hold.

A `PackedModel` is everything the engine needs to run: integer or bf16 matrices in the layout of
native/layout.h, and norms and biases in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.core import Format, ModelSpec, Recipe
from hasten.errors import ModelError, UsageError
from hasten.machine.cores import usable_cores
from hasten.machine.memory import memory_room
from hasten.weights import FORMATS, PANEL
from hasten.weights.codec import Encoded, encode, from_bytes, to_bytes
from hasten.weights.tensors import Bytes, SourceTensor

Halves = npt.NDArray[np.float16]

_FLOATS = ("F32", "F16", "BF16")
_ALIGN = 64
PIECE_BYTES = 1 << 22
"""Bytes a checksum covers: 4 MB, so that threads share the work."""


class Opened(Protocol):
    """What packing asks of an opened model."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> ModelSpec: ...
    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...


@dataclass(frozen=True)
class PackedLinear:
    """One matrix in a native layout.

    `relative_error` is the root of (squared rounding error / squared values): 0 where the layout holds the
    source's values exactly, None where it was not measured (an artifact that was loaded). `checksum` is what
    `checksum_of` gives, where it is known.
    """

    layout: Format
    rows: int
    cols: int
    data: npt.NDArray[np.uint8]  # [packed bytes]
    relative_error: float | None = None
    checksum: str | None = field(default=None, compare=False)

    @property
    def bytes(self) -> int:
        """Bytes a pass over the matrix reads."""
        return int(self.data.nbytes)


@dataclass
class PackedModel:
    """A model by one recipe, ready to run. `linears` may be replaced one by one."""

    config: ModelSpec
    recipe: Recipe
    linears: dict[str, PackedLinear]  # every key of config.linear_shapes(), and `embed` always
    vectors: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)  # norms and biases

    def _read(self) -> Mapping[str, PackedLinear]:
        return {name: self.linears[name] for name in self.config.linear_shapes()}

    @property
    def weight_bytes(self) -> int:
        """Bytes of linear layers that one decoded token reads, the head and chosen experts included."""
        return round(sum(linear.bytes * self.config.share(name) for name, linear in self._read().items()))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices, of every expert and of the embedding table: what they take in memory."""
        return sum(linear.bytes for linear in self.linears.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the linear layers, scales and head included, padding not."""
        linears = self._read().values()
        weights = sum(linear.rows * linear.cols for linear in linears)
        return sum(linear.layout.bits_per_weight * linear.rows * linear.cols for linear in linears) / weights


def checksum_of(linear: PackedLinear, threads: int = 1) -> str:
    """A checksum of a matrix's packed bytes: XXH64 of every 4 MB, joined. Computed where it is not known."""
    if linear.checksum is not None:
        return linear.checksum
    return "".join(f"{value:016x}" for value in _native.checksums(linear.data, PIECE_BYTES, threads))


def values_of(linear: PackedLinear) -> npt.NDArray[np.float32]:
    """What a matrix holds: float32 [rows, cols], on all cores."""
    shape = (linear.rows, linear.cols)
    if linear.layout.table:
        return from_bytes(linear.data, linear.layout, *shape).values()
    bits, group, symmetric = linear.layout.native
    values: npt.NDArray[np.float32] = _native.unpack(
        linear.data, *shape, bits, group, symmetric, usable_cores()
    )
    return values


def decoded(packed: PackedModel) -> PackedModel:
    """The same model, its tables of values (fp8, mxfp4) in bf16: for an engine without their kernels."""
    linears = dict(packed.linears)
    for name, linear in linears.items():
        if linear.layout.table:
            shape = (linear.rows, linear.cols)
            values = SourceTensor(name, shape, "F32", values_of(linear).reshape(-1).view(np.uint8))
            linears[name] = pack_linear(values, FORMATS["bf16"])
    return replace(packed, linears=linears)


def source_layout(tensor: SourceTensor) -> Format:
    """The cheapest layout that holds a tensor's values: integers for quantised GGUF types, else bf16."""
    if tensor.dtype in _FLOATS:
        return Format.of(16)
    bits, group, symmetric, _ = _native.ggml_layout(tensor.dtype)
    return Format.of(bits, group, symmetric)


def pack_linear(
    tensor: SourceTensor,
    layout: Format | None,
    out: npt.NDArray[np.uint8] | None = None,
    threads: int | None = None,
) -> PackedLinear:
    """Pack one matrix.

    Args:
        tensor: [rows, cols] as its file holds it.
        layout: where it goes; None keeps the source's values in `source_layout(tensor)`.
        out: uint8 [packed bytes] to write to; None makes one.
        threads: None uses the cores this process may use.

    Raises:
        ModelError: a value is not finite or does not fit the layout; the tensor is named.
        UsageError: the layout's group does not divide the columns.
    """
    rows, cols = tensor.shape
    keep = layout is None
    layout = source_layout(tensor) if layout is None else layout
    if layout.is_integer and cols % layout.group and cols > layout.group:
        raise UsageError(
            f"{tensor.name} has {cols} inputs, which groups of {layout.group} do not divide",
            hint="use groups of 32 (the default)",
        )
    data = out if out is not None else np.zeros(layout.bytes_of(rows, cols), np.uint8)
    count = usable_cores() if threads is None else threads
    try:
        if keep and tensor.dtype not in _FLOATS:
            error = _native.pack_ggml(tensor.data, tensor.dtype, rows, cols, data, tensor.row_order, count)[1]
        else:
            error = _relative(tensor, layout, data, count)
    except _native.PackError as wrong:
        raise ModelError(
            f"{tensor.name}: {wrong}", hint="the file is damaged or the model diverged: get it again"
        ) from None
    return PackedLinear(layout, rows, cols, data, float(error))


def _relative(tensor: SourceTensor, layout: Format, data: npt.NDArray[np.uint8], threads: int) -> float:
    rows, cols = tensor.shape
    raw, dtype, order = tensor.data, tensor.dtype, tensor.row_order
    if dtype not in _FLOATS and not layout.table:  # through float32: another width than the file's own
        raw = _native.dequantize_ggml(raw, dtype, rows * cols, threads).view(np.uint8)
        dtype = "F32"
    if layout.table:
        values = finite_values(tensor)
        found = encode(values, layout, threads)
        data[:] = to_bytes(found)
        flat, off = values.reshape(-1), (values - found.values()).reshape(-1)
        squares, squared_error = float(np.vdot(flat, flat)), float(np.vdot(off, off))
    else:
        squared_error, squares = _native.pack(
            raw, dtype, rows, cols, *layout.native, data, order, tensor.offset, threads
        )
    return float((squared_error / squares) ** 0.5) if squares > 0 else 0.0


def finite_values(tensor: SourceTensor) -> npt.NDArray[np.float32]:
    """A tensor's values in its own shape: float32, rows in the engine's order, its offset added.

    Raises:
        ModelError: a value is not finite; the tensor is named.
    """
    values = _native.dequantize_ggml(tensor.data, tensor.dtype, math.prod(tensor.shape), 1)
    values = values.reshape(tensor.shape)
    if tensor.row_order is not None:
        values = values[tensor.row_order]
    if tensor.offset:
        values = values + np.float32(tensor.offset)
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ModelError(
            f"{tensor.name}: value {at} is {values.flat[at]}, not a finite number",
            hint="the file is damaged or the model diverged: get it again",
        )
    return np.ascontiguousarray(values, np.float32)


def pack_model(source: Opened, recipe: Recipe, threads: int | None = None) -> PackedModel:
    """Pack every matrix of a model by a recipe.

    Args:
        source: the opened model.
        recipe: a layout for each linear layer; a tied embedding follows the head.
        threads: None uses the cores this process may use.

    Raises:
        ModelError: a value is not finite; the tensor is named.
        UsageError: the recipe names layers that are not there, or a group does not divide a layer's inputs.
        MachineError: so much memory is not free.
    """
    matrices = {name: tensor for name, tensor in source.tensors.items() if len(tensor.shape) == 2}
    strange = sorted(set(recipe.layers) - set(matrices))
    if strange:
        raise UsageError(
            f"recipe {recipe.name} names layers that {source.name} does not have: {', '.join(strange[:3])}",
            hint=f"layer names look like {', '.join(list(matrices)[:3])}",
        )
    layouts = {name: recipe.layout_for(name) or source_layout(tensor) for name, tensor in matrices.items()}
    sizes = [layouts[name].bytes_of(*t.shape) for name, t in matrices.items()]
    starts = np.concatenate([[0], np.cumsum([-(-size // _ALIGN) * _ALIGN for size in sizes])])
    memory_room().require(int(starts[-1]), f"{source.name} as {recipe.name}")
    memory = _native.allocate(int(starts[-1]))  # one block for all: huge pages
    linears = {}
    for (name, tensor), start, size in zip(matrices.items(), starts, sizes, strict=False):
        part = memory[int(start) : int(start) + size]
        linears[name] = pack_linear(tensor, recipe.layout_for(name), part, threads)
    vectors = {
        name: finite_values(tensor) for name, tensor in source.tensors.items() if len(tensor.shape) == 1
    }
    return PackedModel(source.config, recipe, linears, vectors)


def integers(linear: PackedLinear, first: int = 0, count: int | None = None) -> Encoded:
    """The integers of some rows of a matrix.

    Args:
        linear: of 8 bits or fewer.
        first: a multiple of 16.
        count: rows; None takes all that follow.

    Costs about six times the rows' unpacked bytes while it works.
    """
    layout = linear.layout
    assert layout.bits != 16 and first % PANEL == 0
    rows = linear.rows - first if count is None else min(count, linear.rows - first)
    group, quants = layout.group, layout.group * (8 if layout.bits == 8 else layout.bits) // 8 * PANEL
    block = quants + 2 * PANEL * (1 if layout.symmetric else 2)
    blocks = _panels(linear, first, rows).reshape(-1, _padded(linear) // group, block)
    u = _unpacked(blocks[..., :quants], layout)  # [panels, blocks, group, 16]
    flat = u.transpose(0, 3, 1, 2).reshape(len(blocks) * PANEL, -1)[:rows, : linear.cols]
    groups = -(-linear.cols // group)

    def halves(at: int) -> Halves:
        found = np.ascontiguousarray(blocks[..., at : at + 2 * PANEL]).view(np.float16)
        return np.ascontiguousarray(found.transpose(0, 2, 1).reshape(-1, found.shape[1])[:rows, :groups])

    minimums = None if layout.symmetric else halves(quants + 2 * PANEL)
    return Encoded(layout, np.ascontiguousarray(flat), halves(quants), minimums)


def bf16_bits(linear: PackedLinear, first: int = 0, count: int | None = None) -> npt.NDArray[np.uint16]:
    """Some rows of a bf16 matrix as bits, uint16 [rows, cols]; `first` as in `integers`."""
    assert linear.layout.bits == 16 and first % PANEL == 0
    rows = linear.rows - first if count is None else min(count, linear.rows - first)
    pairs = _panels(linear, first, rows).view(np.uint16).reshape(-1, _padded(linear) // 2, PANEL, 2)
    flat = pairs.transpose(0, 2, 1, 3).reshape(len(pairs) * PANEL, -1)
    return np.ascontiguousarray(flat[:rows, : linear.cols])


def piece_of(linear: PackedLinear, rows: slice, cols: slice) -> PackedLinear | None:
    """Some rows and columns of a matrix, in its layout; nothing else of it is read.

    None where they do not begin and end at whole panels and groups: decode all of it, and take them then.
    """
    layout = linear.layout
    first, last, _ = rows.indices(linear.rows)
    left, right, _ = cols.indices(linear.cols)
    high, wide = last - first, right - left
    if layout.table:
        return _piece_of_table(linear, (first, last), (left, right))
    step = 32 if layout.bits == 16 else max(layout.group, 32)
    is_whole = (last % PANEL == 0 or last == linear.rows) and (right % step == 0 or right == linear.cols)
    if first % PANEL or left % step or not is_whole:
        return None
    panels = _panels(linear, first, high).reshape(
        -1, _padded(linear) // step, PANEL * _step_bytes(layout, step)
    )
    data = np.ascontiguousarray(panels[:, left // step : -(-right // step)]).reshape(-1)
    return PackedLinear(layout, high, wide, data)


def _step_bytes(layout: Format, step: int) -> int:
    """Bytes a row has of so many columns."""
    return int(step * layout.bits_per_weight) // 8


def _piece_of_table(
    linear: PackedLinear, rows: tuple[int, int], cols: tuple[int, int]
) -> PackedLinear | None:
    layout = linear.layout
    found = from_bytes(linear.data, layout, linear.rows, linear.cols)
    spans = []
    for (first, last), each, size in ((rows, layout.rows, linear.rows), (cols, layout.group, linear.cols)):
        if each and (first % each or (last % each and last != size)):
            return None
        spans.append(slice(first // each, -(-last // each)) if each else slice(None))
    codes = found.codes[rows[0] : rows[1], cols[0] : cols[1]]
    part = Encoded(layout, codes, np.ascontiguousarray(found.scales[spans[0], spans[1]]))
    return PackedLinear(layout, len(codes), codes.shape[1], to_bytes(part))


def row_pieces(linear: PackedLinear, weights: int = 1 << 22) -> list[tuple[int, int]]:
    """(first, count) of rows that cover a matrix, each of about `weights` weights."""
    step = max(1, weights // (linear.cols * PANEL)) * PANEL
    return [(first, min(step, linear.rows - first)) for first in range(0, linear.rows, step)]


def _padded(linear: PackedLinear) -> int:
    multiple = 32 if linear.layout.bits == 16 else max(32, linear.layout.group)
    return -(-linear.cols // multiple) * multiple


def _panels(linear: PackedLinear, first: int, rows: int) -> Bytes:
    panel_bytes = linear.data.size // -(-linear.rows // PANEL)
    return linear.data[first // PANEL * panel_bytes : -(-(first + rows) // PANEL) * panel_bytes]


def _unpacked(data: Bytes, layout: Format) -> Bytes:
    """[panels, blocks, bytes] -> u [panels, blocks, group, 16]."""
    bits, group = layout.bits, layout.group
    lead = data.shape[:2]
    if bits == 8:
        return data.reshape(*lead, group // 4, PANEL, 4).swapaxes(-1, -2).reshape(*lead, group, PANEL)
    plane = data[..., : 8 * group].reshape(*lead, group // 8, 1, PANEL, 4)
    u = np.concatenate([plane & 15, plane >> 4], axis=3)  # [.., group / 8, 2, 16, 4]
    u = u.swapaxes(-1, -2).reshape(*lead, group, PANEL)
    rest = data[..., 8 * group :]
    if bits == 5:
        high = np.unpackbits(rest.reshape(*lead, group // 4, 8), axis=-1, bitorder="little")
        u |= high.reshape(*lead, group // 4, PANEL, 4).swapaxes(-1, -2).reshape(*lead, group, PANEL) << 4
    if bits == 6:
        packed = rest.reshape(*lead, group // 16, 1, PANEL, 4)
        shifts = np.arange(0, 8, 2, dtype=np.uint8).reshape(4, 1, 1)
        pairs = ((packed >> shifts) & 3).swapaxes(-1, -2)  # [.., group / 16, 4, 4, 16]
        u |= pairs.reshape(*lead, group, PANEL) << 4
    return u


def pack_integers(name: str, found: Encoded) -> PackedLinear:
    """Integers, scales and minimums into a matrix of the engine; every value is kept.

    Raises:
        ModelError: a scale is not finite; the matrix is named.
    """
    layout, (rows, cols) = found.layout, found.codes.shape
    groups = found.scales.shape[1]
    padding = groups * layout.group - cols  # a layer narrower than its group is filled up with zeros
    zero = 1 << (layout.bits - 1) if layout.symmetric else 0
    u = np.pad(found.codes, ((0, 0), (0, padding)), constant_values=zero) if padding else found.codes
    numbers = [found.scales] if found.minimums is None else [found.scales, found.minimums]
    head = np.stack([n.astype(np.float32) for n in numbers], axis=-1)  # [rows, groups, 1 or 2]
    blocks = np.concatenate([head.view(np.uint8), u.reshape(rows, groups, layout.group)], axis=-1)
    kind = f"{'S' if layout.symmetric else 'A'}{layout.bits}_{layout.group}"
    made = pack_linear(SourceTensor(name, (rows, cols + padding), kind, blocks.reshape(-1)), None)
    return replace(made, cols=cols)
