"""How numbers are stored: formats, tensors, artifacts, the store of packed weights. No device, no method.

The registry of formats says how a matrix of weights is stored. A new format is one line in `FORMATS`. A
matrix [rows, cols] is stored as one code a weight, and as numbers that a block of weights shares:

    weight = scale * value(code)              value(code) = table[code], or code - 2^(bits-1) for integers
    weight = scale * code + minimum           integers with a minimum (`-asym`)
    weight = the bfloat16 with these bits     bf16

`hasten.weights.codec` encodes and decodes every format in NumPy. This file imports nothing of the package: a
recipe names formats, and `hasten --help` must not import NumPy.

Sources: fp8-e4m3: OCP 8-bit Floating Point Specification 1.0. mxfp4: OCP Microscaling Formats (MX)
Specification 1.0, with elements e2m1 and scales e8m0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from hasten.errors import UsageError

ScaleType = Literal["none", "fp16", "fp32", "e8m0"]
SCALE_BITS: dict[ScaleType, int] = {"none": 0, "fp16": 16, "fp32": 32, "e8m0": 8}
PANEL = 16
"""Rows that lie together where the CPU engine's kernels read a matrix (native/layout.h)."""


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: one of `FORMATS`, as `format_named` and `Format.of` give them."""

    name: str
    bits: int  # of a code
    group: int = 32  # inputs that share a scale; 0: all inputs
    rows: int = 1  # outputs that share a scale; 0: all outputs
    scale: ScaleType = "fp16"
    symmetric: bool = True  # False: a minimum of the scale's type beside each scale
    table: tuple[float, ...] = field(default=(), repr=False, compare=False)  # a value a code
    version: int = 1  # raised where the meaning of stored bytes changes

    @staticmethod
    def of(bits: int = 16, group: int = 32, symmetric: bool = True) -> Format:
        """The format of integers of so many bits, or bf16.

        Args:
            bits: 16 is bf16; 8, 6, 5, 4 are integers.
            group: inputs that share one fp16 scale: 32, 64 or 128; 16 is for GGUF's k-quants.
            symmetric: False gives each group an fp16 minimum too.

        Raises:
            UsageError: there is no such format.
        """
        if bits not in (16, 8, 6, 5, 4):
            raise UsageError(
                f"a weight format of {bits} bits does not exist", hint="use 16, 8, 6, 5 or 4 bits"
            )
        if bits == 16:
            return FORMATS["bf16"]
        if group not in (16, 32, 64, 128):
            raise UsageError(f"group size {group} is not supported", hint="use a group of 32, 64 or 128")
        return FORMATS[_integer_name(bits, group, symmetric)]

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers with a scale a group."""
        return self.bits < 16 and not self.table

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight, with the scales and minimums of groups; those of whole rows count nothing."""
        if not self.group or self.scale == "none":
            return float(self.bits)
        numbers = SCALE_BITS[self.scale] * (1 if self.symmetric else 2)
        return self.bits + numbers / (self.group * max(self.rows, 1))

    @property
    def native(self) -> tuple[int, int, bool]:
        """(bits, group, symmetric) as the CPU engine's kernels know the format.

        Raises:
            UsageError: no kernel of the CPU engine reads it.
        """
        if self.table:
            raise UsageError(
                f"no kernel of the CPU engine reads weights in {self.name}",
                hint="decode them while they load: --recipe bf16",
            )
        return self.bits, self.group, self.symmetric

    def bytes_of(self, rows: int, cols: int) -> int:
        """Bytes of a matrix as an artifact holds it.

        Integers and bf16 lie in the panels of native/layout.h: rows padded to 16, columns to whole groups, or
        to 32. Tables lie as codes row by row, two of 4 bits a byte, and scales behind them.
        """
        if self.table:
            high, wide = self.blocks(rows, cols)
            return rows * -(-cols * self.bits // 8) + high * wide * SCALE_BITS[self.scale] // 8
        step = 32 if self.bits == 16 else max(self.group, 32)
        weights = -(-rows // PANEL) * PANEL * (-(-cols // step) * step)
        return int(weights * self.bits_per_weight / 8)

    def blocks(self, rows: int, cols: int) -> tuple[int, int]:
        """How many scales a matrix has: (down the rows, along the inputs)."""
        return -(-rows // self.rows) if self.rows else 1, -(-cols // self.group) if self.group else 1

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FormatParts:
    """A format by its parts: so recipe files may write it, and the first two versions of artifacts did."""

    bits: int = 16
    group: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        self.format()

    def format(self) -> Format:
        """The format.

        Raises:
            UsageError: there is none.
        """
        return Format.of(self.bits, self.group, self.symmetric)


def _integer_name(bits: int, group: int, symmetric: bool) -> str:
    return f"w{bits}" + (f"-g{group}" if group != 32 else "") + ("" if symmetric else "-asym")


def _float_values(exponent_bits: int, mantissa_bits: int, bias: int, nan_from: int) -> Iterator[float]:
    """Values of all codes of a small float, sign bit first; magnitudes from `nan_from` on are no numbers."""
    count = 1 << (exponent_bits + mantissa_bits)
    for code in range(2 * count):
        exponent, mantissa = divmod(code % count, 1 << mantissa_bits)
        whole = mantissa / (1 << mantissa_bits) + (1 if exponent else 0)
        value = whole * 2.0 ** (max(exponent, 1) - bias) if code % count < nan_from else float("nan")
        yield -value if code >= count else value


_E4M3 = tuple(_float_values(4, 3, bias=7, nan_from=127))
_E2M1 = tuple(_float_values(2, 1, bias=1, nan_from=8))

FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("bf16", 16, scale="none"),
        *(
            Format(_integer_name(bits, group, symmetric), bits, group, symmetric=symmetric)
            for bits in (8, 6, 5, 4)
            for group in (16, 32, 64, 128)
            for symmetric in (True, False)
        ),
        Format("fp8-e4m3", 8, 0, scale="fp32", table=_E4M3),
        Format("fp8-e4m3-tensor", 8, 0, 0, scale="fp32", table=_E4M3),
        Format("fp8-e4m3-block", 8, 128, 128, scale="fp32", table=_E4M3),
        Format("mxfp4", 4, 32, scale="e8m0", table=_E2M1),
    )
}
"""Every format, by name."""

TABLE_NAMES = tuple(sorted((one.name for one in FORMATS.values() if one.table), key=len, reverse=True))


def format_named(name: str) -> Format:
    """A format by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in FORMATS:
        raise UsageError(f"unknown weight format {name!r}", hint=f"formats: {', '.join(FORMATS)}")
    return FORMATS[name]
