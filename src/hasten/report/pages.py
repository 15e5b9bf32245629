"""Reports of a compression, a benchmark and a load, and the map of where few bits hurt.

Each is one file without script, nothing fetched, drawn from a record alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hasten.bench.figures import percentile
from hasten.core import GAP_SHARES, READERS
from hasten.report import (
    Frame,
    Place,
    diamond,
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
from hasten.report.charts import Spread, box_key, latencies, reached, roof_of, roofline, spreads

Record = Mapping[str, Any]

_HEAT = 0.75  # of the heat colour at the largest value of a map: text on it stays readable
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


# The map of sensitivity -------------------------------------------------------------------------------------

_KEPT_WIDTH = "source"
_LEAST = 1e-5  # nats: below it a cell stays blank, as int8 activations alone cost fifty times as much

Group = Mapping[str, Any]


def sensitivity_map(groups: Sequence[Group], method: str = "rtn", error: float | None = None) -> str:
    """A table of layers by part and width, shaded by KL (log), the chosen widths framed; empty without a map.

    Args:
        groups: as `plan.json` has them under `sensitivity`.
        method: how the integers were found.
        error: what predictions are off by, a fraction; None: not checked.
    """
    layers: dict[str, dict[str, Group]] = {}
    for group in groups:
        where, _, part = group["group"].rpartition(".")
        layers.setdefault(where or part, {})[part] = group
    if not layers:
        return ""
    parts: list[str] = [part for part in READERS if any(part in row for row in layers.values())] or [""]
    widths = [
        *sorted({width for group in groups for width in _harms(group) if "-" not in width}),
        _KEPT_WIDTH,
    ]
    scale = _Scale(groups)
    rows = "".join(_map_row(where, row, parts, widths, scale) for where, row in layers.items())
    return "<h2>Where few bits hurt</h2>" + table(
        "Sensitivity map", _map_about(method, error), _map_head(parts, widths), rows, "map"
    )


class _Scale:
    """KL to a share of the heat colour, logarithmic, over what some groups show."""

    def __init__(self, groups: Sequence[Group]) -> None:
        shown = (harm for group in groups for width, harm in _harms(group).items() if "-" not in width)
        found = [harm for harm in shown if harm > _LEAST] or [1.0]
        self._low, self._wide = min(found), math.log(max(found) / min(found)) or 1.0

    def heat(self, harm: float) -> float:
        if harm <= _LEAST:
            return 0.0
        return _HEAT * max(0.05, math.log(max(harm, self._low) / self._low) / self._wide)


def _harms(group: Group) -> Mapping[str, float]:
    """KL by width; of plans from before there were several, that at 4 bits alone."""
    return group.get("kl") or {"w4": group["kl_at_4_bits"]}


def _map_about(method: str, error: float | None) -> str:
    how = "" if method == "rtn" else f" Integers found by {text(method.upper())}."
    off = "" if error is None else f", which is {error:.0%} off (median) where both were measured"
    return (
        "KL divergence in thousandths of a nat when this group alone goes to a width, on held-out "
        "calibration text; darker hurts more. 4 bits are measured, the others are scaled from that"
        f"{off}.{how} Framed: the width the chosen recipe gives the group; kept is the source's own."
    )


def _map_head(parts: Sequence[str], widths: Sequence[str]) -> str:
    over = "".join(f'<th scope="col" colspan="{len(widths)}">{text(part)}</th>' for part in parts)
    names = "".join(
        f'<th scope="col" class="{_edge(i)}">{_width_label(width)}</th>'
        for _ in parts
        for i, width in enumerate(widths)
    )
    return f'<tr><th scope="col">layer</th>{over}</tr><tr><th scope="col">width</th>{names}</tr>'


def _map_row(
    where: str, row: Mapping[str, Group], parts: Sequence[str], widths: Sequence[str], scale: _Scale
) -> str:
    if set(row) & set(parts):
        cells = "".join(_cells(row.get(part), widths, scale) for part in parts)
    else:  # the head: as wide as all parts
        cells = _cells(next(iter(row.values())), widths, scale, span=len(parts))
    return f'<tr><th scope="row">{text(where.replace("layers.", "layer "))}</th>{cells}</tr>'


def _cells(group: Group | None, widths: Sequence[str], scale: _Scale, span: int = 1) -> str:
    if group is None:
        return f'<td colspan="{span * len(widths)}"></td>'
    harms = _harms(group)
    return "".join(_cell(group, width, harms.get(width), scale, i, span) for i, width in enumerate(widths))


def _cell(group: Group, width: str, harm: float | None, scale: _Scale, at: int, span: int) -> str:
    chosen = str(group["layout"])
    base, _, variant = chosen.partition("-")  # w4-g64 stands in the column of w4
    own = " own" if base == width else ""
    if own and variant:
        harm = _harms(group).get(chosen, harm)
    across = f' colspan="{span}"' if span > 1 else ""
    label = f"{_width_label(width)} " if span > 1 else ""
    said = f"{text(group['group'])} at {_width_label(width)}"
    if harm is None:
        shown, heat = ("kept" if own and not label else ""), 0.0
    else:
        shown, heat = _thousandths(harm), scale.heat(harm)
    more = f" {text(variant)}" if own and variant else ""
    style = f'class="{_edge(at)}{own}" style="--a:{heat:.2f}" title="{said}"'
    return f"<td{across} {style}>{label}{shown}{more}</td>"


def _edge(at: int) -> str:
    return "edge" if at == 0 else "in"


def _width_label(width: str) -> str:
    return "kept" if width == _KEPT_WIDTH else text(width)


def _thousandths(harm: float) -> str:
    """2.7, 0.13, 0.02; blank below a hundredth."""
    value = harm * 1000
    if harm <= _LEAST:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


# A benchmark ------------------------------------------------------------------------------------------------


def bench_page(record: Record) -> str:
    """The report of `hasten bench --json`: the engines side by side.

    Args:
        record: what it printed. Every string in it is escaped.
    """
    subject = record["subject"]
    engines = [subject, *record["peers"]]
    timed = [(str(one["name"]), one, one is subject) for one in engines]
    waits = "".join(latencies(timed))
    roof, ceilings = roof_of(record["machine"], record.get("device", "cpu"))
    points = [point for name, one, strong in timed for point in reached(name, one, strong=strong)]
    figure = roofline(roof, ceilings, points)
    parts = [
        _bench_head(record, subject),
        f"<h2>Side by side</h2>{_engines(record, engines)}",
        f"<h2>How long tokens take</h2>{waits}" if waits else "",
        f"<h2>How near to what the machine can do</h2>{figure}" if figure else "",
        f"<h2>How this was measured</h2>{facts(_measured_how(record, subject))}",
    ]
    return document(f"{text(record['model'])}: speed", "".join(parts))


def _bench_head(record: Record, subject: Record) -> str:
    work = record["workload"]
    figures = [
        (number(subject["decode_tok_per_s"]["median"]), "tokens a second, decoding"),
        (number(subject["prefill_tok_per_s"]["median"], 0), "prompt tokens a second"),
        (f"{number(subject['ttft_ms']['median'], 0)} ms", "to the first token"),
        (share(subject["fraction_of_read_ceiling"]), "of the memory's rate while decoding"),
    ]
    return (
        f"<h1>{text(record['model'])} as {text(subject['format'])}</h1>"
        f'<p class="lead">{number(work["prompt"], 0)} tokens in, {number(work["output"], 0)} out, '
        f"{work['batch']} at once, on {text(record['machine']['cpu'])}.</p>{tiles(figures)}"
    )


_ENGINE_COLUMNS = (
    *("engine", "decode tok/s", "p10 to p90", "prefill tok/s", "first token ms", "peak MB"),
    "decode, ours / theirs",
)


def _engines(record: Record, engines: Sequence[Record]) -> str:
    rows = ""
    for one in engines:
        decode, peak = one["decode_tok_per_s"], one["peak_rss_bytes"]
        ratio = (record.get("ratios") or {}).get(one["name"])
        low, high = ratio["decode_interval"] if ratio else (None, None)
        cells = [
            number(decode["median"]),
            f"{number(decode['p10'])} to {number(decode['p90'])}",
            number(one["prefill_tok_per_s"]["median"], 0),
            number(one["ttft_ms"]["median"], 0),
            number(None if peak is None else peak / 1e6, 0),
            f"{ratio['decode']:.2f} [{low:.2f}, {high:.2f}]" if ratio else "",
        ]
        mark = ' class="chosen"' if one is record["subject"] else ""
        rows += f'<tr{mark}><th scope="row">{text(one["name"])}</th>'
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    about = "Medians; ratios with their 95 % interval over rounds. Engines ran in turn on the same token ids."
    failed = "".join(
        f"<p>{text(name)} did not finish: {text(why['error'])}</p>"
        for name, why in (record.get("failed") or {}).items()
    )
    return table("Engines", about, headings(_ENGINE_COLUMNS), rows) + failed


def _measured_how(record: Record, subject: Record) -> Iterator[tuple[str, str]]:
    machine = record["machine"]
    yield "Machine", f"{text(machine['cpu'])}, {machine['cores']} cores, {text(machine['os'])}"
    rounds = subject["decode_tok_per_s"]["n"]
    disturbed = subject.get("disturbed_rounds", 0)
    yield "Rounds", f"{rounds} after a warm-up; {disturbed} that other work disturbed were taken again"
    yield "Threads", text(record.get("threads"))
    yield "Versions", ", ".join(f"{text(k)} {text(v)}" for k, v in record["versions"].items())
    for name, value in (record.get("environment") or {}).items():
        yield text(name), text(value)


# A load -----------------------------------------------------------------------------------------------------


def load_page(record: Record) -> str:
    """The report of `hasten bench --rate --json`: what users of a server would see.

    Args:
        record: what it printed. Every string in it is escaped.
    """
    load = record["load"]
    figures = [
        (share(load["goodput"]), "of the requests in time"),
        (number(load["good_per_s"], 2), "requests in time a second"),
        (number(load["output_tok_per_s"]), "tokens a second, all answers"),
        (share(load["cached"]), "of prompt tokens cached"),
        (share(load["refused"]), "refused early"),
        (share(load["late"]), "too late"),
    ]
    title = f"{text(record['model'])}: {text(load['workload'])}, {number(load['rate'], 2)} requests a second"
    lead = f"{load['count']} requests at random moments, on {text(record['machine']['cpu'])}."
    waits = spreads("waits", "What users wait for", _waits(load), "milliseconds (log)")
    parts = [
        f'<h1>{title}</h1><p class="lead">{lead}</p>{tiles(figures)}',
        f"<h2>What users wait for</h2>{waits}{box_key('requests')}" if waits else "",
        f"<h2>Request by request</h2>{_moments(load)}{_MOMENTS_KEY}",
        f"<h2>How this was measured</h2>{facts(_loaded_how(record, load))}",
    ]
    return document(title, "".join(parts))


_MOMENTS_KEY = (
    '<p class="key"><span><i class="round k-good"></i>in time</span>'
    '<span><i class="turned k-bad"></i>too late, or failed</span>'
    '<span><i class="k-peer"></i>refused</span></p>'
)
_WAITED = {"ttft_ms": "first token", "tpot_ms": "a token", "latency_ms": "whole answer"}


def _waits(load: Record) -> list[Spread]:
    found = []
    for key, name in _WAITED.items():
        values = sorted(one[key] for one in load["requests"] if one[key])
        if values:
            found.append(Spread(name, tuple(percentile(values, at) for at in GAP_SHARES)))
    return found


def _moments(load: Record) -> str:
    """Every request where it came, as high as its answer took; one that was refused, as its refusal took."""
    frame = Frame(400, 280, left=46, right=12, top=26, bottom=46)
    rows = [(one, _took(one)) for one in load["requests"]]
    longest = max([took for _, took in rows] + [1.0])
    last = max([one["at_s"] for one, _ in rows] + [1e-3])
    levels, marks = ticks(longest, room=1.05), ticks(last, room=0.99)

    def mark(one: Record, took: float) -> str:
        x, y = frame.across(one["at_s"] / max(marks[-1], last)), frame.up(took / levels[-1])
        if one["met"]:
            return f'<circle class="pass" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        if one["refused"]:
            return f'<rect class="peer" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
        return f'<polygon class="fail hollow" points="{diamond(x, y)}"/>'

    parts = [
        f'<text x="{frame.left - 42}" y="14">milliseconds to the end of the answer</text>',
        *frame.grid(
            [(frame.up(level / levels[-1]), f"{level:g}") for level in levels],
            [(frame.across(at / max(marks[-1], last)), f"{at:g}") for at in marks],
            "seconds since the load began",
        ),
        *(mark(one, took) for one, took in rows),
    ]
    about = f"{len(rows)} requests, {share(load['goodput'])} in time; the longest took {longest:,.0f} ms"
    return frame.chart("moments", "Request by request", about, "".join(parts))


def _took(one: Record) -> float:
    return float(one["latency_ms"] or one.get("refused_after_ms") or 0.0)


def _loaded_how(record: Record, load: Record) -> Iterator[tuple[str, str]]:
    machine = record["machine"]
    limits = [
        f"{name} within {number(load['limits'][key], 0)} ms"
        for key, name in (("ttft_ms", "first token"), ("tpot_ms", "a token"), ("deadline_ms", "whole answer"))
        if load["limits"][key] is not None
    ]
    yield "In time", "; ".join(limits) or "any answer"
    yield "Server", f"<code>{text(record['server'])}</code>"
    yield "Load", f"open: requests come at their moments, answered or not; seed {text(load['seed'])}"
    yield "Machine", f"{text(machine['cpu'])}, {machine['cores']} cores, {text(machine['os'])}"
    late = max([one["client_late_ms"] for one in load["requests"]])
    yield "Client", f"at most {number(late)} ms late itself"
    failed = [one["error"] for one in load["requests"] if one["failed"]]
    yield "Failed", f"{len(failed)}" + (f", the first: {text(failed[0])}" if failed else "")
    yield "Versions", ", ".join(f"{text(k)} {text(v)}" for k, v in record["versions"].items())
