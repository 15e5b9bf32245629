"""report.html of a compressed model: one file, no script, drawn from plan.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.report import (
    Frame,
    Place,
    document,
    facts,
    headings,
    number,
    share,
    small,
    table,
    text,
    ticks,
    tiles,
)
from hasten.report import points as as_points

Record = Mapping[str, Any]

_HEAT = 0.75  # of the heat colour at the largest error: text on it stays readable
_ERRORS = {"error_before": "output error as cut", "error_after": "repaired"}


def compressed_page(plan: Record) -> str:
    """The report of `hasten compress`.

    Args:
        plan: what plan.json holds. Every string in it is escaped.
    """
    made, name = plan["compress"], text(plan["source"]["name"])
    recipe = text(plan["recipe"]["name"])
    body = "".join([_head(plan, made), *map(_step, made["steps"]), _facts(plan, made)])
    return document(f"{name}: {recipe}", body)


def _head(plan: Record, made: Record) -> str:
    files = plan["artifact"]["files"].values()
    peak = made["peak_rss_bytes"]
    figures = [
        (number(plan["recipe"]["bits_per_weight"], 2), "bits a weight, scales and head included"),
        (f"{number(sum(file['bytes'] for file in files) / 1e6)} MB", "on disk"),
        (_time(made["seconds"]), "to make"),
        (text(None) if peak is None else f"{peak / 1e9:.1f} GB", "of memory at most"),
    ]
    return (
        f"<h1>{text(plan['source']['name'])} as {text(plan['recipe']['name'])}</h1>"
        '<p class="lead">What was done to the model, step by step. What it costs in quality, '
        f"<code>hasten eval</code> measures.</p>{tiles(figures)}"
    )


def _step(step: Record) -> str:
    record = step["record"]
    parts = [f"<h2>{text(step['name'])}, {_time(step['seconds'])}</h2>"]
    if "parts" in record:
        head, rest = _said(step["lines"], record)
        parts += [*head, _pruned(record["parts"]), *rest]
    else:
        parts += [f"<p>{text(line)}</p>" for line in step["lines"]]
    if "curve" in record:
        parts.append(learning_curve(record["curve"]))
    return "".join(parts)


def _said(lines: Sequence[str], record: Record) -> tuple[list[str], list[str]]:
    """What a pruning says before and after its parts, whose lines the table replaces."""
    shown = [f"<p>{text(line)}</p>" for line in lines]
    last = len(shown) - len(record["notes"])
    return shown[: last - len(record["parts"])], shown[last:]


def _pruned(parts: Sequence[Record]) -> str:
    shown = [key for key in _ERRORS if any(part[key] is not None for part in parts)]
    most = max((part[key] for part in parts for key in shown if part[key] is not None), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{text(part["name"])}</th><td>{number(part["kept"], 0)}</td>'
        f"<td>{number(part['total'], 0)}</td>{''.join(_error(part[key], most) for key in shown)}</tr>"
        for part in parts
    )
    head = headings(["where", "kept", "of", *(_ERRORS[key] for key in shown)])
    about = (
        "Errors are relative to what the original gives there, over the calibration text; darker is more."
        if shown
        else "What it does to the outputs was not measured."
    )
    return table("What was pruned", about, head, rows, "map")


def _error(value: float | None, most: float) -> str:
    if value is None:
        return '<td style="--a:0">not measured</td>'
    return f'<td style="--a:{_HEAT * value / most:.2f}">{share(value)}</td>'


def _facts(plan: Record, made: Record) -> str:
    calibration = made["calibration"]
    read = (
        "none was read"
        if calibration is None
        else f"{number(calibration['tokens'], 0)} tokens of {text(calibration['name'])}, sha256 "
        f"<code>{text(calibration['sha256'])}</code>"
    )
    files = ", ".join(f"{text(f['path'])} <code>{text(f['sha256'])}</code>" for f in plan["source"]["files"])
    found = [
        ("Calibration text", read),
        ("Made from", files),
        ("Recipe", f"<pre><code>{text(made['recipe'])}</code></pre>"),
        *(("Note", text(note)) for note in made["notes"]),
    ]
    return f"<h2>How it was made</h2>{facts(found)}"


def _time(seconds: float) -> str:
    """9.3 s, 4 min 12 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


_FRAME = Frame(480, 300, left=46, right=14, top=40, bottom=44)

Point = Mapping[str, Any]  # step, tokens, seconds, loss (None before the first step), kl


def learning_curve(points: Sequence[Point]) -> str:
    """Tokens trained on to the right, nats upwards from 0; empty without points."""
    if not points:
        return ""
    across = ticks(max(points[-1]["tokens"], 1))
    losses = [p for p in points if p["loss"] is not None]
    up = ticks(max([p["kl"] for p in points] + [p["loss"] for p in losses] + [1e-9]))

    def place(point: Point, of: str) -> Place:
        return _FRAME.across(point["tokens"] / across[-1]), _FRAME.up(point[of] / up[-1])

    grid = _FRAME.grid(
        [(_FRAME.up(tick / up[-1]), f"{tick:g}") for tick in up],
        [(_FRAME.across(tick / across[-1]), _tokens(tick)) for tick in across],
        "tokens trained on",
    )
    lines = _line("second", [place(p, "loss") for p in losses])
    lines += _line("first", [place(p, "kl") for p in points])
    marks = "".join(_mark(p, place(p, "kl")) for p in points)
    about, title = ". ".join(_sentence(p) for p in points), "Divergence from the teacher while training"
    return _FRAME.chart("c", title, about, f"{''.join(grid)}{_LEGEND}{lines}{marks}")


_LEGEND = (
    '<line class="line first" x1="46" y1="12" x2="70" y2="12"/>'
    '<text class="name" x="76" y="16">KL on text held out, nats</text>'
    '<line class="line second" x1="246" y1="12" x2="270" y2="12"/>'
    '<text class="name" x="276" y="16">loss in training</text>'
)


def _tokens(value: float) -> str:
    """20M, 500k, 64."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _line(kind: str, places: Sequence[Place]) -> str:
    return f'<polyline class="line {kind}" points="{as_points(places)}"/>' if places else ""


def _mark(point: Point, place: Place) -> str:
    x, y = place
    said = f"<title>{text(_sentence(point))}</title>"
    return f'<circle class="first" cx="{x:.1f}" cy="{y:.1f}" r="3">{said}</circle>'


def _sentence(point: Point) -> str:
    loss = "" if point["loss"] is None else f", loss {small(point['loss'])}"
    return (
        f"{number(point['tokens'], 0)} tokens, {number(point['seconds'], 0)} s: KL {small(point['kl'])}{loss}"
    )
