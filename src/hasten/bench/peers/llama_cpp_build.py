"""How llama-cpp-python is built for this machine's own instructions."""

from __future__ import annotations

from pathlib import Path

LLAMA_CPP = "llama-cpp-python==0.3.36"

WITH_AMX = "-fno-tree-dse -fno-dse"
"""GCC 12 removes the stores to AMX's tile configuration, because its `_tile_loadconfig` does not say that it
reads them: the first product of a llama.cpp with AMX crashes. Without dead-store elimination it is right."""

WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""What a processor without AMX would get; for comparisons where nobody uses it."""


def cmake_args(flags: str | None = None) -> str:
    """The variable to set for pip, with compiler flags; None takes what this processor needs."""
    if flags is None:
        flags = WITH_AMX if "amx_int8" in _cpu_flags() else ""
    options = f" -DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}'" if flags else ""
    return f'CMAKE_ARGS="-DGGML_NATIVE=ON{options}"'


def _cpu_flags() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    return next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
