"""Hit ratio over memory for each policy and disk size, drawn as one SVG file by hand: no plotting library."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.engine.trace import ReplayResult
from hasten.report import Frame, Place, diamond, points, text

_FRAME = Frame(640, 400, left=52, right=150, top=44, bottom=48)  # the legend stands at the right
_COLOURS = {"lru": "#0b57b0", "lfu": "#b3401f", "s3fifo": "#0b7a53", "cost": "#7a3fa0"}
_MARKS = ("circle", "square", "diamond", "ring")  # disk sizes: colour alone says nothing to some
_STYLE = (
    "svg{background:#fdfdfb}text{font:12px system-ui,sans-serif;fill:#5b6670}.name{fill:#1d2329}"
    ".title{font-size:14px;font-weight:600;fill:#1d2329}.grid{stroke:#dfe3e6}"
    "@media(prefers-color-scheme:dark){svg{background:#14181c}text{fill:#9ba6af}.name,.title{fill:#e6e9eb}"
    ".grid{stroke:#2e363d}}"
)

Series = tuple[str, float, list[ReplayResult]]  # policy, disk GB, results by growing memory


def replay_chart(results: Sequence[ReplayResult], title: str) -> str:
    """The whole SVG document: memory to the right, each size as far from the next; hit ratio upwards."""
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


def _series(results: Sequence[ReplayResult]) -> list[Series]:
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
        f'<style>{_STYLE}</style><text class="title" x="{_FRAME.left - 36}" y="20">{text(title)}</text>'
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
