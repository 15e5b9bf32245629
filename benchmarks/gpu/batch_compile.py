"""Compiles the batched step's kernels without launching them, on a machine without a GPU too.

    python benchmarks/gpu/batch_compile.py 0.6B 16    # for sm_90: registers, shared memory, spills

With tensors on torch's `meta` device the kernels see the shapes and types of a real model and no memory.
Several processes that compile beforehand fill Triton's cache, so that a GPU does not wait for a compiler.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from batch_models import CONTEXT, random_weights
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hasten.runtime.gpu.batch_step import BatchStep, StepOptions


class _NoDevice:
    """What Triton asks a driver for when it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(seen: Callable[[str, Any], None] = lambda name, kernel: None) -> Iterator[None]:
    """Inside, launching a kernel compiles it and calls seen(name, compiled kernel)."""
    launch = JITFunction.__getitem__

    def compile_only(self: Any, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            seen(self.fn.__name__, self.warmup(*args, grid=(1, 1, 1), **kwargs))

        return run

    JITFunction.__getitem__ = compile_only
    try:
        yield
    finally:
        JITFunction.__getitem__ = launch


def resources(cubin: bytes) -> str:
    """Registers, stack and shared memory of a compiled kernel, and its matrix instructions."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True).stdout
    counts = {
        name: len(re.findall(rf"\b{name}\b", code))
        for name in ("HGMMA", "QGMMA", "HMMA", "LDGSTS", "CCTL", "LDL", "STL")
    }
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return f"registers {found[1]} stack {found[2]} " + " ".join(f"{k} {v}" for k, v in counts.items() if v)


def main() -> None:
    model, rows = sys.argv[1], int(sys.argv[2])
    triton.runtime.driver.set_active(_NoDevice())
    seen: set[Any] = set()

    def report(name: str, kernel: Any) -> None:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(f"{name:18}shared {kernel.metadata.shared:7} {resources(kernel.asm['cubin'])}", flush=True)

    for precision in sys.argv[3:] or ["bf16"]:
        weights = random_weights(model, precision, "meta")
        for early in (0, 2):
            step = BatchStep(weights, StepOptions(rows, 32, CONTEXT, early=early))
            with compiling(report):
                step.run(step.shape(rows, 512))


if __name__ == "__main__":
    main()
