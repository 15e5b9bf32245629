"""Seconds of one step of the engine: the protocol, and the roofline from a machine's ceilings.

A step computes one token (or a few, with drafts) of each answer that decodes and pieces of prompts beside
them. The roofline says

    t_read    = (weight bytes + bytes of keys and values) / (read bandwidth x e_read)
    t_compute = int8 ops / (int8 ceiling x e_linear) + bf16 ops / (bf16 ceiling x e_linear)
                + attention ops / (bf16 ceiling x e_attention)
    t         = max(t_read, t_compute) + t_step

The e are fractions of the ceilings that real kernels reach (`Efficiency`). `hasten.speed.fit` is the
other way: times that were measured on the machine. The ceilings of a machine that is not here are the peaks
of its data sheet (`hasten estimate --machine h200`): an interval goes from half of that share to the peaks.

Limits of the roofline. Reading and computing are taken to overlap fully, which flatters batches near the
balance point; a model that fits into the last-level cache decodes faster than it says; and ceilings measured
while others use the machine are too low.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from hasten.cache.reading import read_text
from hasten.core import Machine, Recipe
from hasten.errors import MachineError, UsageError
from hasten.speed.cost import HEAD, Load, kv_token_bytes, seen_by_prompt, window_of

Bound = Literal["memory", "compute"]


@dataclass(frozen=True)
class Piece:
    """Tokens of one prompt that a step computes."""

    past: int  # tokens before them
    count: int
    ends: bool = True  # the prompt ends with them: an answer's first token is drawn


@dataclass(frozen=True)
class Step:
    """What one step computes."""

    answers: int = 0  # sequences that decode
    context: float = 0.0  # keys that a row of theirs sees, mean
    rows: int = 1  # rows of each: the newest token and drafts behind it
    pieces: tuple[Piece, ...] = ()

    @property
    def answer_rows(self) -> int:
        return self.answers * self.rows

    @property
    def prompt_rows(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def drawn(self) -> int:
        """Rows that go through the head."""
        return self.answer_rows + sum(piece.ends for piece in self.pieces)


@dataclass(frozen=True)
class Spent:
    """Seconds of a step."""

    seconds: float
    bound: Bound
    parts: Mapping[str, float] = field(default_factory=dict)  # seconds by what takes them
    low_s: float = 0.0  # a 90 % interval
    high_s: float = 0.0


class Pace(Protocol):
    """How fast a machine is."""

    @property
    def source(self) -> str:
        """Where its figures come from, in a few words."""

    @property
    def is_measured(self) -> bool:
        """Whether they were measured on this machine."""

    def spent(self, load: Load, step: Step) -> Spent:
        """Seconds of a step.

        Raises:
            MachineError: a figure that it needs is unknown.
            UsageError: the machine cannot run a format.
        """


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the measured ceilings that the engine reaches.

    The defaults are what this project demands of its kernels, not measurements.
    """

    read: float = 0.8
    linear: float = 0.6
    attention: float = 0.3
    step_us: float = 0.0  # a step's fixed cost: dispatch, barriers, sampling

    def __post_init__(self) -> None:
        if min(self.read, self.linear, self.attention) <= 0 or self.step_us < 0:
            raise UsageError(
                f"efficiencies must be above 0, got {self}", hint="leave them out for the defaults"
            )


_LEAST = 0.5
"""Of the efficiencies: the slow end of a roofline's interval. Its fast end is the ceilings themselves."""


@dataclass(frozen=True)
class Link:
    """What carries partial sums between devices that compute one model together."""

    gb_per_s: float  # one device to the others, one way
    latency_us: float = 10.0  # of one exchange: what an all-reduce of few bytes takes, no measurement


@dataclass(frozen=True)
class Ceilings:
    """A machine by its ceilings. None is unknown."""

    read_gb_per_s: float | None
    int8_tops: float | None
    bf16_tflops: float | None
    efficiency: Efficiency = field(default_factory=Efficiency)
    devices: int = 1  # that compute one model together, each a share of every layer
    link: Link | None = None
    source: str = "ceilings of this machine"
    is_measured: bool = False

    @classmethod
    def of(cls, machine: Machine, efficiency: Efficiency | None = None, isa: str | None = None) -> Ceilings:
        """Those of a machine.

        Args:
            machine: with measured ceilings.
            efficiency: fractions of them; None: the defaults of `Efficiency`.
            isa: take this instruction set's instead of the machine's best.
        """
        int8, bf16 = machine.int8_tops, machine.bf16_tflops
        if isa is not None:
            int8, bf16 = (
                max(
                    (c.tera_ops_per_s for c in machine.ceilings if (c.isa, c.kind) == (isa, kind)),
                    default=None,
                )
                for kind in ("int8", "bf16")
            )
        return cls(machine.read_gb_per_s, int8, bf16, efficiency or Efficiency())

    def spent(self, load: Load, step: Step) -> Spent:
        read = _need(self.read_gb_per_s, "read bandwidth") * 1e9 * self.devices
        rate, reach = read * self.efficiency.read, self.efficiency
        weights, keys = self._bytes(load, step)
        linear, attention = self._compute(load, step)
        computing = linear / reach.linear + attention / reach.attention
        fixed = reach.step_us * 1e-6 + self._exchange(load, step)
        t_read = (weights + keys) / rate
        best = max((weights + keys) / read, linear + attention) + fixed
        parts = {
            "reading weights": weights / rate,
            "reading keys and values": keys / rate,
            "arithmetic of layers": linear / reach.linear,
            "arithmetic of attention": attention / reach.attention,
            "a step's fixed cost": fixed,
        }
        slowest = max(t_read, computing) / _LEAST + fixed
        bound: Bound = "memory" if t_read >= computing else "compute"
        return Spent(max(t_read, computing) + fixed, bound, parts, low_s=best, high_s=slowest)

    def _bytes(self, load: Load, step: Step) -> tuple[float, float]:
        tokens = step.answer_rows + step.prompt_rows
        products = (p for p in load.products if p.part != HEAD or step.drawn)
        keys = 0.0
        for mixer, count in load.mixers:
            window, each = window_of(mixer), kv_token_bytes(mixer, load.kv_int8) * count
            keys += each * step.answers * min(window, step.context)
            keys += each * sum(min(window, piece.past) for piece in step.pieces)
        return sum(product.read_by(tokens) for product in products), keys

    def _compute(self, load: Load, step: Step) -> tuple[float, float]:
        """Seconds of arithmetic at the ceilings: of linear layers, of attention."""
        tokens, bf16 = step.answer_rows + step.prompt_rows, self._rate(self.bf16_tflops, "bf16 ceiling")
        linear = 0.0
        for product in load.products:
            used = step.drawn if product.part == HEAD else tokens
            rate = bf16
            if product in load.integer_products:
                rate = self._rate(self.int8_tops, "int8 ceiling")
            linear += 2.0 * product.weights * product.count * product.share * used / rate
        attention = 0.0
        for mixer, count in load.mixers:
            window = window_of(mixer)
            seen = step.answer_rows * min(window, step.context) + sum(
                seen_by_prompt(window, piece.past + piece.count) - seen_by_prompt(window, piece.past)
                for piece in step.pieces
            )
            attention += 4.0 * mixer.heads * mixer.head_dim * seen * count / bf16
        return linear, attention

    def _rate(self, tera: float | None, name: str) -> float:
        return _need(tera, name) * 1e12 * self.devices

    def _exchange(self, load: Load, step: Step) -> float:
        """Seconds of summing over devices: two times a layer, 2 bytes a value, once there and once back."""
        if self.devices == 1:
            return 0.0
        if self.link is None:
            raise MachineError(
                f"how {self.devices} of these exchange partial sums is unknown",
                hint="leave --tensor-parallel out, or add link_gb_per_s to the machine's file",
            )
        size = 2 * load.width * (step.answer_rows + step.prompt_rows) * 2 * (self.devices - 1) / self.devices
        return 2 * load.layers * (self.link.latency_us * 1e-6 + size / (self.link.gb_per_s * 1e9))


def _need(value: float | None, name: str) -> float:
    if value is None:
        raise MachineError(
            f"the {name} of this machine is unknown, so nothing can be predicted", hint="run: hasten probe"
        )
    return value


_FILE = Path(__file__).with_name("machines.json")


@dataclass(frozen=True)
class Published:
    """One machine. None is unknown."""

    name: str
    source: str  # who published the figures, and how they were reckoned where nobody did
    read_gb_per_s: float
    bf16_tflops: float  # dense
    title: str = ""
    kind: str = "gpu"  # or cpu
    int8_tops: float | None = None  # of a CPU: integer weights are multiplied so
    fp8_tflops: float | None = None  # of a GPU
    memory_gb: float | None = None
    link_gb_per_s: float | None = None  # to others of its host, one way

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gb is None else round(self.memory_gb * 1e9)

    def pace(self, recipe: Recipe, devices: int = 1) -> Ceilings:
        """Its ceilings. A GPU multiplies narrow weights as bf16, or as fp8 where all of them are."""
        narrow = self.int8_tops
        if self.kind == "gpu":
            narrow = self.fp8_tflops if recipe.name.startswith("fp8") else self.bf16_tflops
            narrow = narrow or self.bf16_tflops
        return Ceilings(
            self.read_gb_per_s,
            narrow,
            self.bf16_tflops,
            devices=devices,
            link=None if self.link_gb_per_s is None else Link(self.link_gb_per_s),
            source=f"published peaks of {self.title or self.name}, not measured",
        )


@cache
def known() -> dict[str, Published]:
    """Machines of the data file, by name."""
    return {record["name"]: Published(**record) for record in json.loads(read_text(_FILE))}


def published(name: str) -> Published:
    """A machine by its name, or of a JSON file with the same fields.

    Raises:
        UsageError: no such name or file, or one that is not as it must be.
    """
    if name.lower() in known():
        return known()[name.lower()]
    if not Path(name).exists():
        raise UsageError(
            f"there is no machine {name!r}, and no file of that name",
            hint=f"use one of {', '.join(known())}, or a JSON file (docs/estimate.md)",
        )
    try:
        record = json.loads(read_text(name))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name} is no JSON file: {error}", hint="see docs/estimate.md for its fields"
        ) from error
    return _checked(record, name)


def _checked(record: Any, name: str) -> Published:
    """A machine of a user's file."""
    hint = 'for example {"name": "mine", "source": "its data sheet", "read_gb_per_s": 300, "bf16_tflops": 20}'
    if not isinstance(record, dict):
        raise UsageError(f"{name} must hold one object, got {type(record).__name__}", hint=hint)
    needed = [one.name for one in fields(Published)][:4]
    if strange := sorted(set(record) - {one.name for one in fields(Published)}):
        raise UsageError(f"{name}: unknown field {strange[0]!r}", hint=hint)
    if missing := [one for one in needed if one not in record]:
        raise UsageError(f"{name}: {missing[0]} is missing", hint=hint)
    texts = ("name", "source", "title", "kind")
    for key, value in record.items():
        if key in texts and not isinstance(value, str):
            raise UsageError(f"{name}: {key} must be text, got {value!r}", hint=hint)
        is_number = (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        )
        if key not in texts and not is_number and not (value is None and key not in needed):
            raise UsageError(f"{name}: {key} must be a number above 0, got {value!r}", hint=hint)
    if record.get("kind", "gpu") not in ("gpu", "cpu"):
        raise UsageError(f"{name}: kind is gpu or cpu, got {record['kind']!r}", hint=hint)
    return Published(**record)
