"""Figures of a search or a benchmark as SVG: no script, no plotting library, drawn from records.

Each is one unit a pixel on a phone; the style makes text smaller where there is more room. Shapes and words
tell marks apart, colours only help: about one man in twelve cannot tell red from green.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core import GAP_SHARES
from hasten.report import Frame, Place, diamond, median, number, small, text, ticks

Record = Mapping[str, Any]

_FRAME = Frame(400, 330, left=40, right=12, top=26, bottom=46)
_LABEL = 13  # font size

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One recipe, or another engine, in the figure."""

    name: str
    kl: float
    speed: float  # decoded tokens a second
    measured: bool  # False: predicted from its bytes
    passes: bool
    chosen: bool
    peer: bool = False


def frontier(search: Mapping[str, Any]) -> str:
    """The figure: KL divergence on a log axis, decode speed upwards, the start as a line."""
    baseline = median(search["baseline"]["measurement"], "decode_tok_per_s")
    points = points_of(search)
    if not points:
        return ""
    across, powers = _log_axis([p.kl for p in points])
    levels = ticks(max([p.speed for p in points] + [baseline or 0.0]), room=1.05)

    def up(speed: float) -> float:
        return _FRAME.up(speed / levels[-1])

    left, top, floor = _FRAME.left, _FRAME.top, _FRAME.floor
    upright = (f'x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{floor}"' for x in map(across, powers))
    parts = [
        f'<text x="{left - 36}" y="14">decode, tokens a second</text>',
        *(f'<line class="grid" {place}/>' for place in upright),
        *_FRAME.grid(
            [(up(tick), f"{tick:g}") for tick in levels],
            [(across(tick), f"{tick:g}") for tick in powers],
            "KL divergence from the source, nats: left is closer",
        ),
    ]
    taken: list[Box] = []
    if baseline is not None:
        y = up(baseline)
        parts.append(f'<line class="start" x1="{left}" y1="{y:.1f}" x2="{_FRAME.end}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="soft" x="{left + 6}" y="{y - 5:.1f}">bf16 start {number(baseline)}</text>'
        )
        taken.append((left, y - _LABEL - 4, left + 130.0, y))
    parts += [_mark(p, across(p.kl), up(p.speed)) for p in points]
    taken += [(across(p.kl) - 6, up(p.speed) - 6, across(p.kl) + 6, up(p.speed) + 6) for p in points]
    for p in sorted(points, key=lambda p: not p.chosen):
        parts.append(_label(p, across(p.kl), up(p.speed), taken))
    about = ". ".join([f"bf16 start: {number(baseline)} tokens a second", *map(_sentence, points)]) + "."
    return _FRAME.chart("f", "Decode speed against divergence from the source", about, "".join(parts))


def points_of(search: Mapping[str, Any]) -> list[Point]:
    """Every candidate and engine that was judged; one that was not timed gets the speed its bytes predict."""
    predict = predictor(search)
    found = []
    for candidate in [*search["candidates"], *(search.get("peers") or [])]:
        measured, verdict = median(candidate["measurement"], "decode_tok_per_s"), candidate["verdict"]
        name, size = candidate.get("recipe"), candidate.get("weight_bytes")
        speed = measured if measured is not None or size is None else predict(size)
        if speed is None or verdict is None:
            continue
        found.append(
            Point(
                name=str(candidate["name"] if name is None else name),
                kl=max(float(verdict["kl_mean"]), 1e-6),
                speed=speed,
                measured=measured is not None,
                passes=verdict["status"] == "pass",
                chosen=name is not None and name == search["chosen"],
                peer=name is None,
            )
        )
    return found


def predictor(search: Mapping[str, Any]) -> Callable[[float], float | None]:
    """Speed from bytes: time a token = fixed + bytes / rate, by least squares through what was timed."""
    timed = [
        (float(m["weight_bytes"]), 1 / m["decode_tok_per_s"]["median"])
        for m in [search["baseline"]["measurement"], *(c["measurement"] for c in search["candidates"])]
        if m is not None and m["weight_bytes"]
    ]
    try:
        slope, fixed = statistics.linear_regression([x for x, _ in timed], [y for _, y in timed])
    except statistics.StatisticsError:  # fewer than two sizes
        return lambda _: None

    def predict(weight_bytes: float) -> float | None:
        seconds = fixed + slope * weight_bytes
        return 1 / seconds if slope > 0 and seconds > 0 else None

    return predict


def _log_axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    low = math.floor(math.log10(min(values)) - 0.05)
    high = max(math.ceil(math.log10(max(values)) + 0.05), low + 1)

    def place(value: float) -> float:
        return _FRAME.across((math.log10(value) - low) / (high - low))

    return place, [10.0**power for power in range(low, high + 1)]


def _mark(point: Point, x: float, y: float) -> str:
    kind = "chosen" if point.chosen else "pass" if point.passes else "fail"
    hollow = "" if point.measured else " hollow"
    about = f"<title>{text(_sentence(point))}</title>"
    if point.peer:
        return f'<rect class="peer{hollow}" {_square(x, y)}>{about}</rect>'
    if point.passes:  # a shape for each verdict: colour alone says nothing to some
        return f'<circle class="{kind}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">{about}</circle>'
    return f'<polygon class="{kind}{hollow}" points="{diamond(x, y)}">{about}</polygon>'


def _square(x: float, y: float) -> str:
    return f'x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"'


def _label(point: Point, x: float, y: float, taken: list[Box]) -> str:
    """The name where it covers nothing: beside, above or below its mark."""
    wide = 0.58 * _LABEL * len(point.name) + 2
    places = [(x + 9, y + 4), (x - 9 - wide, y + 4)]
    places += [(x + dx, y + dy) for dy in (-10, 19, -24, 33) for dx in (-wide / 2, 9, -9 - wide)]

    def clash(place: Place) -> float:
        left, base = place
        box = (left, base - _LABEL + 1, left + wide, base + 3)
        beside = max(0.0, _FRAME.left - box[0]) + max(0.0, box[2] - _FRAME.width + 2)
        outside = beside + max(0.0, _FRAME.top - 12 - box[1])
        return outside * 20 + sum(_overlap(box, other) for other in taken)

    left, base = min(places, key=clash)
    taken.append((left, base - _LABEL + 1, left + wide, base + 3))
    weight = ' class="name strong"' if point.chosen else ' class="name"'
    return f'<text{weight} x="{left:.1f}" y="{base:.1f}">{text(point.name)}</text>'


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _sentence(point: Point) -> str:
    how = "measured" if point.measured else "predicted from its bytes"
    verdict = "chosen" if point.chosen else "within the budget" if point.passes else "not within the budget"
    return f"{point.name}: {number(point.speed)} tokens a second {how}, KL {small(point.kl)}, {verdict}"


# Charts that read like a list: a line of words above each bar, so that they fit a phone --------------------

_WIDE, _EDGE, _STEP = 400, 4.0, 40.0


def _listed(mark: str, title: str, rows: Sequence[tuple[str, str, str, bool]], axis: str, room: float) -> str:
    """Rows of (name, figures, SVG below them, strong); `axis` is drawn under all of them.

    The SVG of a row is drawn as if the row's top were 0.
    """
    height = len(rows) * _STEP
    parts = [f'<g transform="translate(0 {height:.0f})">{axis}</g>']
    for place, (name, said, drawn, strong) in enumerate(rows):
        weight = " strong" if strong else ""
        parts.append(
            f'<g transform="translate(0 {place * _STEP:.0f})">'
            f'<text class="name{weight}" x="{_EDGE}" y="14">{text(name)}</text>'
            f'<text class="name{weight}" x="{_WIDE - _EDGE}" y="14" text-anchor="end">{text(said)}</text>'
            f"{drawn}</g>"
        )
    about = ". ".join(f"{name}: {said}" for name, said, _, _ in rows) + "."
    frame = Frame(_WIDE, round(height + room), left=0, right=0, top=0, bottom=0)
    return frame.chart(mark, title, about, "".join(parts))


def _place(value: float, low: float, high: float) -> float:
    """Where a value stands on an axis from one edge to the other."""
    return _EDGE + (_WIDE - 2 * _EDGE) * (value - low) / (high - low)


def _axis(marks: Iterable[tuple[float, str]], below: str, height: float) -> str:
    """Upright lines through all rows, their names and what they are."""
    lines = []
    for x, name in marks:
        anchor = "start" if x < 20 else "end" if x > _WIDE - 20 else "middle"
        lines.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{-height:.0f}" y2="2"/>'
            f'<text x="{x:.1f}" y="15" text-anchor="{anchor}">{name}</text>'
        )
    return "".join(lines) + f'<text x="{_WIDE / 2}" y="33" text-anchor="middle">{below}</text>'


@dataclass(frozen=True)
class Bar:
    """A stretch of a line, from a value to another."""

    name: str
    said: str
    start: float
    end: float
    kind: str  # its class in the style
    strong: bool = False


def bars(mark: str, title: str, rows: Sequence[Bar], unit: str) -> str:
    """Bars on one axis from 0: a waterfall where each begins at the end of the one before."""
    if not rows or max(max(row.start, row.end) for row in rows) <= 0:
        return ""
    marks = ticks(max(max(row.start, row.end) for row in rows), room=1.0)

    def drawn(row: Bar) -> str:
        first, last = (_place(value, 0, marks[-1]) for value in sorted((row.start, row.end)))
        wide = max(last - first, 1.5)
        return f'<rect class="{row.kind}" x="{first:.1f}" y="20" width="{wide:.1f}" height="11"/>'

    listed = [(row.name, row.said, drawn(row), row.strong) for row in rows]
    axis = _axis([(_place(tick, 0, marks[-1]), f"{tick:,g}") for tick in marks], unit, len(rows) * _STEP)
    return _listed(mark, title, listed, axis, 40)


@dataclass(frozen=True)
class Spread:
    """How one figure is distributed: at GAP_SHARES where there were many, else each value."""

    name: str
    at_shares: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    strong: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        drawn = self._whiskers if self.at_shares else self.values
        return min(drawn), max(drawn)

    @property
    def _whiskers(self) -> tuple[float, float, float, float, float, float]:
        """At 5, 25, 50, 75, 95 and 99 % of all."""
        low, first, middle, last, high, most = (
            self.at_shares[GAP_SHARES.index(share)] for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
        )
        return low, first, middle, last, high, most

    def said(self) -> str:
        if self.at_shares:
            _, _, middle, _, _, most = self._whiskers
            return f"median {_short(middle)}, p99 {_short(most)} ms"
        return f"{_short(min(self.values))} to {_short(max(self.values))} ms, {len(self.values)} runs"

    def drawn(self, across: Callable[[float], float]) -> str:
        if not self.at_shares:
            dots = (f'<circle class="pass" cx="{across(v):.1f}" cy="26" r="4"/>' for v in self.values)
            return "".join(dots)
        low, first, middle, last, high, most = map(across, self._whiskers)
        return (
            f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="26" y2="26"/>'
            f'<rect class="box" x="{first:.1f}" y="20" width="{max(last - first, 1):.1f}" height="12"/>'
            f'<line class="middle" x1="{middle:.1f}" x2="{middle:.1f}" y1="18" y2="34"/>'
            f'<polygon class="fail hollow" points="{diamond(most, 26)}"/>'
        )


def spreads(mark: str, title: str, rows: Sequence[Spread], unit: str) -> str:
    """Distributions under one another on a log axis."""
    if not rows:
        return ""
    low, high = min(row.ends[0] for row in rows), max(row.ends[1] for row in rows)
    low, high = max(low, high / 1e6) / 1.15, high * 1.15

    def across(value: float) -> float:
        return _place(math.log(min(max(value, low), high)), math.log(low), math.log(high))

    marks = [(across(tick), f"{tick:,g}") for tick in _log_ticks(low, high)]
    axis = _axis(marks, unit, len(rows) * _STEP)
    return _listed(mark, title, [(r.name, r.said(), r.drawn(across), r.strong) for r in rows], axis, 40)


def box_key(counted: str) -> str:
    """What the marks of `spreads` mean; `counted` names what they are a distribution of."""
    return (
        f'<p class="key">Box: the middle half of all {counted}, its upright line the median; whiskers: 5 to '
        '95 %; <span><i class="turned k-bad"></i>the 99th percentile</span></p>'
    )


def latencies(timed: Sequence[tuple[str, Record, bool]]) -> tuple[str, str]:
    """Waits for the first token and from token to token, of (name, measurement, strong)."""
    gaps = [Spread(n, tuple(m["gaps_ms"]), (), strong) for n, m, strong in timed if m.get("gaps_ms")]
    firsts = [
        Spread(name, (), tuple(measured["ttft_ms"]["values"]), strong)
        for name, measured, strong in timed
        if measured["ttft_ms"].get("values")
    ]
    after = spreads("gaps", "From a token to the next", gaps, "milliseconds from a token to the next (log)")
    before = spreads("firsts", "Time to the first token", firsts, "milliseconds to the first token (log)")
    if not after:
        return before, ""
    return after + box_key("waits"), before and before + '<p class="key">Each dot is one run.</p>'


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis: few enough that their names do not touch."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [n * 10.0**power for power in powers for n in steps if low <= n * 10.0**power <= high]
        if len(found) <= 7:
            return found
    return found


@dataclass(frozen=True)
class Foretold:
    """A prediction and what was measured of the same."""

    name: str
    unit: str
    predicted: float
    measured: float
    low: float  # of the measured rounds, 10th percentile
    high: float  # 90th
    strong: bool = False

    @property
    def off(self) -> float:
        return self.predicted / self.measured - 1


def foretold(mark: str, title: str, rows: Sequence[Foretold]) -> str:
    """Predictions (hollow) as shares of what was measured, whose rounds spread around 1 (full)."""
    if not rows:
        return ""
    marks = ticks(max(max(row.predicted, row.high, 1.2 * row.measured) / row.measured for row in rows))

    def across(value: float) -> float:
        return _place(value, 0, marks[-1])

    def drawn(row: Foretold) -> str:
        guess, found = across(row.predicted / row.measured), across(1.0)
        low, high = (across(one / row.measured) for one in (row.low, row.high))
        return (
            f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="26" y2="26"/>'
            f'<circle class="pass" cx="{found:.1f}" cy="26" r="4"/>'
            f'<polygon class="chosen hollow" points="{diamond(guess, 26)}"/>'
        )

    listed = []
    for row in rows:
        said = f"{_short(row.predicted)} for {_short(row.measured)} {row.unit}: {100 * row.off:+.0f} %"
        listed.append((row.name, said, drawn(row), row.strong))
    axis = [(across(tick), f"{tick:g}") for tick in marks]
    below = "predicted, as a share of what was measured"
    return _listed(mark, title, listed, _axis(axis, below, len(rows) * _STEP), 40)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


# The roofline -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """A rate of arithmetic that was measured of the machine."""

    name: str
    ops_per_s: float


@dataclass(frozen=True)
class Reached:
    """What a phase of a run reached: operations for each byte it read, and operations a second."""

    name: str
    phase: str  # decode or prompt
    ops_per_byte: float
    ops_per_s: float
    strong: bool = False


_ROOF = Frame(400, 320, left=48, right=12, top=26, bottom=46)


def roofline(bytes_per_s: float | None, ceilings: Sequence[Ceiling], reached: Sequence[Reached]) -> str:
    """Measured points under the measured roof (Williams, Waterman, Patterson, 2009), both axes log.

    Empty where the roof or the points are unknown.
    """
    if not bytes_per_s or not ceilings or not reached:
        return ""
    ridge = max(one.ops_per_s for one in ceilings) / bytes_per_s
    low_x = min(one.ops_per_byte for one in reached) / 2
    high_x = max([*(one.ops_per_byte for one in reached), ridge]) * 2
    low_y = min([*(one.ops_per_s for one in reached), *(one.ops_per_s for one in ceilings)]) / 3
    high_y = max([*(one.ops_per_s for one in ceilings), *(one.ops_per_s for one in reached)]) * 2.5

    def across(value: float) -> float:
        return _ROOF.across(math.log(value / low_x) / math.log(high_x / low_x))

    def up(value: float) -> float:
        return _ROOF.up(math.log(value / low_y) / math.log(high_y / low_y))

    levels = [(up(tick), _rate(tick)) for tick in _powers(low_y, high_y)]
    marks = [(across(tick), f"{tick:g}") for tick in _powers(low_x, high_x)]
    parts = [
        f'<text x="{_ROOF.left - 44}" y="14">operations a second</text>',
        *_ROOF.grid(levels, marks, "operations for each byte that is read"),
        *_roofs(ceilings, bytes_per_s, (low_x, high_x), across, up),
    ]
    start = max(low_x, low_y / bytes_per_s)
    place = across(start), up(start * bytes_per_s)
    top = across(ridge), up(ridge * bytes_per_s)
    parts.append(f'<polyline class="line roof" points="{_pair(place)} {_pair(top)}"/>')
    name = f"reading, {bytes_per_s / 1e9:.0f} GB/s"
    parts.append(f'<text x="{place[0] + 8:.1f}" y="{_ROOF.top + 12:.0f}">{name}</text>')
    last = sorted(reached, key=lambda one: one.strong)  # what is drawn last is seen
    parts += [_reached(one, across(one.ops_per_byte), up(one.ops_per_s)) for one in last]
    about = ". ".join(
        [f"Memory is read at {name}", *(f"{c.name} {_rate(c.ops_per_s)}" for c in ceilings)]
        + [_reached_sentence(one) for one in reached]
    )
    figure = _ROOF.chart("roof", "What was reached of what the machine can do", about + ".", "".join(parts))
    highest = max(one.ops_per_s for one in ceilings)
    above = [one for one in reached if one.ops_per_s > 1.05 * min(highest, one.ops_per_byte * bytes_per_s)]
    return figure + (_ABOVE if above else "")


_ABOVE = (
    '<p class="key">A point above the roof was measured in a better moment than the roof: other work took '
    "part of the machine while its ceilings were measured.</p>"
)


def _roofs(
    ceilings: Sequence[Ceiling],
    bytes_per_s: float,
    between: tuple[float, float],
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> Iterator[str]:
    """The flat part of each ceiling, from where reading would feed it; the highest has its name above it, the
    others below."""
    highest, end = max(one.ops_per_s for one in ceilings), across(between[1])
    for one in ceilings:
        first, y = across(max(between[0], one.ops_per_s / bytes_per_s)), up(one.ops_per_s)
        base, name = y - 5 if one.ops_per_s == highest else y + 14, f"{text(one.name)} {_rate(one.ops_per_s)}"
        yield (
            f'<line class="line roof" x1="{first:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{end:.1f}" y="{base:.1f}" text-anchor="end">{name}</text>'
        )


def _pair(place: Place) -> str:
    return f"{place[0]:.1f},{place[1]:.1f}"


def _powers(low: float, high: float) -> list[float]:
    return [10.0**n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def _rate(ops_per_s: float) -> str:
    """`2 T`, `50 G`."""
    value, unit = (ops_per_s / 1e12, "T") if ops_per_s >= 1e12 else (ops_per_s / 1e9, "G")
    return f"{value:.3g} {unit}"


def _reached(one: Reached, x: float, y: float) -> str:
    kind = "chosen" if one.strong else "pass hollow"
    about = f"<title>{text(_reached_sentence(one))}</title>"
    named = {"decode": (12, 20, "start", "answers"), "prompt": (0, -11, "middle", "prompts")}[one.phase]
    name = (
        f'<text class="name strong" x="{x + named[0]:.1f}" y="{y + named[1]:.1f}" '
        f'text-anchor="{named[2]}">{named[3]}</text>'
        if one.strong
        else ""
    )
    if one.phase == "decode":
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">{about}</circle>{name}'
    return f'<rect class="{kind}" {_square(x, y)}>{about}</rect>{name}'


def _reached_sentence(one: Reached) -> str:
    rate = f"{_rate(one.ops_per_s)} operations a second"
    return f"{one.name}, {one.phase}: {rate} at {one.ops_per_byte:.2g} a byte"


def roof_of(machine: Record, device: str) -> tuple[float | None, list[Ceiling]]:
    """Bytes a second and rates of arithmetic that were measured of what computed."""
    gpus = machine.get("accelerators") or []
    if device == "cuda" and gpus:
        kinds = [("bf16", gpus[0]["bf16_tflops"]), ("fp8", gpus[0]["fp8_tflops"])]
        read = gpus[0]["copy_gb_per_s"]
    else:
        kinds = [("int8", machine.get("int8_tops")), ("bf16", machine.get("bf16_tflops"))]
        read = machine.get("read_gb_per_s")
    known = [Ceiling(name, tera * 1e12) for name, tera in kinds if tera]
    return (None if read is None else read * 1e9), known


def reached(name: str, measured: Record, *, strong: bool = False) -> Iterator[Reached]:
    """Both phases of a run, where what they asked of the machine is known."""
    work = measured["workload"]
    if measured.get("decode_ops") and measured.get("decode_bytes"):
        steps_per_s = measured["decode_tok_per_s"]["median"] / work["batch"]
        ops, read = measured["decode_ops"], measured["decode_bytes"]
        yield Reached(name, "decode", ops / read, ops * steps_per_s, strong)
    if measured.get("prompt_ops") and measured.get("prompt_bytes"):
        prompts_per_s = measured["prefill_tok_per_s"]["median"] / work["prompt"]
        ops, read = measured["prompt_ops"], measured["prompt_bytes"]
        yield Reached(name, "prompt", ops / read, ops * prompts_per_s, strong)
