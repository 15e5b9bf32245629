"""report.html of a search: one file without script, nothing fetched, drawn from plan.json alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.core import READERS
from hasten.report import (
    Frame,
    Place,
    diamond,
    document,
    facts,
    headings,
    median,
    megabytes,
    number,
    percent,
    share,
    small,
    table,
    text,
    ticks,
    tiles,
    times,
)

Record = Mapping[str, Any]

_GOALS = {
    "latency": "The fastest answer",
    "throughput": "The most tokens of a batch",
    "memory": "The least memory",
}


def optimized_page(plan: Record) -> str:
    """The report of a search.

    Args:
        plan: what plan.json holds, as `hasten.optimize` writes it. Every string in it is escaped.
    """
    search = plan["search"]
    name = text(plan["model"])
    body = "".join(
        [
            _head(plan, search),
            "<h2>Speed against divergence</h2>",
            frontier(search),
            _KEY,
            "<h2>What was tried</h2>",
            _table(plan, search),
            "<h2>Why</h2>",
            _reasons(plan, search),
            sensitivity_map(
                plan.get("sensitivity") or [],
                plan.get("sensitivity_method", "rtn"),
                plan.get("sensitivity_error"),
            ),
            "<h2>How this was measured</h2>",
            _facts(plan, search),
        ]
    )
    return document(f"{name}: {text(search['chosen'])}", body)


_KEY = (
    '<p class="key"><span><i class="round k-pick"></i>chosen</span>'
    '<span><i class="round k-good"></i>within the budget</span>'
    '<span><i class="turned k-bad"></i>not within the budget</span>'
    "Hollow: not timed, speed predicted from its bytes.</p>"
)


def _head(plan: Record, search: Record) -> str:
    verdict, speedup = plan["verdict"], search["speedup"]
    chosen = next(c for c in search["candidates"] if c["recipe"] == search["chosen"])
    measured = chosen["measurement"]
    figures = [
        (times(speedup["decode"]), f"decode: {number(median(measured, 'decode_tok_per_s'))} tok/s"),
        (times(speedup["prefill"]), f"prefill: {number(median(measured, 'prefill_tok_per_s'), 0)} tok/s"),
        (times(speedup["ttft"]), f"first token: {number(median(measured, 'ttft_ms'), 0)} ms"),
        (percent(verdict["ppl_increase"]), f"perplexity; 95 %: {_interval(verdict)}"),
        (
            number(chosen["bits_per_weight"], 2),
            f"bits a weight: {megabytes(chosen['weight_bytes'])} read a token",
        ),
    ]
    limit = percent(plan["budget"]["max_ppl_increase"])
    return (
        f"<h1>{text(plan['model'])} as {text(search['chosen'])}</h1>"
        f'<p class="lead">{text(_GOALS[plan["goal"]])} within a perplexity increase of {limit}, on '
        f"{text(plan['machine']['cpu'])}. Factors are against the same model in bf16 on the same engine.</p>"
        f"{tiles(figures)}"
    )


_COLUMNS = (
    "recipe",
    "verdict",
    "bits",
    "MB a token",
    "decode tok/s",
    "prefill tok/s",
    "first token ms",
    "perplexity",
    "mean KL",
    "p99 KL",
    "same top token",
    "tokens",
)


def _table(plan: Record, search: Record) -> str:
    start = search["baseline"]
    first = _row("bf16 (start)", 16.0, start["measurement"])
    rows = "".join(
        _row(**{k: c[k] for k in _ROW}, chosen=c["recipe"] == search["chosen"]) for c in search["candidates"]
    )
    about = (
        "Medians. A recipe out of the budget is not timed. One that clearly fails is judged on fewer tokens. "
        f"Perplexity of the start: {number(start['ppl'], 3)}."
    )
    return table("Recipes tried", about, headings(_COLUMNS), first + rows)


_ROW = ("recipe", "bits_per_weight", "measurement", "verdict", "weight_bytes")


def _row(
    recipe: str,
    bits_per_weight: float | None,
    measurement: Record | None,
    verdict: Record | None = None,
    weight_bytes: int | None = None,
    chosen: bool = False,
) -> str:
    size = weight_bytes or (measurement or {}).get("weight_bytes")
    status = "" if verdict is None else text(verdict["status"])
    cells = [
        f'<span class="{status}">{status}</span>',
        number(bits_per_weight, 2),
        number(size / 1e6 if size else None, 0),
        *(_timed(measurement, figure) for figure in ("decode_tok_per_s", "prefill_tok_per_s", "ttft_ms")),
    ]
    if verdict is None:
        cells += [""] * 5
    else:
        cells += [
            f'{percent(verdict["ppl_increase"])}<br><span class="small">{_interval(verdict)}</span>',
            small(verdict["kl_mean"]),
            small(verdict["kl_p99"]),
            share(verdict["top1_agreement"]),
            number(verdict["tokens"], 0),
        ]
    mark = ' class="chosen"' if chosen else ""
    return (
        f'<tr{mark}><th scope="row">{text(recipe)}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"
    )


def _interval(verdict: Record) -> str:
    return f"{percent(verdict['ppl_increase_low'])} to {percent(verdict['ppl_increase_high'])}"


def _timed(measured: Record | None, figure: str) -> str:
    if measured is None:
        return '<span class="small">not timed</span>'
    stat = measured[figure]
    digits = 0 if stat["median"] >= 1000 else 1
    spread = f"{number(stat['p10'], digits)} to {number(stat['p90'], digits)}"
    return f'<span title="p10 to p90: {spread}, n {stat["n"]}">{number(stat["median"], digits)}</span>'


def _reasons(plan: Record, search: Record) -> str:
    chosen = [c for c in search["candidates"] if c["recipe"] == search["chosen"]]
    others = [c for c in search["candidates"] if c["recipe"] != search["chosen"]]
    said = [(text(c["recipe"]), text(c["because"])) for c in [*chosen, *others]]
    extra = "".join(f"<p>{text(reason)}</p>" for reason in plan["because"][1:])
    return facts(said, "reasons") + extra


def _ceilings(machine: Record, measured: Record) -> list[tuple[str, str]]:
    """What was measured of what computed, and how near the chosen recipe comes."""
    read = share(measured["fraction_of_read_ceiling"])
    gpus = machine.get("accelerators") or []
    if measured.get("device") == "cuda" and gpus:
        gpu, compute = gpus[0], share(measured["fraction_of_gpu_ceiling"])
        return [
            ("GPU", f"{text(gpu['name'])}, {gpu['memory_bytes'] / 2**30:.1f} GiB"),
            (
                "Ceilings",
                f"copy {number(gpu['copy_gb_per_s'], 0)} GB/s, bf16 {number(gpu['bf16_tflops'], 0)} TFLOP/s, "
                f"fp8 {number(gpu['fp8_tflops'], 0)} TFLOP/s, measured",
            ),
            ("Of the ceilings", f"decode {read} of the copy's rate, prefill {compute} of the products'"),
        ]
    return [
        (
            "Ceilings",
            f"read {number(machine['read_gb_per_s'])} GB/s, int8 {number(machine['int8_tops'], 2)} TOPS, "
            f"bf16 {number(machine['bf16_tflops'], 2)} TFLOP/s, measured",
        ),
        (
            "Of the ceilings",
            f"decode {read} of the read rate, prefill {share(measured['fraction_of_int8_ceiling'])} "
            "of the int8 rate",
        ),
    ]


def _facts(plan: Record, search: Record) -> str:
    machine, judged = plan["machine"], plan["text"]
    measured = plan["measurement"] or search["baseline"]["measurement"]
    workload = measured["workload"]
    memory = machine["memory_bytes"]
    found = [
        (
            "Machine",
            f"{text(machine['cpu'])}, {machine['cores']} cores, {', '.join(map(text, machine['isa']))}",
        ),
        ("Memory", text(None) if memory is None else f"{memory / 2**30:.1f} GiB"),
        *_ceilings(machine, measured),
        (
            "Speed",
            f"{workload['prompt']} tokens in, {workload['output']} out, {workload['batch']} at once, "
            f"{measured['threads']} threads; medians of {plan['runs']} runs after a warm-up, in one process",
        ),
        (
            "Quality",
            f"up to {number(judged['tokens'], 0)} tokens of {text(judged['name'])} in windows of 512, each "
            "from an empty cache; the source in bf16 on the same engine reads the same. KL over the whole "
            "vocabulary. Interval: paired bootstrap over blocks of 64 tokens, 95 %, seeded. A recipe passes "
            "when the whole interval is within the budget. Widths were chosen on other text than judged.",
        ),
        ("Text", f"sha256 <code>{text(judged['sha256'])}</code>"),
        (
            "Versions",
            ", ".join(f"{text(k)} {text(v)}" for k, v in plan["versions"].items())
            + f"; {text(machine['os'])}",
        ),
        ("Use it", f'<code>hasten generate {text(search["artifact"])} -p "What is a mutex?"</code>'),
    ]
    return facts(found)


_FRAME = Frame(480, 340, left=46, right=14, top=26, bottom=44)
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
    across, powers = _log_axis([p.kl for p in points])
    levels = ticks(max([p.speed for p in points] + [baseline or 0.0]), room=1.05)

    def up(speed: float) -> float:
        return _FRAME.up(speed / levels[-1])

    left, top, floor = _FRAME.left, _FRAME.top, _FRAME.floor
    upright = (f'x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{floor}"' for x in map(across, powers))
    parts = [
        f'<text x="{left - 40}" y="14">decode, tokens a second</text>',
        *(f'<line class="grid" {place}/>' for place in upright),
        *_FRAME.grid(
            [(up(tick), f"{tick:g}") for tick in levels],
            [(across(tick), f"{tick:g}") for tick in powers],
            "mean KL divergence from the source, nats (log): closer is left",
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
    if point.passes:  # a shape for each verdict: colour alone says nothing to some
        return f'<circle class="{kind}{hollow}" cx="{x:.1f}" cy="{y:.1f}" r="5.5">{about}</circle>'
    return f'<polygon class="{kind}{hollow}" points="{diamond(x, y)}">{about}</polygon>'


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


_DARKEST = 0.75  # of the heat colour: text on it stays readable
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
        return _DARKEST * max(0.05, math.log(max(harm, self._low) / self._low) / self._wide)


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
