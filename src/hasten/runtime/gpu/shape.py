"""From a ModelSpec to the persistent kernel's compile-time values, and how its weights are shared out.

The kernel computes the same layout from the same values (kernels/product.cuh) and tells it, so that a
difference is an error at load and never a wrong answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

from hasten.cache.reading import read_text
from hasten.core import READERS, ModelSpec
from hasten.errors import UsageError
from hasten.models import rope
from hasten.runtime.gpu.driver import Device

WeightKind = Literal["bf16", "fp8", "int8", "int4"]
ProductName = Literal["qkv", "o", "gate_up", "down", "head"]
PRODUCTS: tuple[ProductName, ...] = ("qkv", "o", "gate_up", "down", "head")
PAGE = 32  # tokens
TILE_ROWS = 8
E4M3_MAX = 448.0
GROUPS = (32, 64, 128)  # inputs that may share a scale
STEP_COLS = 32  # columns one tensor-core instruction takes
_KINDS: tuple[WeightKind, ...] = ("bf16", "fp8", "int8", "int4")
_SOURCES = ("primitives.cuh", "product.cuh", "args.cuh", "attention.cuh", "decode.cu")
_RESERVED_SHARED_BYTES = 1024  # the system's, a block
_MOST_SPLITS = 32  # lanes that merge them
# Registers a consumer needs beside its inputs and weights: found by compiling until nothing spilled.
_SPARE_REGISTERS = {8: 112, 16: 64}
_MOST_STEPS = {8: 78, 16: 28}  # of 32 inputs a warp whose operands fit its registers


@dataclass(frozen=True)
class WeightFormat:
    """How one product's weights are stored on the device.

    `group` inputs share one fp16 scale (and minimum); 0 is a float32 scale a row, or none for bf16. With a
    `minimum`, w = scale * q + minimum; else q is signed: stored as q + 8 or q + 128.
    """

    kind: WeightKind = "bf16"
    group: int = 0
    minimum: bool = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UsageError(f"unknown weight format {self.kind!r}", hint=f"use {', '.join(_KINDS)}")
        if self.group not in (0, *GROUPS):
            raise UsageError(f"group size {self.group} is not supported", hint="use 32, 64 or 128")
        if self.kind == "bf16" and (self.group or self.minimum):
            raise UsageError("bf16 weights have no scales", hint="drop group and minimum")
        if self.kind == "int4" and not self.group:
            raise UsageError("int4 weights need a group size", hint="use a group of 32, 64 or 128")
        if self.minimum and (not self.group or self.kind == "fp8"):
            raise UsageError("a minimum goes with groups of integers", hint="use int8 or int4 with a group")

    def __str__(self) -> str:
        return self.kind + (f"-g{self.group}" if self.group else "") + ("-asym" if self.minimum else "")


@dataclass(frozen=True)
class Tuning:
    """What may be measured and chosen freely; no value changes a result but in rounding.

    Attributes:
        warps: consumers a block, 8 or 16; 16 were never faster.
        blocks: of the grid, one a multiprocessor; None is 128, or fewer for a narrow model: every block must
            own a tile of every product, since what a block publishes is how the others know that it has read.
        slot_bytes: of one stage of the ring.
        in_flight: stages asked for and not yet arrived, at most; 0 is as many as the ring holds. Fewer make
            the exchange between blocks faster and memory slower. None is 3 for wide bf16 models, else 2.
        slots: of the ring; None is as many as fit, at most 12.
        splits: blocks that share one KV head's context; None is as many as there are, at most 32.
        trace: keep clock marks of every block and layer, for finding out where the time goes.
    """

    warps: int = 8
    blocks: int | None = None
    slot_bytes: int = 17408
    in_flight: int | None = None
    slots: int | None = None
    splits: int | None = None
    trace: bool = False


@dataclass(frozen=True)
class Shape:
    """One kernel: a model, its weight formats, a tuning."""

    config: ModelSpec
    formats: Mapping[ProductName, WeightFormat]
    biases: frozenset[str] = frozenset()  # of "q", "k", "v", "o", "gate", "up", "down"
    tuning: Tuning = field(default_factory=Tuning)

    def __post_init__(self) -> None:
        for problem in problems(self.config, self.tuning):
            raise UsageError(f"the persistent decode kernel cannot hold this model: {problem}")

    @property
    def blocks(self) -> int:
        """Blocks of the grid."""
        return grid_blocks(self.config, self.tuning)

    @property
    def in_flight(self) -> int:
        """Stages asked for and not yet arrived, at most."""
        if self.tuning.in_flight is not None:
            return self.tuning.in_flight
        return 3 if self.config.width >= 2048 and self.formats["down"].kind == "bf16" else 2

    @property
    def padded_head(self) -> int:
        """Head size in the KV cache."""
        return -(-self.config.blocks[0].mixer.head_dim // 64) * 64

    @property
    def splits(self) -> int:
        """Blocks that share the context of one KV head; fixed, so that a result never depends on load."""
        most = min(self.tuning.splits or _MOST_SPLITS, self.blocks // self.config.blocks[0].mixer.kv_heads)
        return int(2 ** int(math.log2(most)))

    def layout(self, name: ProductName) -> TileLayout:
        """How the weights of one product are laid out."""
        return TileLayout(self.formats[name], matrix_shape(self.config, name), self.tuning)

    def defines(self) -> dict[str, int | str]:
        """Every compile-time value of the kernel."""
        c, t = self.config, self.tuning
        mixer, ways = c.blocks[0].mixer, c.blocks[0].feed_forward
        values: dict[str, int | str] = {
            "LAYERS": len(c.blocks),
            "WIDTH": c.width,
            "FEED": ways.width,
            "HEADS": mixer.heads,
            "KV_HEADS": mixer.kv_heads,
            "HEAD_DIM": mixer.head_dim,
            "VOCAB": c.vocab,
            "ROTARY": rope.rotations(c)[0].dim,
            "GELU": int(ways.activation == "gelu_tanh"),
            "QK_NORM": ("none", "head", "full").index(mixer.qk_norm),
            "KEY_SHIFT": int("k" in self.biases),
            "NORM_BEFORE": int(c.blocks[0].norms.placement != "post"),
            "NORM_AFTER": int(c.blocks[0].norms.placement != "pre"),
            "WINDOW": max(block.mixer.window or 0 for block in c.blocks),
            "LAYER_FLAGS": ",".join(str(flag) for flag in layer_flags(c)),
            "PAGE": PAGE,
            "SPLITS": self.splits,
            "WARPS": t.warps,
            "BLOCKS": self.blocks,
            "SLOT_BYTES": t.slot_bytes,
            "IN_FLIGHT": self.in_flight,
            "SPARE_REGISTERS": _SPARE_REGISTERS[t.warps],
        }
        if t.trace:
            values["TRACE"] = 1
        values |= {name: f"{number!r}f" for name, number in self._floats().items()}
        values |= {f"BIAS_{n.upper()}": int(bool(self.biases & {*parts})) for n, parts in READERS.items()}
        for name, fmt in self.formats.items():
            values[f"{name.upper()}_TYPE"] = _KINDS.index(fmt.kind)
            values[f"{name.upper()}_GROUP"] = fmt.group
            values[f"{name.upper()}_MINIMUM"] = int(fmt.minimum)
        return values

    def _floats(self) -> dict[str, float]:
        c = self.config
        mixer = c.blocks[0].mixer
        return {
            "SCORE_SCALE": float(mixer.score_scale),
            "ATTENTION_CAP": float(mixer.softcap or 0),
            "LOGIT_CAP": float(c.head.softcap or 0),
            "EMBED_SCALE": float(c.embedding.scale),
            "NORM_EPS": float(c.final_norm.eps),
        }

    def slots(self, device: Device) -> int:
        """Stages of the ring that fit beside everything else, at most 12: more were never faster."""
        free = device.shared_bytes - _RESERVED_SHARED_BYTES - self._fixed_shared_bytes()
        fit = min(free // self.tuning.slot_bytes, 12)
        if fit < 2:
            raise UsageError(
                "the persistent decode kernel cannot hold this model: its activations leave no shared memory"
            )
        return min(fit, self.tuning.slots or fit)

    def _fixed_shared_bytes(self) -> int:
        """An upper bound of `Shared` and `Attention` of the kernel, bytes."""
        c, warps = self.config, self.tuning.warps
        mixer = c.blocks[0].mixer
        ratio, padded = mixer.heads // mixer.kv_heads, self.padded_head
        span = -(-c.width // (STEP_COLS * warps)) * STEP_COLS
        shared = 512 * warps + 64 * 256 + warps * -(-span // 64) * 256 + 1024
        sets = 1  # of query heads whose registers fit a warp: head_sets of kernels/attention.cuh
        while -(-ratio // sets) > max(1, (32 if warps > 8 else 64) // (padded // 8)):
            sets *= 2
        partial = warps // sets * ratio * (padded + 2) * 4
        return shared + padded * 4 * (2 * ratio + 7) + 256 + partial + 1024


@dataclass(frozen=True)
class TileLayout:
    """A matrix in the order the kernel streams it: tiles of 8 rows, each in stages of one slot.

    A warp owns `steps` * 32 neighbouring columns of every tile. Inside a stage come each warp's words, lane
    by lane in 16-byte pieces, then each warp's and row's fp16 scales (and minimums), or a float32 scale
    a row.
    """

    format: WeightFormat
    shape: tuple[int, int]  # rows, columns; gate and up each have these rows
    tuning: Tuning

    @property
    def step_words(self) -> int:
        """32-bit words a lane for its 8 weights of a step."""
        return {"bf16": 4, "fp8": 2, "int8": 2, "int4": 1}[self.format.kind]

    @property
    def steps(self) -> int:
        """Steps of 32 columns a warp."""
        return -(-self.shape[1] // (STEP_COLS * self.tuning.warps))

    @property
    def unit_steps(self) -> int:
        """Steps one stored scale is for."""
        if not self.format.group:
            return self.steps
        return math.gcd(self.format.group, self.steps * STEP_COLS) // STEP_COLS

    @property
    def numbers(self) -> int:
        """fp16 numbers a row and unit: scale, minimum."""
        return 0 if not self.format.group else 1 + self.format.minimum

    @property
    def has_row_scales(self) -> bool:
        """Whether every stage ends with a float32 scale a row."""
        return self.format.kind != "bf16" and not self.format.group

    def stage_bytes(self, steps: int) -> int:
        """Bytes of a stage of so many steps."""
        warps, units = self.tuning.warps, -(-steps // self.unit_steps)
        row_scales = 32 if self.has_row_scales else 0
        return warps * 128 * self.step_words * steps + warps * 16 * self.numbers * units + row_scales

    @property
    def stage_steps(self) -> list[int]:
        """Steps of every stage of a tile."""
        whole = math.lcm(self.unit_steps if self.format.group else 1, 4 // self.step_words)
        most = whole
        while self.stage_bytes(most + whole) <= self.tuning.slot_bytes:
            most += whole
        even = math.ceil(self.steps / math.ceil(self.steps / most))
        each = min(self.steps, math.ceil(even / whole) * whole)
        return [min(each, self.steps - first) for first in range(0, self.steps, each)]

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile."""
        return sum(self.stage_bytes(steps) for steps in self.stage_steps)

    @property
    def tiles(self) -> int:
        """Tiles of the matrix; of gate as many as of up."""
        return -(-self.shape[0] // TILE_ROWS)


def matrix_shape(config: ModelSpec, name: ProductName) -> tuple[int, int]:
    """Rows and columns of a product; of gate_up those of one of the two."""
    ways = config.blocks[0].feed_forward
    mixer = config.blocks[0].mixer
    heads, kv_heads, size = mixer.heads, mixer.kv_heads, mixer.head_dim
    return {
        "qkv": ((heads + 2 * kv_heads) * size, config.width),
        "o": (config.width, heads * size),
        "gate_up": (ways.width, config.width),
        "down": (config.width, ways.width),
        "head": (config.vocab, config.width),
    }[name]


def grid_blocks(config: ModelSpec, tuning: Tuning) -> int:
    """Blocks of the grid: at most one for every tile of the narrowest product."""
    narrowest = min(matrix_shape(config, name)[0] for name in PRODUCTS)
    return min(tuning.blocks or 128, -(-narrowest // TILE_ROWS))


def layer_flags(config: ModelSpec) -> list[int]:
    """A number a layer: 1 where it slides, 2 where it rotates."""
    mixers = (block.mixer for block in config.blocks)
    return [int(mixer.window is not None) + 2 * int(mixer.rotary is not None) for mixer in mixers]


def problems(config: ModelSpec, tuning: Tuning) -> Iterable[str]:
    """What of a model or a tuning the kernel cannot hold, in words."""
    c = config
    ways = c.blocks[0].feed_forward
    mixer = c.blocks[0].mixer
    if mixer.heads % mixer.kv_heads:
        yield f"{mixer.heads} query heads do not divide among {mixer.kv_heads} KV heads"
    elif mixer.heads // mixer.kv_heads > 8:
        yield f"{mixer.heads // mixer.kv_heads} query heads share a KV head, at most 8 can"
    if mixer.head_dim % 8 or not 8 <= mixer.head_dim <= 256:
        yield f"a head size of {mixer.head_dim}; it must be a multiple of 8 up to 256"
    if rope.rotations(c)[0].dim % 2:
        yield f"{rope.rotations(c)[0].dim} rotary dimensions; the number must be even"
    for what, columns in (("width", c.width), ("feed-forward width", ways.width)):
        if columns % 2:
            yield f"a {what} of {columns}; it must be even"
    most = tuning.warps * STEP_COLS * _MOST_STEPS[tuning.warps]
    widest = max(c.width, ways.width, mixer.heads * mixer.head_dim)
    if widest > most:
        yield f"{widest} inputs of one product; {most} fit its registers with {tuning.warps} warps"
    if mixer.kv_heads > grid_blocks(c, tuning):
        yield f"{mixer.kv_heads} KV heads on {grid_blocks(c, tuning)} blocks"


@lru_cache(maxsize=1)
def kernel_source() -> str:
    """The CUDA C++ of the kernel, without its defines."""
    folder = Path(__file__).parent / "kernels"
    return "".join(read_text(folder / name) for name in _SOURCES)
