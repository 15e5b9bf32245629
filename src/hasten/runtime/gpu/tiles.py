"""A packed model's weights on a device: as tensors, whole or a rank's share, and as the persistent kernel
streams them, with the roundings that make them. Any torch device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hasten.core import READERS, Format, ModelSpec
from hasten.errors import ModelError
from hasten.machine.probe import FP8_CAPABILITY
from hasten.runtime.gpu.batch_weights import Precision, TensorOf
from hasten.runtime.gpu.plain import send
from hasten.runtime.gpu.ranks import Piece, Shard
from hasten.runtime.gpu.shape import E4M3_MAX, GROUPS, TILE_ROWS, TileLayout, WeightFormat
from hasten.weights import FORMATS, PANEL
from hasten.weights.packed import PackedLinear, PackedModel, pack_linear, piece_of, values_of
from hasten.weights.tensors import SourceTensor

_NIBBLE_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word, for 8 neighbouring columns: pairs lie 16 bits apart
_FP8_ROWS = 16  # the library multiplies e4m3 matrices of whole sixteens of rows

Pieces = Callable[[str, Piece], list[PackedLinear]]
"""A matrix's name, and what is wanted of it -> that, one range of rows behind another."""


@dataclass(frozen=True)
class Weights:
    """One matrix in a format, not yet in tiles.

    Attributes:
        codes: [rows, cols] bf16, e4m3 or uint8 (what is stored: signed integers + 8 or + 128).
        scales: float32 [rows] where the format has no groups, else fp16 [rows, cols / group]; None for bf16.
        minimums: fp16 [rows, cols / group] where the format has them.
    """

    format: WeightFormat
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    minimums: torch.Tensor | None = None

    def to(self, device: str) -> Weights:
        """The same on another device."""
        moved = (None if t is None else t.to(device) for t in (self.scales, self.minimums))
        return Weights(self.format, self.codes.to(device), *moved)

    @property
    def offset(self) -> int:
        """What is taken off a stored integer; 0 where a minimum does it."""
        if self.format.minimum:
            return 0
        return {"int4": 8, "int8": 128}.get(self.format.kind, 0)

    def values(self) -> torch.Tensor:
        """What the weights mean, float32 [rows, cols]."""
        codes = self.codes.float() - self.offset
        if self.scales is None:
            return codes
        if not self.format.group:
            return codes * self.scales[:, None]
        spread = [t.float().repeat_interleave(self.format.group, 1) for t in self._numbers()]
        values = codes * spread[0][:, : codes.shape[1]]
        return values if len(spread) == 1 else values + spread[1][:, : codes.shape[1]]

    def _numbers(self) -> list[torch.Tensor]:
        """fp16 [rows, groups] each: scales, and minimums where there are some."""
        return [t for t in (self.scales, self.minimums) if t is not None]


def kept(linear: PackedLinear, device: str) -> Weights:
    """A packed matrix of integers, taken out of its panels on the device; 5, 6, 8 bits become int8.

    `hasten.weights.packed.integers` does the same in NumPy: 1.5 s for a matrix that takes milliseconds here.
    """
    layout, bits, group = linear.layout, linear.layout.bits, linear.layout.group
    fmt = WeightFormat("int4" if bits == 4 else "int8", group, not layout.symmetric)
    quants, wide = group * bits // 8 * PANEL, -(-linear.cols // group)
    size = quants + 2 * PANEL * (1 if layout.symmetric else 2)
    blocks = send(linear.data, device).view(-1, wide, size)

    def halves(at: int) -> torch.Tensor:
        found = blocks[..., at : at + 2 * PANEL].contiguous().view(torch.float16)
        return found.transpose(1, 2).reshape(-1, wide)[: linear.rows].contiguous()

    codes = _unpacked(blocks[..., :quants], bits, group).permute(0, 3, 1, 2).reshape(-1, wide * group)
    codes = codes[: linear.rows, : linear.cols].contiguous()
    if layout.symmetric:
        codes = codes + ((8 if bits == 4 else 128) - (1 << (bits - 1)))
    return Weights(fmt, codes, halves(quants), None if layout.symmetric else halves(quants + 2 * PANEL))


def _unpacked(data: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """uint8 [panels, blocks, bytes] -> codes [panels, blocks, group, PANEL], as native/layout.h has them."""
    lead = data.shape[:2]

    def by_input(found: torch.Tensor) -> torch.Tensor:
        return found.transpose(-1, -2).reshape(*lead, group, PANEL)

    if bits == 8:
        return by_input(data.reshape(*lead, group // 4, PANEL, 4))
    plane = data[..., : 8 * group].reshape(*lead, group // 8, 1, PANEL, 4)
    codes, rest = by_input(torch.cat((plane & 15, plane >> 4), 3)), data[..., 8 * group :]
    if bits == 5:
        places = torch.arange(8, dtype=torch.uint8, device=data.device)
        high = (rest.reshape(*lead, group // 4, 8, 1) >> places) & 1
        codes = codes | by_input(high.reshape(*lead, group // 4, PANEL, 4)) << 4
    if bits == 6:
        places = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device).view(4, 1, 1)
        pairs = (rest.reshape(*lead, group // 16, 1, PANEL, 4) >> places) & 3
        codes = codes | by_input(pairs) << 4
    return codes


def joined(parts: Sequence[Weights]) -> Weights:
    """Matrices of one format with the same columns, one below the other."""
    scales = [p.scales for p in parts if p.scales is not None]
    minimums = [p.minimums for p in parts if p.minimums is not None]
    return Weights(
        parts[0].format,
        torch.cat([p.codes for p in parts]),
        torch.cat(scales) if scales else None,
        torch.cat(minimums) if minimums else None,
    )


def rounded(values: torch.Tensor, fmt: WeightFormat) -> Weights:
    """Round a matrix [rows, cols] to a format, each value to the nearest.

    Scales are products and not quotients: a GPU divides by a constant otherwise than a CPU, and ties are
    common.
    """
    if fmt.kind == "bf16":
        return Weights(fmt, values.to(torch.bfloat16))
    if not fmt.group:
        most = E4M3_MAX if fmt.kind == "fp8" else 127.0
        scales = (values.float().abs().amax(1) * (1 / most)).clamp_min(1e-30)
        return Weights(fmt, _codes(values.float() / scales[:, None], fmt), scales)
    rows, cols = values.shape
    if cols % fmt.group:
        raise ModelError(f"{cols} inputs are not whole groups of {fmt.group}")
    grouped = values.float().reshape(rows, -1, fmt.group)
    low, high = grouped.amin(2), grouped.amax(2)
    levels = 15 if fmt.kind == "int4" else 255
    if fmt.minimum:
        scales = ((high - low) * (1 / levels)).half().clamp_min(2**-24)
        minimums = low.half()
        scaled = (grouped - minimums.float()[..., None]) / scales.float()[..., None]
        return Weights(fmt, _codes(scaled.reshape(rows, cols), fmt), scales, minimums)
    most = E4M3_MAX if fmt.kind == "fp8" else levels // 2
    scales = (torch.maximum(high, -low) * (1 / most)).half().clamp_min(2**-24)
    return Weights(fmt, _codes((grouped / scales.float()[..., None]).reshape(rows, cols), fmt), scales)


def _codes(scaled: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    if fmt.kind == "fp8":
        return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    levels = 16 if fmt.kind == "int4" else 256
    offset = 0 if fmt.minimum else levels // 2
    return (scaled.round() + offset).clamp(0, levels - 1).to(torch.uint8)


def tiled(weights: Weights, layout: TileLayout) -> torch.Tensor:
    """A matrix in the kernel's order: uint8 [tiles, tile bytes].

    Rows and columns past the matrix are filled with what stands for 0.
    """
    if weights.format != layout.format or tuple(weights.codes.shape) != layout.shape:
        raise ModelError(
            f"weights are {weights.format} {tuple(weights.codes.shape)}, "
            f"and the layout is for {layout.format} {layout.shape}"
        )
    warps = layout.tuning.warps
    padded_rows, padded_cols = layout.tiles * TILE_ROWS, layout.steps * 32 * warps
    codes = weights.codes.view(torch.uint8) if weights.format.kind == "fp8" else weights.codes
    codes = _padded(codes, padded_rows, padded_cols, weights.offset)
    words = _words(codes, weights.format).view(layout.tiles, TILE_ROWS, warps, layout.steps, 4, -1)
    numbers = _unit_numbers(weights, layout, padded_rows, padded_cols)
    if weights.scales is not None and layout.has_row_scales:
        scales = _padded(weights.scales.float()[:, None], padded_rows, 1, 0)
        row_scales = scales.contiguous().view(torch.uint8).view(layout.tiles, -1)
    stages, first = [], 0
    for steps in layout.stage_steps:
        parts = [_lane_order(words[:, :, :, first : first + steps])]
        if numbers is not None:
            units = slice(first // layout.unit_steps, (first + steps) // layout.unit_steps)
            taken = numbers[:, :, :, units].permute(0, 2, 1, 3, 4)  # [tile, warp, row, unit, number]
            parts.append(taken.contiguous().view(torch.uint8).view(layout.tiles, -1))
        if layout.has_row_scales:
            parts.append(row_scales)
        stages += parts
        first += steps
    return torch.cat(stages, 1)


def interleaved(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Tiles of gate and up in turn, as one matrix: [2 tiles, tile bytes]."""
    return torch.stack((gate, up), 1).flatten(0, 1)


def _padded(matrix: torch.Tensor, rows: int, cols: int, value: int) -> torch.Tensor:
    if tuple(matrix.shape) == (rows, cols):
        return matrix
    whole = torch.full((rows, cols), value, dtype=matrix.dtype, device=matrix.device)
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole


def _words(codes: torch.Tensor, fmt: WeightFormat) -> torch.Tensor:
    """32-bit words of 8 neighbouring columns each: int32 [rows, cols / 8 * words]."""
    if fmt.kind != "int4":
        return codes.contiguous().view(torch.int32)
    nibbles = codes.view(codes.shape[0], -1, 8).to(torch.int32)
    word = torch.zeros_like(nibbles[..., 0])
    for column, place in enumerate(_NIBBLE_PLACES):
        word |= nibbles[..., column] << (4 * place)
    return word


def _lane_order(words: torch.Tensor) -> torch.Tensor:
    """[tile, row, warp, step, quarter, word] -> uint8 [tile, bytes]: a lane's words in pieces of 16, 8, 4."""
    tiles, _, warps, steps, _, count = words.shape
    lanes = words.permute(0, 2, 1, 4, 3, 5).reshape(tiles, warps, 32, steps * count)
    pieces, first = [], 0
    total = steps * count
    for size in (4,) * (total // 4) + ((2,) if total & 2 else ()) + ((1,) if total & 1 else ()):
        pieces.append(lanes[..., first : first + size].reshape(tiles, warps, -1))
        first += size
    return torch.cat(pieces, 2).contiguous().view(torch.uint8).view(tiles, -1)


def _unit_numbers(weights: Weights, layout: TileLayout, rows: int, cols: int) -> torch.Tensor | None:
    """fp16 [tile, row, warp, unit, number]: a scale (and minimum) for every unit of columns of a warp."""
    if not layout.numbers:
        return None
    unit = layout.unit_steps * 32
    spread = [
        _padded(t.repeat_interleave(layout.format.group // unit, 1)[:, : cols // unit], rows, cols // unit, 0)
        for t in weights._numbers()
    ]
    return torch.stack(spread, 2).view(layout.tiles, TILE_ROWS, layout.tuning.warps, -1, layout.numbers)


# ---- a packed model's parameters -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """Where weights come from, and the precision they get.

    `tiles` are the linear layers in a format that the persistent kernel alone reads: one sequence is decoded
    with them, and prompts and batches with the same values in bf16.
    """

    of: TensorOf
    precision: Precision = "bf16"
    head: Precision = "bf16"
    tiles: Callable[[str], Weights] | None = None


def tensors_of(packed: PackedModel, device: str) -> Tensors:
    """A packed model's parameters; fp8 stays fp8 where all layers are and the GPU multiplies it, everything
    else becomes bf16. Integers are kept beside that where each product has one format in all layers."""
    linears, head = packed.linears, packed.config.head_name
    layouts = {linears[name].layout for name in packed.config.linear_shapes() if name != head}
    in_fp8 = all(layout.name.startswith("fp8") for layout in layouts) and (
        device == "cpu" or torch.cuda.get_device_capability() >= FP8_CAPABILITY
    )
    is_whole = packed.config.vocab % _FP8_ROWS == 0
    head_in_fp8 = in_fp8 and is_whole and linears[head].layout.name.startswith("fp8")
    are_integers = _has_tiles({name: linears[name].layout for name in packed.config.linear_shapes()})

    def tensor(name: str) -> torch.Tensor | None:
        if name in linears:
            return matrix_of(linears[name], device)
        found = packed.vectors.get(name)
        return None if found is None else torch.from_numpy(np.array(found))

    def tile(name: str) -> Weights:
        linear = linears[name]
        if linear.layout.is_integer:
            return kept(linear, device)
        return Weights(WeightFormat(), matrix_of(linear, device))

    return Tensors(
        tensor,
        "fp8" if in_fp8 else "bf16",
        "fp8" if head_in_fp8 else "bf16",
        tile if are_integers else None,
    )


def _fp8_values(linear: PackedLinear, device: str) -> torch.Tensor:
    """An e4m3 matrix, float32 [rows, cols]: codes row by row, then scales; multiplied on the device."""
    rows, cols, layout = linear.rows, linear.cols, linear.layout
    data = send(linear.data, device)
    down, along = layout.blocks(rows, cols)
    scales = data[rows * cols :].clone().view(torch.float32).view(down, along)
    for dim, size, count in ((0, layout.rows, rows), (1, layout.group, cols)):
        if scales.shape[dim] > 1:
            scales = scales.repeat_interleave(size, dim).narrow(dim, 0, count)
    return data[: rows * cols].view(torch.float8_e4m3fn).view(rows, cols).float() * scales


def _has_tiles(layouts: Mapping[str, Format]) -> bool:
    """Whether the persistent kernel streams these linear layers as they are: integers in groups that it knows
    and perhaps bf16, one format a product in all layers."""
    by_product: dict[str, set[Format]] = {}
    for name, layout in layouts.items():
        member = name.rpartition(".")[2]
        product = next((group for group, parts in READERS.items() if member in parts), "head")
        by_product.setdefault(product, set()).add(layout)
    found = {layout for some in by_product.values() for layout in some}
    are_known = all((one.is_integer and one.group in GROUPS) or one.bits == 16 for one in found)
    is_one_each = all(len(some) == 1 for some in by_product.values())
    return are_known and is_one_each and any(one.is_integer for one in found)


def weight_bytes(config: ModelSpec, precision: Precision, head: Precision) -> int:
    """Bytes of a model's matrices on the device: the embedding in bf16, and a head of its own."""
    shapes, size = config.linear_shapes(), {"bf16": 2, "fp8": 1}
    layers = sum(rows * cols for name, (rows, cols) in shapes.items() if name != config.head_name)
    return layers * size[precision] + config.vocab * config.width * (2 + size[head])


def matrix_of(linear: PackedLinear, device: str) -> torch.Tensor:
    """A matrix [rows, cols], taken out of its panels on the device: bf16 as it is stored, else float32."""
    if linear.layout.is_integer and linear.layout.group in GROUPS:
        return kept(linear, device).values()
    if linear.layout.name.startswith("fp8"):
        return _fp8_values(linear, device)
    if linear.layout.bits != 16:
        return torch.from_numpy(values_of(linear))
    data = send(linear.data, device).view(torch.bfloat16)
    width = -(-linear.cols // 32) * 32
    panels = data.view(-1, width // 2, PANEL, 2).transpose(1, 2)  # [panels, PANEL, width / 2, 2]
    return panels.reshape(-1, width)[: linear.rows, : linear.cols]


# ---- a rank's share of them ----------------------------------------------------------------------------


def cut(linear: PackedLinear, piece: Piece) -> list[PackedLinear]:
    """A piece of a matrix, in its own format; in bf16 where it begins or ends inside a group or a panel."""
    found = [piece_of(linear, rows, piece.cols) for rows in piece.rows]
    if all(found):
        return [one for one in found if one is not None]
    values = values_of(linear)
    return [_in_bf16(values[rows][:, piece.cols]) for rows in piece.rows]


def _in_bf16(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> PackedLinear:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return pack_linear(SourceTensor("a piece", values.shape, "F32", data), FORMATS["bf16"])


def _head(whole: Tensors, shard: Shard) -> Precision:
    return whole.head if len(shard.vocabulary) % _FP8_ROWS == 0 else "bf16"


def share_of_tensors(whole: Tensors, shard: Shard) -> Tensors:
    """A share's parameters of a whole model's, which are made one by one."""

    def tensor(name: str) -> torch.Tensor | None:
        piece, found = shard.piece(name), whole.of(shard.source(name))
        return None if piece is None or found is None else piece.of(found, torch.cat)

    return Tensors(tensor, whole.precision, _head(whole, shard))


def tensors_of_share(packed: PackedModel, shard: Shard, device: str, pieces: Pieces) -> Tensors:
    """A share's parameters by the names of `shard.local`, as `tensors_of` gives a whole model's.

    Args:
        packed: the whole model; of its matrices only the formats are looked at.
        pieces: gives them.
    """
    whole = tensors_of(packed, device)

    def tensor(name: str) -> torch.Tensor | None:
        piece, source = shard.piece(name), shard.source(name)
        if piece is None:
            return None
        if source in packed.linears:
            return torch.cat([matrix_of(one, device) for one in pieces(source, piece)])
        found = packed.vectors.get(source)
        return None if found is None else torch.from_numpy(np.array(piece.of(found, np.concatenate)))

    def tile(name: str) -> Weights:
        piece = shard.piece(name)
        assert piece is not None
        found = pieces(shard.source(name), piece)
        if all(one.layout.is_integer for one in found):
            return joined([kept(one, device) for one in found])
        return Weights(WeightFormat(), torch.cat([matrix_of(one, device) for one in found]))

    return Tensors(tensor, whole.precision, _head(whole, shard), tile if whole.tiles is not None else None)
