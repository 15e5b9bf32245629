# ruff: noqa: RUF001  the punctuation of Chinese
"""The READMEs' chart: decode speed at equal quality, in the language that is asked for.

    python docs/chart.py en > docs/speed.svg
    python docs/chart.py zh > docs/speed.zh-CN.svg

Each pair is one of llama.cpp's types and the recipe of ours that `benchmarks/bars.py equal` found to be no
worse. Every figure comes from `benchmarks/results/equal.json`; a test draws the charts again and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from records import Record, figure, machine, read

WIDTH, LABEL, ROW, GAP, TOP, BOTTOM = 760, 262, 30, 10, 48, 34  # pixels; LABEL: where the bars begin
WORDS = {
    "en": {
        "title": "Decode, tokens a second, at equal quality (our KL divergence at most 10 % above)",
        "below": "{machine}; prompt {prompt}, output {output} tokens; medians of {n} rounds in turn, "
        "lines: 10th to 90th percentile",
        "cores": "cores",
    },
    "zh": {
        "title": "同等质量下的解码速度，词元/秒（Hasten 的 KL 散度至多高出 10 %）",
        "below": "{machine}；提示词 {prompt} 个词元，输出 {output} 个词元；{n} 轮交替测量的中位数，"
        "线段为第 10 至第 90 百分位",
        "cores": "个核心",
    },
}


@dataclass(frozen=True)
class Row:
    """One engine: tokens a second, with the 10th and the 90th percentile of the rounds."""

    title: str
    median: float
    low: float
    high: float
    ours: bool


def pairs_of(record: Record) -> list[tuple[Row, Row]]:
    """(theirs, ours) for every type of the other engine."""
    return [
        (
            _row(f"llama.cpp {pair['peer']['name'].partition(':')[2].upper()}", pair["peer"], peer),
            _row(f"Hasten {pair['ours']['name']}", pair["ours"], pair["speed"]["subject"]),
        )
        for pair in record["details"]["pairs"]
        for peer in pair["speed"]["peers"]
    ]


def _row(title: str, judged: Record, run: Record) -> Row:
    speed = run["decode_tok_per_s"]
    name = f"{title}, KL {figure(judged['kl_mean'])}"
    return Row(name, speed["median"], speed["p10"], speed["p90"], judged["is_ours"])


def draw(record: Record, language: str) -> str:
    """The chart as SVG, which reads well on light and on dark pages."""
    pairs, words = pairs_of(record), WORDS[language]
    scale = (WIDTH - LABEL - 70) / max(row.high for pair in pairs for row in pair)
    speed = record["details"]["pairs"][0]["speed"]
    height = TOP + (2 * ROW + GAP) * len(pairs) + BOTTOM
    below = words["below"].format(
        machine=machine(record).replace("cores", words["cores"]),
        prompt=speed["workload"]["prompt"],
        output=speed["workload"]["output"],
        n=speed["subject"]["decode_tok_per_s"]["n"],
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="16" y="29" font-size="15" font-weight="bold" fill="#1b1f24">{words["title"]}</text>',
        *(line for place, row in _placed(pairs) for line in bar(row, place, scale)),
        f'<text x="16" y="{height - 12}" font-size="11" fill="#57606a">{below}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _placed(pairs: list[tuple[Row, Row]]) -> Iterator[tuple[int, Row]]:
    """Rows with their upper edge; the two of a pair touch."""
    for place, pair in enumerate(pairs):
        for member, row in enumerate(pair):
            yield TOP + place * (2 * ROW + GAP) + member * ROW, row


def bar(row: Row, top: int, scale: float) -> list[str]:
    """One engine's bar, its name, its figure, and a line from the 10th to the 90th percentile."""
    length, middle = row.median * scale, top + ROW / 2 - 1
    colour, weight = ("#0969da", "bold") if row.ours else ("#8c959f", "normal")
    return [
        f'<text x="{LABEL - 10}" y="{middle + 5:.1f}" text-anchor="end" font-weight="{weight}" '
        f'fill="#1b1f24">{row.title}</text>',
        f'<rect x="{LABEL}" y="{top}" width="{length:.1f}" height="{ROW - 4}" rx="3" fill="{colour}"/>',
        f'<path d="M{LABEL + row.low * scale:.1f} {middle:.1f}H{LABEL + row.high * scale:.1f}" '
        'stroke="#1b1f24" stroke-width="2"/>',
        f'<text x="{LABEL + max(row.median, row.high) * scale + 8:.1f}" y="{middle + 5:.1f}" '
        f'font-weight="{weight}" fill="#1b1f24">{figure(row.median)}</text>',
    ]


if __name__ == "__main__":
    sys.stdout.write(draw(read("equal"), sys.argv[1] if len(sys.argv) > 1 else "en"))
