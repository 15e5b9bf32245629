"""The frontier of speed against divergence, drawn as inline SVG by hand: no plotting library, no script."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.report.axis import ticks
from hasten.report.figures import median, number, small, text

_WIDTH, _HEIGHT = 480, 340  # of the view box: one unit is one pixel on a small phone's full width
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 26, 44
_LABEL = 12  # font size

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One recipe in the figure."""

    name: str
    kl: float
    speed: float  # decoded tokens a second
    measured: bool  # False: predicted from its bytes
    passes: bool
    chosen: bool


def frontier(search: Mapping[str, Any]) -> str:
    """The figure: KL divergence on a log axis, decode speed upwards, the start as a line."""
    baseline = median(search["baseline"]["measurement"], "decode_tok_per_s")
    points = points_of(search)
    if not points:
        return ""
    across, ticks_x = _log_axis([p.kl for p in points])
    up, ticks_y = _linear_axis(max([p.speed for p in points] + [baseline or 0.0]))
    parts = [*_grid(across, ticks_x, up, ticks_y), *_start(up, baseline)]
    taken: list[Box] = [(_LEFT, up(baseline) - _LABEL - 4, _LEFT + 130.0, up(baseline))] if baseline else []
    parts += [_mark(p, across(p.kl), up(p.speed)) for p in points]
    taken += [(across(p.kl) - 6, up(p.speed) - 6, across(p.kl) + 6, up(p.speed) + 6) for p in points]
    for p in sorted(points, key=lambda p: not p.chosen):
        parts.append(_label(p, across(p.kl), up(p.speed), taken))
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="f-title f-desc">'
        f'<title id="f-title">Decode speed against divergence from the source</title>'
        f'<desc id="f-desc">{text(_described(points, baseline))}</desc>{"".join(parts)}</svg>'
    )


def points_of(search: Mapping[str, Any]) -> list[Point]:
    """Every candidate; one that was not timed gets the speed its bytes predict, marked as such."""
    predict = predictor(search)
    found = []
    for candidate in search["candidates"]:
        measured = median(candidate["measurement"], "decode_tok_per_s")
        speed = measured if measured is not None else predict(candidate["weight_bytes"])
        if speed is None:
            continue
        found.append(
            Point(
                name=candidate["recipe"],
                kl=max(float(candidate["verdict"]["kl_mean"]), 1e-6),
                speed=speed,
                measured=measured is not None,
                passes=candidate["verdict"]["status"] == "pass",
                chosen=candidate["recipe"] == search["chosen"],
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
    if len(timed) < 2:
        return lambda _: None
    mean_x = sum(x for x, _ in timed) / len(timed)
    mean_y = sum(y for _, y in timed) / len(timed)
    spread = sum((x - mean_x) ** 2 for x, _ in timed)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in timed) / spread if spread else 0.0
    fixed = mean_y - slope * mean_x

    def predict(weight_bytes: float) -> float | None:
        seconds = fixed + slope * weight_bytes
        return 1 / seconds if slope > 0 and seconds > 0 else None

    return predict


def _log_axis(values: Sequence[float]) -> tuple[Callable[[float], float], list[float]]:
    low = math.floor(math.log10(min(values)) - 0.05)
    high = max(math.ceil(math.log10(max(values)) + 0.05), low + 1)
    width = _WIDTH - _LEFT - _RIGHT

    def place(value: float) -> float:
        return _LEFT + width * (math.log10(value) - low) / (high - low)

    return place, [10.0**power for power in range(low, high + 1)]


def _linear_axis(highest: float) -> tuple[Callable[[float], float], list[float]]:
    found = ticks(highest, room=1.05)
    height = _HEIGHT - _TOP - _BOTTOM

    def place(value: float) -> float:
        return _HEIGHT - _BOTTOM - height * value / found[-1]

    return place, found


def _grid(
    across: Callable[[float], float],
    ticks_x: Sequence[float],
    up: Callable[[float], float],
    ticks_y: Sequence[float],
) -> list[str]:
    floor = _HEIGHT - _BOTTOM
    parts = []
    for tick in ticks_y:
        y = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks_x:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{_LEFT - 40}" y="14">decode, tokens a second</text>')
    parts.append(
        f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        "mean KL divergence from the source, nats (log): closer is left</text>"
    )
    return parts


def _start(up: Callable[[float], float], baseline: float | None) -> list[str]:
    if baseline is None:
        return []
    y = up(baseline)
    return [
        f'<line class="start" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>',
        f'<text class="soft" x="{_LEFT + 6}" y="{y - 5:.1f}">bf16 start {number(baseline)}</text>',
    ]


def _mark(point: Point, x: float, y: float) -> str:
    kind = "chosen" if point.chosen else "pass" if point.passes else "fail"
    hollow = "" if point.measured else " hollow"
    about = f"<title>{text(_sentence(point))}</title>"
    if point.passes:  # a shape for each verdict: colour alone says nothing to some
        return f'<circle class="{kind}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">{about}</circle>'
    corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
    return f'<polygon class="{kind}{hollow}" points="{corners}">{about}</polygon>'


def _label(point: Point, x: float, y: float, taken: list[Box]) -> str:
    """The name where it covers nothing: beside, above or below its mark."""
    wide = 0.58 * _LABEL * len(point.name) + 2
    places = [(x + 9, y + 4), (x - 9 - wide, y + 4)]
    places += [(x + dx, y + dy) for dy in (-10, 19, -24, 33) for dx in (-wide / 2, 9, -9 - wide)]

    def clash(place: tuple[float, float]) -> float:
        left, base = place
        box = (left, base - _LABEL + 1, left + wide, base + 3)
        outside = max(0.0, _LEFT - box[0]) + max(0.0, box[2] - _WIDTH + 2) + max(0.0, _TOP - 12 - box[1])
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


def _described(points: Sequence[Point], baseline: float | None) -> str:
    return f"bf16 start: {number(baseline)} tokens a second. " + ". ".join(_sentence(p) for p in points) + "."
