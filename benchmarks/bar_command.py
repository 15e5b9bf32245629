"""What the commands that measure bars share: their flags, and one benchmark from measuring to the record."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

from bar import Benchmark, Settings, record, say
from hasten.errors import HastenError


def asked(about: str | None, known: Iterable[str], artifact: str, artifact_help: str) -> tuple[str, Settings]:
    """Read the command line: what to measure, and with what; the environment follows the settings."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", *known])
    parser.add_argument("--model", default="demo", help="the source model")
    parser.add_argument("--artifact", default=artifact, help=artifact_help)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-python", default=os.environ.get("HASTEN_PEER_PYTHON"))
    parser.add_argument("--isa", choices=["avx2", "avx512"], help="keep every engine to this instruction set")
    given = parser.parse_args()
    settings = Settings(given.model, given.artifact, given.threads, given.runs, given.peer_python, given.isa)
    os.environ.update(settings.environment())
    return given.what, settings


def measured(name: str, benchmark: Benchmark, settings: Settings) -> bool:
    """One benchmark, recorded under a name; True if all its bars were kept."""
    try:
        bars, details = benchmark(settings)
    except HastenError as error:
        say(f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return False
    say(f"written: {record(name, settings, bars, details)}")
    return all(bar.passed for bar in bars)
