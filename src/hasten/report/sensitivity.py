"""The sensitivity map: what each width costs in each group of layers, and the width each one got."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.report.figures import text

_DARKEST = 0.75  # of the heat colour: text on it stays readable
_PARTS = ("qkv", "o", "gate_up", "down")
_KEPT = "source"
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
    parts = [part for part in _PARTS if any(part in row for row in layers.values())] or [""]
    widths = [*sorted({width for group in groups for width in _harms(group) if "-" not in width}), _KEPT]
    scale = _Scale.over(groups)
    rows = "".join(_row(where, row, parts, widths, scale) for where, row in layers.items())
    return (
        "<h2>Where few bits hurt</h2>"
        '<div class="scroll" role="region" aria-label="Sensitivity map" tabindex="0"><table class="map">'
        f"<caption><span>{_about(method, error)}</span></caption>{_head(parts, widths)}"
        f"<tbody>{rows}</tbody></table></div>"
    )


class _Scale:
    """KL to a share of the heat colour, logarithmic."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    @classmethod
    def over(cls, groups: Sequence[Group]) -> _Scale:
        shown = (harm for group in groups for width, harm in _harms(group).items() if "-" not in width)
        found = [harm for harm in shown if harm > _LEAST]
        return cls(min(found), max(found)) if found else cls(1.0, 1.0)

    def heat(self, harm: float) -> float:
        if harm <= _LEAST:
            return 0.0
        wide = math.log(self._high / self._low) if self._high > self._low else 1.0
        return _DARKEST * max(0.05, math.log(max(harm, self._low) / self._low) / wide)


def _harms(group: Group) -> Mapping[str, float]:
    """KL by width; of plans from before there were several, that at 4 bits alone."""
    return group.get("kl") or {"w4": group["kl_at_4_bits"]}


def _about(method: str, error: float | None) -> str:
    how = "" if method == "rtn" else f" Integers found by {text(method.upper())}."
    off = "" if error is None else f", which is {error:.0%} off (median) where both were measured"
    return (
        "KL divergence in thousandths of a nat when this group alone goes to a width, on held-out "
        "calibration text; darker hurts more. 4 bits are measured, the others are scaled from that"
        f"{off}.{how} Framed: the width the chosen recipe gives the group; kept is the source's own."
    )


def _head(parts: Sequence[str], widths: Sequence[str]) -> str:
    over = "".join(f'<th scope="col" colspan="{len(widths)}">{text(part)}</th>' for part in parts)
    names = "".join(
        f'<th scope="col" class="{_edge(i)}">{_label(width)}</th>'
        for _ in parts
        for i, width in enumerate(widths)
    )
    return (
        f'<thead><tr><th scope="col">layer</th>{over}</tr><tr><th scope="col">width</th>{names}</tr></thead>'
    )


def _row(
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
    label = f"{_label(width)} " if span > 1 else ""
    said = f"{text(group['group'])} at {_label(width)}"
    if harm is None:
        shown, heat = ("kept" if own and not label else ""), 0.0
    else:
        shown, heat = _thousandths(harm), scale.heat(harm)
    more = f" {text(variant)}" if own and variant else ""
    style = f'class="{_edge(at)}{own}" style="--a:{heat:.2f}" title="{said}"'
    return f"<td{across} {style}>{label}{shown}{more}</td>"


def _edge(at: int) -> str:
    return "edge" if at == 0 else "in"


def _label(width: str) -> str:
    return "kept" if width == _KEPT else text(width)


def _thousandths(harm: float) -> str:
    """2.7, 0.13, 0.02; blank below a hundredth."""
    value = harm * 1000
    if harm <= _LEAST:
        return ""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
