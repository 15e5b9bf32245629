"""The README's chart, from the record of the comparison with other engines.

    python docs/chart.py > docs/speed.svg

It draws decode speed of the recipe that Hasten chose within +1 % perplexity, beside the other engines' 8 bits
and bf16. Every figure comes from `benchmarks/results/peers.json`; a test draws the chart
again and compares it with the file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "peers.json"
WIDTH, LABEL, ROW, TOP, BOTTOM = 760, 232, 34, 44, 34  # pixels; LABEL: where the bars begin
TITLES = {"hasten": "Hasten", "openvino": "OpenVINO GenAI"}  # others are called by their engine's name


@dataclass(frozen=True)
class Row:
    """One engine: tokens a second, with the 10th and the 90th percentile of the rounds."""

    title: str
    median: float
    low: float
    high: float
    ours: bool


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The engines of the comparison, the fastest first."""
    compared = record["details"]["chosen"]
    found = []
    for run in (compared["subject"], *compared["peers"]):
        speed = run["decode_tok_per_s"]
        title = f"{TITLES.get(run['engine'], run['engine'])}, {run['format']}"
        found.append(Row(title, speed["median"], speed["p10"], speed["p90"], run is compared["subject"]))
    return sorted(found, key=lambda row: -row.median)


def draw(record: dict[str, Any]) -> str:
    """The chart as SVG, which reads well on light and on dark pages."""
    rows = rows_of(record)
    scale = (WIDTH - LABEL - 90) / max(row.high for row in rows)
    rounds = record["details"]["chosen"]["subject"]["decode_tok_per_s"]["n"]
    workload = record["details"]["chosen"]["workload"]
    height = TOP + ROW * len(rows) + BOTTOM
    below = (
        f"{record['machine']['cpu'].replace('(R)', '')}, {record['settings']['threads']} threads; prompt "
        f"{workload['prompt']}, output {workload['output']} tokens; median of {rounds} interleaved rounds"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        '<text x="16" y="27" font-size="15" font-weight="bold" fill="#1b1f24">'
        "Decode, tokens a second: Hasten within +1 % perplexity, the others in 8 bits or bf16</text>",
        *(line for place, row in enumerate(rows) for line in bar(row, TOP + place * ROW, scale)),
        f'<text x="16" y="{height - 12}" font-size="12" fill="#57606a">{below}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def bar(row: Row, top: int, scale: float) -> list[str]:
    """One engine's bar, its name, its figure, and a line from the 10th to the 90th percentile."""
    length, middle = row.median * scale, top + ROW / 2 - 2
    colour, weight = ("#0969da", "bold") if row.ours else ("#8c959f", "normal")
    return [
        f'<text x="{LABEL - 10}" y="{middle + 5:.1f}" text-anchor="end" font-weight="{weight}" '
        f'fill="#1b1f24">{row.title}</text>',
        f'<rect x="{LABEL}" y="{top}" width="{length:.1f}" height="{ROW - 10}" rx="3" fill="{colour}"/>',
        f'<path d="M{LABEL + row.low * scale:.1f} {middle:.1f}H{LABEL + row.high * scale:.1f}" '
        'stroke="#1b1f24" stroke-width="2"/>',
        f'<text x="{LABEL + row.high * scale + 8:.1f}" y="{middle + 5:.1f}" font-weight="{weight}" '
        f'fill="#1b1f24">{row.median:.0f}</text>',
    ]


if __name__ == "__main__":
    sys.stdout.write(draw(json.loads(RECORD.read_text(encoding="utf-8"))))
