"""The CUDA kernel for attention over int8 pages: its source, compiled for a CPU, a thread a lane.

A GPU's own tests (test_executor.py) run the kernel itself.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from hasten.core import ModelSpec
from hasten.runtime.gpu import batch_attention
from hasten.runtime.gpu.batch_attention import Int8Attention
from hasten.runtime.gpu.driver import with_defines
from hasten.runtime.gpu.plain import PagedCache
from hasten.runtime.gpu.shape import PAGE
from specs import spec

HERE = Path(__file__).parent
KERNEL = Path(batch_attention.__file__).parent / "kernels" / "paged_attention.cu"
LENGTHS = (1, 33, 64)
TABLE = 3
INLINE = ("copy16", "copy4", "permuted", "packed", "transposed", "multiply_add")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def source(defines: dict[str, int | str]) -> str:
    """The kernel's text for a C++ compiler: instructions of the GPU are functions of the header."""
    text = KERNEL.read_text()
    for name in INLINE:
        text, count = re.subn(rf"^DEVICE \w+ {name}\(.*?^}}\n", "", text, flags=re.MULTILINE | re.DOTALL)
        assert count == 1, name
    text = re.sub(r'^\s*asm volatile\("cp\.async.*?;\n', "", text, flags=re.MULTILINE)
    text = text.replace("#define DEVICE __device__ __forceinline__", "")
    text = text.replace("extern __shared__ __align__(16) u8 ring[];", "u8* ring = its_memory;")
    text = text.replace("__shared__ bool", "static bool")
    assert "asm" not in text and "__shared__" not in text
    ends = """
    extern "C" void run(const Args* a, int blocks) {
      launched(blocks, layout[1], layout[0], [&] { attend(*a); });
    }
    """
    return '#include "emulated_warps.h"\n' + with_defines(text, defines) + ends


class OnCpu(Int8Attention):
    """The kernel behind the same call."""

    def __init__(self, config: ModelSpec, slab: int, folder: Path, together: int, stages: int) -> None:
        self._mixer, self._groups = config.blocks[0].mixer, config.blocks[0].mixer.kv_heads // together
        defines = self.defines(config, TABLE, slab, 2, stages, together)
        (folder / "kernel.cpp").write_text(source(defines))
        command = ["g++", "-std=c++20", "-O1", "-w", "-pthread", "-shared", "-fPIC", f"-I{HERE}"]
        subprocess.run([*command, "-o", folder / "kernel.so", folder / "kernel.cpp"], check=True)
        self._library = ctypes.CDLL(str(folder / "kernel.so"))

    def _start(self, stages: int, blocks: int, arguments: Any) -> None:
        self._library.run(ctypes.byref(arguments), blocks)


def attended(config: ModelSpec, cache: PagedCache, table: Any, queries: Any, row: int) -> Any:
    """One row's attention in float32: [H D]."""
    mixer, length = config.blocks[0].mixer, LENGTHS[row]
    scales = cache.arrays[2:]
    k, v = (
        (part[0][table[row].long()] * by[0][table[row].long()][..., None]).transpose(0, 1).flatten(1, 2)
        for part, by in zip((cache.keys, cache.values), scales, strict=True)
    )
    q = queries[row].float().view(mixer.kv_heads, -1, mixer.head_dim)
    scores = torch.einsum("kgd,ksd->kgs", q, k[:, :length]) * mixer.score_scale
    if mixer.softcap is not None:
        scores = torch.tanh(scores / mixer.softcap) * mixer.softcap
    if mixer.window is not None:
        scores[..., : max(0, length - mixer.window)] = float("-inf")
    return torch.einsum("kgs,ksd->kgd", scores.softmax(-1), v[:, :length]).flatten()


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize(
    ("head", "heads", "kv_heads", "window", "softcap", "together", "split"),
    [
        (128, 4, 1, None, None, 1, 1024),
        (64, 14, 2, None, None, 2, 32),
        (256, 2, 2, 40, 5.0, 2, 32),
    ],
)
def test_it_attends_to_what_the_pages_hold(
    head: int, heads: int, kv_heads: int, window: int | None, softcap: float | None, together: int,
    split: int, stages: int, tmp_path: Path,
) -> None:  # fmt: skip
    """Rows that end anywhere in a page; what lies behind their ends is another's and may be anything."""
    generator = torch.Generator().manual_seed(head)
    config = spec(
        "llama", 67, 64, 96, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=head,
        sliding_window=window, sliding_layers=(window is not None,), attention_softcap=softcap,
        context_length=96,
    )  # fmt: skip
    rows = len(LENGTHS)
    cache = PagedCache(config, rows * TABLE, "cpu", is_int8=True)
    table = torch.randperm(rows * TABLE, generator=generator).view(rows, TABLE).int()
    for row in range(rows):
        places = (table[row, :, None] * PAGE + torch.arange(PAGE)).flatten()
        keys, values = torch.randn(2, len(places), kv_heads, head, generator=generator)
        cache.put(0, places, keys, values * torch.rand(len(places), kv_heads, 1, generator=generator))
    queries = (2 * torch.randn(rows, heads * head, generator=generator)).bfloat16()
    expected = torch.stack([attended(config, cache, table, queries, row) for row in range(rows)])
    for row, length in enumerate(LENGTHS):
        for scales in (part[0] for part in cache.arrays[2:] if part is not None):
            scales[table[row, -(-length // PAGE) :].long()] = float("nan")
            if length % PAGE:
                scales[table[row, length // PAGE].long(), :, length % PAGE :] = float("nan")
    splits = -(-min(TABLE * PAGE, (window or TABLE * PAGE) + split) // split)
    out, peaks = (
        torch.full((rows, heads * head), float("nan")).bfloat16(),
        torch.zeros(rows, dtype=torch.int32),
    )
    slots = rows * heads * splits
    scratch = [torch.full((slots * head,), float("nan")), torch.zeros(slots), torch.zeros(slots)]
    arrivals = torch.zeros(rows * kv_heads, dtype=torch.int32)
    positions = torch.tensor(LENGTHS, dtype=torch.int32) - 1
    tensors = [queries, *cache.of(0), table, positions, out, peaks, *scratch, arrivals]
    kernel = OnCpu(config, cache.slab, tmp_path, together, stages)
    kernel.launch(tensors, rows, batch_attention.AttentionTile(split), splits, window or 0)
    assert float((out.float() - expected).norm() / expected.norm()) < 4e-3
    assert np.array_equal(peaks.view(torch.float32), out.float().abs().amax(1))
    assert not arrivals.any()
