"""What every report shares: escaped text, figures, tables, charts, the page; and the chart of a replay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.engine.trace import ReplayResult

    _Series = tuple[str, float, list[ReplayResult]]  # policy, disk GB, results by growing memory

_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)


def ticks(highest: float, room: float = 1.0) -> list[float]:
    """About five round numbers from 0 up to `room` times `highest`, which must be above 0."""
    rough = highest / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(n * scale for n in _NICE if n * scale >= rough * 0.999)
    return [step * i for i in range(math.ceil(highest * room / step) + 1)]


UNKNOWN = "unknown"


def text(value: Any) -> str:
    """Any value as HTML text, safe in attributes too."""
    return UNKNOWN if value is None else escape(str(value), quote=True)


def number(value: float | None, digits: int = 1) -> str:
    """1,234.5, or `unknown`."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A signed share: +0.82 %."""
    return UNKNOWN if value is None else f"{100 * value:+.2f} %"


def share(value: float | None) -> str:
    """An unsigned share: 98.7 %."""
    return UNKNOWN if value is None else f"{100 * value:.1f} %"


def small(value: float | None) -> str:
    """Two significant digits, for divergences: 0.0043."""
    return UNKNOWN if value is None else f"{value:.2g}"


def times(value: float | None) -> str:
    """A speedup: 2.9 and a times sign."""
    return UNKNOWN if value is None else f"{value:.2g}&times;" if value < 10 else f"{value:.0f}&times;"


def megabytes(value: float | None) -> str:
    """Bytes as MB of a million."""
    return UNKNOWN if value is None else f"{value / 1e6:,.0f} MB"


def median(measurement: Mapping[str, Any] | None, figure: str) -> float | None:
    """The median of one figure of a measurement, None where there is no measurement."""
    return None if measurement is None else float(measurement[figure]["median"])


STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2329; --soft: #5b6670; --line: #dfe3e6;
  --card: #f3f5f5; --good: #0b7a53; --bad: #b3401f; --pick: #0b57b0; --peer: #8a6d00; --heat: 200, 90, 20; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e6e9eb; --soft: #9ba6af; --line: #2e363d; --card: #1c2227;
    --good: #4cc38a; --bad: #f0855f; --pick: #6cb0ff; --peer: #d9b84a; --heat: 240, 130, 60; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { color: var(--soft); }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .6rem;
  margin: 1.2rem 0 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border-radius: 8px; padding: .7rem .85rem; }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .86rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
.chart { display: block; width: 100%; max-width: 36rem; height: auto; }
.key + .chart { margin-top: 1.4rem; }
.chart text { font: 13px system-ui, sans-serif; fill: var(--soft); }
@media (min-width: 40rem) { .chart text { font-size: 10px; } }
.chart .name { fill: var(--ink); }
.chart .strong { font-weight: 700; fill: var(--pick); }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .line { fill: none; stroke-width: 2; }
.chart .first { stroke: var(--pick); fill: var(--pick); }
.chart .second { stroke: var(--bad); fill: var(--bad); }
.chart .line.first, .chart .line.second { fill: none; }
.chart .line.second { stroke-dasharray: 6 3; }
.chart .start { stroke: var(--soft); stroke-dasharray: 5 4; }
.chart .pass { fill: var(--good); stroke: var(--good); }
.chart .fail { fill: var(--bad); stroke: var(--bad); }
.chart .chosen { fill: var(--pick); stroke: var(--pick); }
.chart .peer { fill: var(--peer); stroke: var(--peer); }
.chart .before { fill: var(--line); stroke: var(--soft); }
.chart .algorithm { fill: var(--pick); fill-opacity: .55; stroke: var(--pick); }
.chart .hardware { fill: var(--good); fill-opacity: .55; stroke: var(--good); stroke-dasharray: 4 2; }
.chart .cache { fill: var(--bad); stroke: var(--bad); }
.chart .whisker { stroke: var(--soft); stroke-width: 1.5; }
.chart .box { fill: var(--pick); fill-opacity: .35; stroke: var(--pick); }
.chart .middle { stroke: var(--ink); stroke-width: 2; }
.chart .roof { stroke: var(--ink); stroke-width: 1.5; }
.chart .hollow { fill: var(--paper); stroke-width: 2; }
.key { color: var(--soft); font-size: .88rem; }
.key i { display: inline-block; width: .7em; height: .7em; margin: 0 .3em 0 0; border: 2px solid; }
.key span { white-space: nowrap; margin-right: 1.1em; }
.round { border-radius: 50%; }
.turned { transform: rotate(45deg); }
.k-pick { color: var(--pick); background: var(--pick); }
.k-good { color: var(--good); background: var(--good); }
.k-bad { color: var(--bad); }
.k-peer { color: var(--peer); background: var(--peer); }
.k-pick-line { color: var(--pick); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding-bottom: .4rem; }
caption span { display: block; position: sticky; left: 0; width: min(46rem, calc(100vw - 2rem)); }
th, td { padding: .34rem .5rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: .4rem; }
tbody th { font-weight: 600; }
tr.chosen th, tr.chosen td { background: var(--card); }
tr.chosen th { color: var(--pick); box-shadow: inset 3px 0 var(--pick); }
.pass { color: var(--good); }
.fail, .insufficient { color: var(--bad); }
.small { color: var(--soft); font-size: .86em; }
.reasons dt { font-weight: 600; margin-top: .7rem; }
.reasons dd { margin: 0; max-width: 46rem; }
.map td { text-align: center; background: rgba(var(--heat), var(--a)); border: 2px solid var(--paper); }
.map thead th + th { text-align: center; }
.map { font-size: .8rem; }
.map th, .map td { padding: .18rem .3rem; }
.map .edge { border-left: .5rem solid var(--paper); }
.map .own { outline: 2px solid var(--pick); outline-offset: -3px; font-weight: 600; }
.facts { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem; margin: 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; max-width: 46rem; }
@media (max-width: 34rem) { .facts { grid-template-columns: 1fr; } .facts dd { margin-bottom: .5rem; } }
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --card: #f2f2f2;
    --good: #0b7a53; --bad: #b3401f; --pick: #0b57b0; --peer: #8a6d00; --heat: 200, 90, 20; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  .chart { max-width: 13cm; }
  .chart, .facts, .tiles li, tr { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .25rem; }
  i, .map td, tr.chosen { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


def tiles(items: Iterable[tuple[str, str]]) -> str:
    """Large figures, each with what it is. All arguments from here on are HTML already."""
    inside = "".join(f"<li><b>{value}</b><span>{about}</span></li>" for value, about in items)
    return f'<ul class="tiles">{inside}</ul>'


def facts(items: Iterable[tuple[str, str]], kind: str = "facts") -> str:
    """A list of terms and what is said of them."""
    inside = "".join(f"<dt>{about}</dt><dd>{fact}</dd>" for about, fact in items)
    return f'<dl class="{kind}">{inside}</dl>'


def table(label: str, about: str, head: str, rows: str, kind: str = "") -> str:
    """A table that scrolls by itself: its name for screen readers, its caption, the rows of head and body."""
    opening = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0">{opening}'
        f"<caption><span>{about}</span></caption><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    )


def headings(names: Iterable[str]) -> str:
    """One row of column headings."""
    return "<tr>" + "".join(f'<th scope="col">{name}</th>' for name in names) + "</tr>"


Place = tuple[float, float]


class Frame:
    """A chart's view box, one unit a pixel on a small phone's full width, and the room around its figure."""

    def __init__(self, width: int, height: int, *, left: int, right: int, top: int, bottom: int) -> None:
        self.width, self.height, self.left, self.top = width, height, left, top
        self.end, self.floor = width - right, height - bottom  # of the figure, to the right and downwards

    def across(self, share: float) -> float:
        return self.left + (self.end - self.left) * share

    def up(self, share: float) -> float:
        return self.floor - (self.floor - self.top) * share

    def grid(
        self, levels: Iterable[tuple[float, str]], marks: Iterable[tuple[float, str]], below: str
    ) -> list[str]:
        """Lines with their names at the left, names of places under the figure, and what these are."""
        lines = [
            f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{self.end}" y2="{y:.1f}"/>'
            f'<text x="{self.left - 6}" y="{y + 4:.1f}" text-anchor="end">{name}</text>'
            for y, name in levels
        ]
        named = [
            *((x, self.floor + 16, name) for x, name in marks),
            (self.across(0.5), self.height - 8, below),
        ]
        return lines + [
            f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{name}</text>' for x, y, name in named
        ]

    def chart(self, mark: str, title: str, described: str, body: str) -> str:
        """The whole figure of a page; `mark` tells its names from those of other figures."""
        return (
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-labelledby="{mark}-title {mark}-desc"><title id="{mark}-title">{title}</title>'
            f'<desc id="{mark}-desc">{text(described)}</desc>{body}</svg>'
        )


def points(places: Iterable[Place]) -> str:
    """Places as SVG writes them."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def diamond(x: float, y: float) -> str:
    """The corners of a mark."""
    return points([(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)])


def document(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


_FRAME = Frame(640, 400, left=52, right=150, top=44, bottom=48)  # the legend stands at the right
_COLOURS = {"lru": "#0b57b0", "lfu": "#b3401f", "s3fifo": "#0b7a53", "cost": "#7a3fa0"}
_MARKS = ("circle", "square", "diamond", "ring")  # disk sizes: colour alone says nothing to some
_CHART_STYLE = (
    "svg{background:#fdfdfb}text{font:12px system-ui,sans-serif;fill:#5b6670}.name{fill:#1d2329}"
    ".title{font-size:14px;font-weight:600;fill:#1d2329}.grid{stroke:#dfe3e6}"
    "@media(prefers-color-scheme:dark){svg{background:#14181c}text{fill:#9ba6af}.name,.title{fill:#e6e9eb}"
    ".grid{stroke:#2e363d}}"
)


def replay_chart(results: Sequence[ReplayResult], title: str) -> str:
    """Hit ratio over memory for each policy and disk size, as one SVG file without a plotting library.

    Memory to the right, each size as far from the next; hit ratio upwards.
    """
    sizes = sorted({result.ram_gb for result in results})
    disks = sorted({result.disk_gb for result in results})
    series = _series(results)
    places = [n / (len(sizes) - 1) if len(sizes) > 1 else 0.5 for n in range(len(sizes))]
    highest = max(result.hit_ratio for result in results)
    top = next(t for t in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if highest <= t or t == 1.0)

    def place(result: ReplayResult) -> Place:
        return _FRAME.across(places[sizes.index(result.ram_gb)]), _FRAME.up(result.hit_ratio / top)

    parts = [_head(title, results), f'<text x="{_FRAME.left - 36}" y="36">prompt tokens found</text>']
    parts += _FRAME.grid(
        [(_FRAME.up(tick / 4), f"{100 * top * tick / 4:g} %") for tick in range(5)],
        [(_FRAME.across(at), f"{size:.3g}") for at, size in zip(places, sizes, strict=True)],
        "memory for pages, GB",
    )
    for policy, disk, line in series:
        parts += _line(policy, disks.index(disk), line, [place(result) for result in line])
    parts += [_legend(n, policy, disk, disks.index(disk)) for n, (policy, disk, _) in enumerate(series)]
    return "\n".join([*parts, "</svg>\n"])


def _series(results: Sequence[ReplayResult]) -> list[_Series]:
    names = sorted({(r.disk_gb, list(_COLOURS).index(r.policy), r.policy) for r in results})
    grown = sorted(results, key=lambda result: result.ram_gb)
    return [
        (policy, disk, [r for r in grown if (r.policy, r.disk_gb) == (policy, disk)])
        for disk, _, policy in names
    ]


def _head(title: str, results: Sequence[ReplayResult]) -> str:
    described = "; ".join(_sentence(r) for r in results)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_FRAME.width} {_FRAME.height}" role="img" '
        f'aria-labelledby="t d"><title id="t">{text(title)}</title><desc id="d">{text(described)}</desc>'
        f'<style>{_CHART_STYLE}</style><text class="title" x="{_FRAME.left - 36}" y="20">{text(title)}</text>'
    )


def _sentence(result: ReplayResult) -> str:
    disk = f" and {result.disk_gb:g} GB of disk" if result.disk_gb else ""
    return f"{result.policy} with {result.ram_gb:g} GB{disk}: {100 * result.hit_ratio:.1f} %"


def _line(policy: str, disk: int, line: Sequence[ReplayResult], places: Sequence[Place]) -> list[str]:
    colour = _COLOURS[policy]
    dashes = f' stroke-dasharray="{6 - min(disk, 4)} {2 + disk}"' if disk else ""
    path = f'<polyline points="{points(places)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    marks = zip(places, line, strict=True)
    return [path, *(_mark(disk, x, y, colour, _sentence(result)) for (x, y), result in marks)]


def _mark(disk: int, x: float, y: float, colour: str, about: str = "") -> str:
    kind, said = _MARKS[disk % len(_MARKS)], f"<title>{text(about)}</title>" if about else ""
    if kind == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}">{said}</rect>'
    if kind == "diamond":
        return f'<polygon points="{diamond(x, y)}" fill="{colour}">{said}</polygon>'
    fill = f'fill="{colour}"' if kind == "circle" else f'fill="none" stroke="{colour}" stroke-width="2"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {fill}>{said}</circle>'


def _legend(at: int, policy: str, disk_gb: float, disk: int) -> str:
    x, y = _FRAME.end + 24, _FRAME.top + 8 + 20 * at
    name = policy + (f", {disk_gb:g} GB disk" if disk_gb else "")
    mark = _mark(disk, x, y, _COLOURS[policy])
    return f'{mark}<text class="name" x="{x + 12}" y="{y + 4}">{text(name)}</text>'
