"""A bar of the speed table: a figure, what it must reach, and the record both go into."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.core import SCHEMA_VERSION, as_json

RESULTS = Path(__file__).parent / "results"
ENVIRONMENT = ("HASTEN_ISA", "ONEDNN_MAX_CPU_ISA", "HASTEN_PEER_PYTHON")


@dataclass(frozen=True)
class Bar:
    """One figure against its limit."""

    name: str
    figure: float | None  # None: not measured
    limit: float
    unit: str
    at_least: bool = True  # False: at most

    @property
    def passed(self) -> bool:
        """Whether the figure was measured and keeps its limit."""
        if self.figure is None:
            return False
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit

    def line(self) -> str:
        """The bar as one line of text."""
        sign = ">=" if self.at_least else "<="
        figure = "unknown" if self.figure is None else f"{self.figure:.4g}"
        verdict = "pass" if self.passed else "MISS"
        return f"{verdict}  {self.name:<58} {figure:>9} {self.unit:<8} bar {sign} {self.limit:.4g}"


@dataclass(frozen=True)
class Settings:
    """What all bars of one run share."""

    model: str
    artifact: str
    threads: int
    runs: int
    peer_python: str | None
    isa: str | None  # None: all the machine has

    def environment(self) -> dict[str, str]:
        """Variables that keep every engine to the instruction set: ours, and oneDNN's (torch, OpenVINO)."""
        chosen = dict(os.environ)
        if self.peer_python:
            chosen["HASTEN_PEER_PYTHON"] = self.peer_python
        if self.isa:
            chosen["HASTEN_ISA"] = self.isa
            chosen["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16" if self.isa == "avx512" else "AVX2"
        return chosen


ABSOLUTE = re.compile(r"(?<![\w./])/(?:[\w.+-]+/)+")
"""Folders of absolute paths: a record says what was run, not where it lay."""

Benchmark = Callable[[Settings], "tuple[list[Bar], Any]"]


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def record(name: str, settings: Settings, bars: Sequence[Bar], details: Any) -> Path:
    """Print the bars and write `results/NAME.json` (or NAME-ISA.json) with machine, versions, command."""
    import hasten
    from hasten.machine.probe import probe

    for bar in bars:
        print(bar.line(), flush=True)
    document = {
        "schema_version": SCHEMA_VERSION,
        "benchmark": name,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": as_json(settings),
        "environment": {key: os.environ[key] for key in ENVIRONMENT if key in os.environ},
        "machine": as_json(probe(measure=False)),
        "versions": {"hasten": hasten.__version__, "python": sys.version.split()[0]},
        "bars": [{**as_json(bar), "passed": bar.passed} for bar in bars],
        "details": as_json(details),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (f"{name}-{settings.isa}.json" if settings.isa else f"{name}.json")
    text = json.dumps(document, indent=2, allow_nan=False)
    path.write_text(ABSOLUTE.sub("", text) + "\n", encoding="utf-8")
    return path
