"""Figures inside sentences, from the records: `<!-- figure: KIND: WHICH -->518<!-- end -->` in a document.

KIND is an entry of `FIGURES`; WHICH says which figure of its record.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from records import figure, read

INLINE = re.compile(r"(<!-- figure: (\w+): ([^>]+?) -->).*?(<!-- end -->)")


def _stage(which: str) -> dict[str, Any]:
    """One step of one module: `wide, batch 1 / pruned`."""
    case, _, name = which.partition(" / ")
    stages = read("article_module")["details"]["cases"][case]["report"]["stages"]
    return next(stage for stage in stages if stage["name"] == name)


def _faster(which: str) -> str:
    """How many times as fast a later step of a module is: `wide, batch 256 / as it was / int8`."""
    case, before, after = which.split(" / ")
    seconds = [_stage(f"{case} / {name}")["seconds"]["median"] for name in (before, after)]
    return f"{seconds[0] / seconds[1]:.1f}"


def _increase(verdict: dict[str, Any]) -> str:
    share: float = verdict["ppl_increase"]
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2f} %"


def _judged(which: str) -> str:
    """What a quantiser's recipe costs: its name in `quantisers.json`."""
    return _increase(next(one for one in read("quantisers")["details"]["judged"] if one["name"] == which))


def _uniform(which: str) -> str:
    """What one of our recipes of `equal.json` costs, by its name."""
    ours = (pair["ours"] for pair in read("equal")["details"]["pairs"])
    return _increase(next(one for one in ours if one["name"] == which))


def _distilled(which: str) -> str:
    """`pruned / repaired`, `quantised / minutes`: perplexity of a verdict, or how long it took."""
    name, _, what = which.partition(" / ")
    record = read(f"distil-{name}")
    if what == "minutes":
        return f"{record['seconds'] / 60:.3g} minutes"
    return _increase(record["verdicts"][what])


def _decode(which: str) -> str:
    """Tokens a second of one request in `peers.json`, recipe within +1 %: `hasten`, or a peer's name."""
    found = read("peers")["details"]["chosen"]
    runs = {run["engine"]: run for run in (found["subject"], *found["peers"])}
    return f"{runs[which]['decode_tok_per_s']['median']:.1f}"


def _start(which: str) -> str:
    """Seconds of a whole process, median: `startup / first_token_s`."""
    name, _, what = which.partition(" / ")
    return f"{figure(read(name)['details'][what]['median'])} s"


FIGURES: dict[str, Callable[[str], str]] = {
    "us": lambda which: f"{_stage(which)['seconds']['median'] * 1e6:.0f}",
    "kb": lambda which: f"{_stage(which)['bytes'] / 1e3:,.0f} KB",
    "changed": lambda which: f"{100 * _stage(which)['relative_difference']:.1f} %",
    "faster": _faster,
    "judged": _judged,
    "uniform": _uniform,
    "mixture": lambda which: _increase(read("mixture")["details"][which]["verdict"]),
    "distilled": _distilled,
    "decode": _decode,
    "start": _start,
}
"""Kind -> what it says of a figure."""


def filled(text: str) -> str:
    """A document with all figures in its sentences made anew.

    Raises:
        KeyError, StopIteration: no kind has that name, or its record has no such figure.
        ValueError: a mark has no end, or is not written as the others are.
    """
    if text.count("<!-- figure:") != len(INLINE.findall(text)):
        raise ValueError("a figure's mark is not <!-- figure: KIND: WHICH -->...<!-- end -->")
    return INLINE.sub(lambda found: f"{found[1]}{FIGURES[found[2]](found[3])}{found[4]}", text)
