"""A machine by what was measured on it: lines through times of real layer shapes (`hasten.bench.calibrate`).

For each format and number of rows, the time of a product of linear layers is a line over its weights:

    seconds = fixed_s + unit_s * weights

The fixed part is forks, joins and the first misses; the slope is reading or arithmetic, whichever is slower.
Between two measured numbers of rows both are interpolated. What works token by token (norms, rotation, gates)
has such lines over its own sizes. Attention is fitted for each size of a head over all shapes,
rows and contexts together:

    seconds = fixed + rows * H * D * a + bytes of keys and values * b + queries * keys * H * D * c

Every line keeps the root of its mean squared relative residual. A step's interval joins those with how much
the machine's own speed moved while it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from hasten.core import Attention, Format
from hasten.errors import MachineError, UsageError
from hasten.speed.cost import HEAD, Load, Product, kv_token_bytes, seen_by_prompt, window_of
from hasten.speed.pace import Bound, Spent, Step
from hasten.weights import FORMATS

ANSWER, PROMPT = "answer", "prompt"
_LEAST_ERROR = 0.01
_UNSEEN_ERROR = 0.1
"""Of a format that was not timed itself: its nearest relative's time, by the bytes."""
NINETY = 1.645  # standard deviations to either side that hold nine tenths of a normal distribution
QUERIES = 64  # of a prompt that read a key together: what attention's kernels take at a time, about


@dataclass(frozen=True)
class Point:
    """A line at one number of rows."""

    rows: int
    fixed_s: float
    unit_s: float
    error: float  # root mean square of relative residuals


@dataclass(frozen=True)
class Curve:
    """Lines at growing numbers of rows."""

    points: tuple[Point, ...]

    def scaled(self, factor: float) -> Curve:
        """The same for a machine that takes so many times as long."""
        return Curve(
            tuple(replace(p, fixed_s=factor * p.fixed_s, unit_s=factor * p.unit_s) for p in self.points)
        )

    def at(self, rows: float) -> Point:
        """The line at a number of rows: between neighbours, and on from the last two beyond them."""
        points = self.points
        if len(points) == 1 or rows <= points[0].rows:
            return points[0]
        upper = next((i for i, point in enumerate(points) if point.rows >= rows), len(points) - 1)
        a, b = points[upper - 1], points[upper]
        place = (rows - a.rows) / (b.rows - a.rows)
        return Point(
            round(rows),
            max(0.0, a.fixed_s + place * (b.fixed_s - a.fixed_s)),
            max(0.0, a.unit_s + place * (b.unit_s - a.unit_s)),
            max(a.error, b.error) * max(1.0, place),
        )


@dataclass(frozen=True)
class Weighing:
    """Attention's times over four features (`answer_features`, `prompt_features`)."""

    factors: tuple[float, ...]
    error: float

    def scaled(self, factor: float) -> Weighing:
        """The same for a machine that takes so many times as long."""
        return Weighing(tuple(factor * one for one in self.factors), self.error)

    def seconds(self, features: Sequence[float]) -> float:
        return sum(factor * feature for factor, feature in zip(self.factors, features, strict=True))


def answer_features(
    mixer: Attention, int8: bool, sequences: float, rows: float, context: float
) -> list[float]:
    """Of one layer: 1, rows x H x D, bytes of keys and values, queries x keys x H x D."""
    seen, size = min(window_of(mixer), context), mixer.heads * mixer.head_dim
    return [1.0, rows * size, sequences * seen * kv_token_bytes(mixer, int8), rows * seen * size]


def prompt_features(mixer: Attention, int8: bool, past: int, count: int) -> list[float]:
    """Of one layer and one piece of a prompt: as `answer_features`, keys read once for QUERIES queries."""
    window, size = window_of(mixer), mixer.heads * mixer.head_dim
    seen = seen_by_prompt(window, past + count) - seen_by_prompt(window, past)
    read = math.ceil(count / QUERIES) * seen / count * kv_token_bytes(mixer, int8)
    return [1.0, count * size, read, seen * size]


def non_negative(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[list[float], float]:
    """Factors of at least 0 with the least squared relative residual, and its root mean square.

    A factor that would be negative is taken to be 0 and the others are fitted again.
    """
    scaled = np.asarray(features, float) / np.asarray(seconds, float)[:, None]
    size = np.maximum(np.abs(scaled).max(axis=0), 1e-300)
    there = list(range(scaled.shape[1]))
    factors = np.zeros(scaled.shape[1])
    while there:
        found = np.linalg.lstsq(scaled[:, there] / size[there], np.ones(len(seconds)), rcond=None)[0]
        if found.min() >= 0:
            factors[there] = found / size[there]
            break
        del there[int(found.argmin())]
    off = scaled @ factors - 1
    free = max(1, len(seconds) - len(there))
    return factors.tolist(), math.sqrt(float(off @ off) / free)


def line(rows: int, units: Sequence[float], seconds: Sequence[float]) -> Point:
    """The line through times of several sizes at one number of rows."""
    (fixed, unit), error = non_negative([[1.0, one] for one in units], seconds)
    return Point(rows, fixed, unit, max(error, _LEAST_ERROR))


@dataclass(frozen=True)
class Calibration:
    """What was measured on a machine. Made by `hasten.bench.calibrate`, kept as a record."""

    cpu: str
    isa: str
    threads: int
    curves: Mapping[str, Curve]  # `linear w4 answer` -> lines; also norm, rope, gated
    attentions: Mapping[str, Weighing]  # `bf16 answer 64`, `int8 prompt 128` ...
    choose_s: float  # of greedy choice, a logit
    step_s: float  # of a step outside the kernels
    answer_s: float  # the same for each answer in it
    noise: float  # how much the machine's own speed moved: standard deviation of its logarithm
    canary_s: tuple[
        float, ...
    ]  # of the steps of known speed that were timed beside: the machine's speed then
    seconds: float  # it took
    repeated: int  # rounds that other work disturbed and that were taken again
    untrusted: int = 0  # times that stayed disturbed to the end
    timed: int = 0  # times in all
    splits: bool = False  # prompts and answers take different kernels, in two calls (AMX)
    source: str = field(default="measured on this machine", compare=False)
    is_measured: bool = field(default=True, compare=False)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Calibration:
        """What `hasten.core.as_json` made of one."""
        curves = {
            name: Curve(tuple(Point(**point) for point in curve["points"]))
            for name, curve in record["curves"].items()
        }
        attentions = {
            name: Weighing(tuple(one["factors"]), one["error"]) for name, one in record["attentions"].items()
        }
        more = {"curves": curves, "attentions": attentions, "canary_s": tuple(record["canary_s"])}
        return cls(**{**record, **more})

    @property
    def is_doubtful(self) -> bool:
        """Whether more than a tenth of its times stayed disturbed: errors are larger than intervals say."""
        return 10 * self.untrusted > self.timed

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """Formats that were timed."""
        names = {name.split()[1] for name in self.curves if name.startswith("linear ")}
        return tuple(FORMATS[name] for name in sorted(names))

    def spent(self, load: Load, step: Step) -> Spent:
        tally = _Tally()
        for mode, rows in self._calls(load, step):
            self._layers(load, mode, rows, tally)
        if step.answers:
            self._answers(load, step, tally)
        for piece in step.pieces:
            for mixer, count in load.mixers:
                features = prompt_features(mixer, load.kv_int8, piece.past, piece.count)
                self._attend(load, PROMPT, mixer, features, count, tally)
        if step.drawn:
            for product in load.products:
                if product.part == HEAD:
                    self._product(product, ANSWER, step.drawn, tally)
            tally.add("choosing tokens", "choose", self.choose_s * load.vocab * step.drawn, 0.1)
        tally.add("a step's fixed cost", "step", self.step_s + self.answer_s * step.drawn, 0.1)
        return tally.spent(self.noise)

    def _calls(self, load: Load, step: Step) -> Iterator[tuple[str, int]]:
        """The native calls of a step: what kernels, how many rows."""
        if self.splits and load.integers:
            yield from ((m, n) for m, n in ((ANSWER, step.answer_rows), (PROMPT, step.prompt_rows)) if n)
        elif step.prompt_rows or step.answer_rows:
            mode = PROMPT if step.prompt_rows else ANSWER
            yield mode, step.answer_rows + step.prompt_rows

    def _layers(self, load: Load, mode: str, rows: int, tally: _Tally) -> None:
        for product in load.products:
            if product.part != HEAD:
                self._product(product, mode, rows * product.share, tally)
        kind = "int" if load.integers else "bf16"
        sizes = {
            f"norm {kind} {mode}": 2 * load.layers * load.width,
            f"gated {kind} {mode}": load.layers * load.feed_forward,
            f"rope {mode}": sum(count * turned(mixer) for mixer, count in load.mixers),
        }
        forks = {f"norm {kind} {mode}": 2 * load.layers}
        for name, size in sizes.items():
            found = self._curve(name).at(rows)
            seconds = forks.get(name, load.layers) * found.fixed_s + size * found.unit_s
            tally.add("norms, rotation, gates", name, seconds, found.error)

    def _product(self, product: Product, mode: str, rows: float, tally: _Tally) -> None:
        if rows <= 0:
            return
        curve, factor, error = self._linear(product, mode)
        found, alone = curve.at(max(rows, 1.0)), curve.at(1.0)
        reached = product.count * (1.0 if product.share == 1 else min(1.0, 1 - (1 - product.share) ** rows))
        seconds = reached * (found.fixed_s + factor * found.unit_s * product.weights)
        reading = reached * (alone.fixed_s + factor * alone.unit_s * product.weights)
        name = "the output head" if product.part == HEAD else "linear layers"
        tally.add(name, f"linear {product.layout} {mode}", seconds, max(found.error, error))
        tally.read += min(seconds, reading) if mode == ANSWER else 0.0

    def _linear(self, product: Product, mode: str) -> tuple[Curve, float, float]:
        """The curve of a product's format, what its slope is multiplied with, and an error of the choice."""
        layout = product.layout
        if layout is None or layout.table:
            raise UsageError(
                f"the CPU engine has no kernel for {layout or 'values of an unknown format'}",
                hint="estimate bf16: the engine decodes such weights while it loads (--recipe bf16)",
            )
        own = self.curves.get(f"linear {layout} {mode}")
        if own is not None:
            return own, 1.0, 0.0
        alike = [one for one in self.formats if (one.bits == 16) == (layout.bits == 16)]
        if not alike:
            raise MachineError(
                f"no format like {layout} was timed on this machine", hint="use --calibrate to time it again"
            )
        near = min(alike, key=lambda one: (abs(one.bits - layout.bits), abs(one.group - layout.group)))
        factor = layout.bits_per_weight / near.bits_per_weight if mode == ANSWER else 1.0
        return self.curves[f"linear {near} {mode}"], factor, _UNSEEN_ERROR

    def _answers(self, load: Load, step: Step, tally: _Tally) -> None:
        for mixer, count in load.mixers:
            features = answer_features(mixer, load.kv_int8, step.answers, step.answer_rows, step.context)
            tally.read += self._attend(load, ANSWER, mixer, features, count, tally)

    def _attend(
        self, load: Load, mode: str, mixer: Attention, features: Sequence[float], count: int, tally: _Tally
    ) -> float:
        """Seconds of `count` such layers, by the fit of the nearest head size."""
        start = f"{'int8' if load.kv_int8 else 'bf16'} {mode} "
        sizes = [int(name.removeprefix(start)) for name in self.attentions if name.startswith(start)]
        name = f"{start}{min(sizes, key=lambda size: abs(math.log(size / mixer.head_dim)))}"
        seconds = count * self.attentions[name].seconds(features)
        tally.add("attention", f"attention {name}", seconds, self.attentions[name].error)
        return seconds

    def _curve(self, name: str) -> Curve:
        return self.curves[name]


def turned(mixer: Attention) -> int:
    """Values of a token's queries, keys and values: what rotation and the cache work on."""
    return (mixer.heads + 2 * mixer.kv_heads) * mixer.head_dim


class _Tally:
    """Seconds of a step by part, and their errors: those of one fit go together, others are independent."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.read = 0.0  # seconds that reading memory would take alone
        self._errors: dict[str, float] = {}  # fit -> seconds

    def add(self, part: str, fit: str, seconds: float, error: float) -> None:
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        self._errors[fit] = self._errors.get(fit, 0.0) + seconds * error

    def spent(self, noise: float) -> Spent:
        total = sum(self.parts.values())
        error = math.hypot(math.sqrt(sum(e * e for e in self._errors.values())) / max(total, 1e-12), noise)
        wide = math.exp(NINETY * error)
        bound: Bound = "memory" if 2 * self.read >= total else "compute"
        return Spent(total, bound, self.parts, low_s=total / wide, high_s=total * wide)
