"""The sensitivity map: what 4 bits cost in each group of layers, and the width each one got."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.report.figures import small, text

_DARKEST = 0.75  # of the heat colour: text on it stays readable


def sensitivity_map(groups: Sequence[Mapping[str, Any]]) -> str:
    """A table of layers by part, shaded by KL at 4 bits (log), with widths; empty without a map."""
    layers: dict[str, dict[str, Mapping[str, Any]]] = {}
    for group in groups:
        where, _, part = group["group"].rpartition(".")
        layers.setdefault(where or part, {})[part] = group
    if not layers:
        return ""
    parts = [part for part in ("qkv", "o", "gate_up", "down") if any(part in row for row in layers.values())]
    harms = [g["kl_at_4_bits"] for g in groups if g["kl_at_4_bits"] > 0]
    low, high = (min(harms), max(harms)) if harms else (1.0, 1.0)
    head = "".join(f'<th scope="col">{text(part)}</th>' for part in parts)
    rows = []
    for where, row in layers.items():
        cells = (
            "".join(_cell(row.get(part), low, high) for part in parts)
            if set(row) & set(parts)
            else _cell(next(iter(row.values())), low, high, len(parts))
        )
        rows.append(f'<tr><th scope="row">{text(where.replace("layers.", "layer "))}</th>{cells}</tr>')
    return (
        "<h2>Where few bits hurt</h2>"
        '<div class="scroll" role="region" aria-label="Sensitivity map" tabindex="0"><table class="map">'
        "<caption><span>KL divergence (nats) when this group alone goes to 4 bits, on calibration text; "
        "darker hurts more. After it, the width the chosen recipe gives the group.</span></caption>"
        f'<thead><tr><th scope="col">layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(group: Mapping[str, Any] | None, low: float, high: float, span: int = 1) -> str:
    if group is None:
        return '<td style="--a:0"></td>'
    harm = group["kl_at_4_bits"]
    wide = math.log(high / low) if high > low else 1.0
    heat = _DARKEST * max(0.05, math.log(max(harm, low) / low) / wide) if harm > 0 else 0.0
    across = f' colspan="{span}"' if span > 1 else ""
    width = f'<span class="small">{text(group["layout"])}</span>'
    return f'<td{across} style="--a:{heat:.2f}">{small(harm)} {width}</td>'
