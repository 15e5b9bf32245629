r"""llama.cpp's quantisation with an importance matrix, through its two programs.

They come with the sources of llama.cpp, which llama-cpp-python's sdist has within:

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_COMMIT=llama-cpp-python-0.3.36
    cmake --build build -j2 --target llama-imatrix llama-quantize

The head and the embedding go as Q8_0, int8 in groups of 32, as in every other contender.
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from bar import say
from hasten.compress.calibration import LENGTH
from hasten.errors import PeerError
from quantisers_material import Material

PROGRAMS = ("llama-imatrix", "llama-quantize")
HEAD = "q8_0"


def quantise(material: Material, programs: Path, out: Path, kind: str, threads: int) -> dict[str, Any]:
    """Write `out` in a type such as "q4_0" and tell how.

    Raises:
        PeerError: a program is missing or fails.
    """
    matrix = material.work / "imatrix.gguf"
    matrix_s = 0.0
    if not matrix.exists():
        matrix_s = _importance(material, programs, matrix, threads)
    command = [str(programs / "llama-quantize"), "--imatrix", str(matrix)]
    command += ["--output-tensor-type", HEAD, "--token-embedding-type", HEAD]
    started = time.perf_counter()
    _run([*command, str(material.gguf), str(out), kind, str(threads)])
    return {
        "versions": {"llama.cpp": _version(programs)},
        "settings": {"type": kind, "imatrix": f"windows of {LENGTH}", "head and embedding": HEAD},
        "seconds": matrix_s + time.perf_counter() - started,
    }


def _importance(material: Material, programs: Path, matrix: Path, threads: int) -> float:
    """Compute the matrix; gives the seconds it took."""
    say("llama.cpp: computing the importance matrix")
    partial = matrix.with_name("partial-imatrix.gguf")
    files = ["-m", str(material.gguf), "-f", str(material.text), "-o", str(partial)]
    started = time.perf_counter()
    shape = ["-c", str(LENGTH), "-b", str(LENGTH), "-ub", str(LENGTH), "-t", str(threads)]
    _run([str(programs / "llama-imatrix"), *files, *shape, "--no-ppl"])
    partial.replace(matrix)
    return time.perf_counter() - started


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as wrong:
        raise PeerError(
            f"{command[0]} cannot be run: {wrong.strerror}",
            hint="give --peer llama.cpp=FOLDER, the one that holds llama-imatrix and llama-quantize",
        ) from None
    if done.returncode != 0:
        raise PeerError(
            f"{Path(command[0]).name} failed: {done.stderr[-800:]}",
            hint="build it again from the sdist of llama-cpp-python: see benchmarks/quantisers_llama_cpp.py",
        )
    return done.stdout + done.stderr


def _version(programs: Path) -> str:
    said = _run([str(programs / "llama-imatrix"), "--version"])
    lines = [line for line in said.splitlines() if line.startswith("version")]
    return lines[0].removeprefix("version: ") if lines else "unknown"
