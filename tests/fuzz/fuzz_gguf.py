"""Fuzz the GGUF reader.

    pip install atheris
    python tests/fuzz/fuzz_gguf.py -max_total_time=300 DIR tests/fuzz/corpus/gguf

DIR collects what reaches new code.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["hasten.models"]):
    import targets


def run(data: bytes) -> None:
    targets.gguf(data)


if __name__ == "__main__":
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()
