# What native/bind/ offers to Python; meanings are in its docstrings. tests/native/test_stub.py keeps step.
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE_TOKENS: int
kernels: Any  # single kernels, for the tests

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def usable_cores() -> int: ...
def allocate(bytes: int) -> NDArray[np.uint8]: ...
def checksums(data: NDArray[np.uint8], piece: int, threads: int = 1) -> list[int]: ...

class Decoder:
    def __init__(self, config: dict[str, Any], threads: int, kv_pages: int, kv_int8: bool) -> None: ...
    def set_linear(
        self, name: str, data: NDArray[np.uint8], rows: int, cols: int, bits: int, group: int, symmetric: bool
    ) -> None: ...
    def set_vector(self, name: str, values: NDArray[np.float32]) -> None: ...
    def check(self) -> None: ...
    def step(
        self,
        tokens: NDArray[np.int32],
        counts: NDArray[np.int32],
        pasts: NDArray[np.int32],
        tables: NDArray[np.int32],
        longs: NDArray[np.uint8],
        rows: NDArray[np.int32],
        prefill: bool,
    ) -> NDArray[np.float32]: ...
    def head(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]: ...
    def copy_page(self, source: int, target: int) -> None: ...
    @property
    def page_bytes(self) -> int: ...
    def profile(self, reset: bool = True) -> dict[str, Any]: ...

class PackError(ValueError):
    pass

def packed_bytes(rows: int, cols: int, bits: int, group: int = 32, symmetric: bool = True) -> int: ...
def pack(
    weights: NDArray[np.uint8],
    dtype: str,
    rows: int,
    cols: int,
    bits: int,
    group: int,
    symmetric: bool,
    out: NDArray[np.uint8],
    row_order: NDArray[np.int64] | None = None,
    offset: float = 0.0,
    threads: int = 0,
) -> tuple[float, float]: ...
def pack_ggml(
    weights: NDArray[np.uint8],
    dtype: str,
    rows: int,
    cols: int,
    out: NDArray[np.uint8],
    row_order: NDArray[np.int64] | None = None,
    threads: int = 0,
) -> tuple[float, float]: ...
def ggml_layout(dtype: str) -> tuple[int, int, bool, bool]: ...
def unpack(
    data: NDArray[np.uint8], rows: int, cols: int, bits: int, group: int, symmetric: bool, threads: int = 0
) -> NDArray[np.float32]: ...
def unpack_rows(
    data: NDArray[np.uint8],
    rows: int,
    cols: int,
    bits: int,
    group: int,
    symmetric: bool,
    row_ids: NDArray[np.int32],
) -> NDArray[np.float32]: ...
def dequantize_ggml(data: NDArray[np.uint8], dtype: str, n: int, threads: int = 0) -> NDArray[np.float32]: ...
def sample(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    positions: NDArray[np.int64],
) -> NDArray[np.int32]: ...
def divergence(
    ref: NDArray[np.float32], cand: NDArray[np.float32], targets: NDArray[np.int32], threads: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]: ...
def probe_isas() -> list[str]: ...
def probe_peaks() -> list[tuple[str, str]]: ...
def probe_peak_tera_per_s(isa: str, kind: str, threads: int, seconds: float) -> list[float]: ...
def probe_read_gb_per_s(threads: int, bytes: int, seconds: float) -> tuple[int, list[float]]: ...
