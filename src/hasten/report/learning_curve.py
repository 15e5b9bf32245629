"""The curve of a distillation, drawn as inline SVG by hand: loss, and divergence on text held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.report.axis import ticks
from hasten.report.figures import number, small, text

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 40, 44

Point = Mapping[str, Any]  # step, tokens, seconds, loss (None before the first step), kl
Place = tuple[float, float]


def learning_curve(points: Sequence[Point]) -> str:
    """Tokens trained on to the right, nats upwards from 0; empty without points."""
    if not points:
        return ""
    across = ticks(max(points[-1]["tokens"], 1))
    losses = [p for p in points if p["loss"] is not None]
    up = ticks(max([p["kl"] for p in points] + [p["loss"] for p in losses] + [1e-9]))

    def place(point: Point, of: str) -> Place:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * point["tokens"] / across[-1]
        return x, _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * point[of] / up[-1]

    lines = _line("second", [place(p, "loss") for p in losses])
    lines += _line("first", [place(p, "kl") for p in points])
    marks = "".join(_mark(p, place(p, "kl")) for p in points)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="c-title c-desc">'
        f'<title id="c-title">Divergence from the teacher while training</title>'
        f'<desc id="c-desc">{text(". ".join(_sentence(p) for p in points))}</desc>'
        f"{_grid(across, up)}{_LEGEND}{lines}{marks}</svg>"
    )


_LEGEND = (
    f'<line class="line first" x1="{_LEFT}" y1="12" x2="{_LEFT + 24}" y2="12"/>'
    f'<text class="name" x="{_LEFT + 30}" y="16">KL on text held out, nats</text>'
    f'<line class="line second" x1="{_LEFT + 200}" y1="12" x2="{_LEFT + 224}" y2="12"/>'
    f'<text class="name" x="{_LEFT + 230}" y="16">loss in training</text>'
)


def _grid(across: Sequence[float], up: Sequence[float]) -> str:
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in up:
        y = floor - (floor - _TOP) * tick / up[-1]
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in across:
        x = _LEFT + (right - _LEFT) * tick / across[-1]
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{_tokens(tick)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">tokens trained on</text>')
    return "".join(parts)


def _tokens(value: float) -> str:
    """20M, 500k, 64."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _line(kind: str, places: Sequence[Place]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline class="line {kind}" points="{points}"/>' if places else ""


def _mark(point: Point, place: Place) -> str:
    x, y = place
    said = f"<title>{text(_sentence(point))}</title>"
    return f'<circle class="first" cx="{x:.1f}" cy="{y:.1f}" r="3">{said}</circle>'


def _sentence(point: Point) -> str:
    loss = "" if point["loss"] is None else f", loss {small(point['loss'])}"
    return (
        f"{number(point['tokens'], 0)} tokens, {number(point['seconds'], 0)} s: KL {small(point['kl'])}{loss}"
    )
