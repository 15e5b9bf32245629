"""Hit ratio over memory for each policy and disk size, drawn as one SVG file by hand: no plotting library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hasten.engine.trace import ReplayResult
from hasten.report.page import text

_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 150, 44, 48  # the legend stands at the right
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
    step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(sizes) - 1)
    highest = max(result.hit_ratio for result in results)
    top = next(t for t in (0.1, 0.2, 0.4, 0.6, 0.8, 1.0) if highest <= t or t == 1.0)

    def across(result: ReplayResult) -> float:
        return _LEFT + (sizes.index(result.ram_gb) * step if len(sizes) > 1 else step / 2)

    def up(ratio: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * ratio / top

    parts = [_head(title, results), *_grid(sizes, top, up, step)]
    for policy, disk, line in series:
        parts += _line(policy, disks.index(disk), line, across, up)
    parts += [_legend(n, policy, disk, disks.index(disk)) for n, (policy, disk, _) in enumerate(series)]
    return "\n".join([*parts, "</svg>\n"])


def _series(results: Sequence[ReplayResult]) -> list[Series]:
    names = sorted({(r.disk_gb, list(_COLOURS).index(r.policy), r.policy) for r in results})
    return [
        (policy, disk, sorted((r for r in results if (r.policy, r.disk_gb) == (policy, disk)), key=_memory))
        for disk, _, policy in names
    ]


def _memory(result: ReplayResult) -> float:
    return result.ram_gb


def _head(title: str, results: Sequence[ReplayResult]) -> str:
    described = "; ".join(_sentence(r) for r in results)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="t d"><title id="t">{text(title)}</title><desc id="d">{text(described)}</desc>'
        f'<style>{_STYLE}</style><text class="title" x="{_LEFT - 36}" y="20">{text(title)}</text>'
    )


def _sentence(result: ReplayResult) -> str:
    disk = f" and {result.disk_gb:g} GB of disk" if result.disk_gb else ""
    return f"{result.policy} with {result.ram_gb:g} GB{disk}: {100 * result.hit_ratio:.1f} %"


def _grid(sizes: Sequence[float], top: float, up: Callable[[float], float], step: float) -> list[str]:
    parts = []
    for tick in range(5):
        y, share = up(top * tick / 4), 100 * top * tick / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share:g} %</text>')
    for at, size in enumerate(sizes):
        x = _LEFT + (at * step if len(sizes) > 1 else step / 2)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{size:.3g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">memory for pages, GB</text>')
    parts.append(f'<text x="{_LEFT - 36}" y="36">prompt tokens found</text>')
    return parts


def _line(
    policy: str,
    disk: int,
    line: Sequence[ReplayResult],
    across: Callable[[ReplayResult], float],
    up: Callable[[float], float],
) -> list[str]:
    places = [(across(result), up(result.hit_ratio)) for result in line]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = f' stroke-dasharray="{6 - min(disk, 4)} {2 + disk}"' if disk else ""
    path = f'<polyline points="{points}" fill="none" stroke="{_COLOURS[policy]}" stroke-width="2"{dashes}/>'
    return [
        path,
        *(_mark(disk, x, y, _COLOURS[policy], _sentence(r)) for (x, y), r in zip(places, line, strict=True)),
    ]


def _mark(disk: int, x: float, y: float, colour: str, about: str = "") -> str:
    kind, said = _MARKS[disk % len(_MARKS)], f"<title>{text(about)}</title>" if about else ""
    if kind == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}">{said}</rect>'
    if kind == "diamond":
        corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
        return f'<polygon points="{corners}" fill="{colour}">{said}</polygon>'
    fill = f'fill="{colour}"' if kind == "circle" else f'fill="none" stroke="{colour}" stroke-width="2"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {fill}>{said}</circle>'


def _legend(at: int, policy: str, disk_gb: float, disk: int) -> str:
    x, y = _WIDTH - _RIGHT + 24, _TOP + 8 + 20 * at
    name = policy + (f", {disk_gb:g} GB disk" if disk_gb else "")
    mark = _mark(disk, x, y, _COLOURS[policy])
    return f'{mark}<text class="name" x="{x + 12}" y="{y + 4}">{text(name)}</text>'
