"""llama.cpp's types with an importance matrix, run in the Python that has llama-cpp-python.

    python quantisers_llama_cpp.py SOURCE.gguf OUT.gguf IDS.npy THREADS TYPE

TYPE is q4_0 or q4_k_m, IDS.npy the calibration windows, int32 [B, T]. The importance matrix is what
llama-imatrix computes (tools/imatrix: the mean square of every input of every matrix of the blocks, by a
callback on each product), the rest is llama_model_quantize, as in llama-quantize. It is kept beside OUT: the
next type reads it. The head and the embedding go as Q8_0, int8 in groups of 32. The last line of stdout is
JSON: versions, settings, seconds (`importance_s` those of the matrix, whoever computed it), peak memory.
"""

from __future__ import annotations

import ctypes
import json
import resource
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

TYPES = {"q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
Doubles = npt.NDArray[np.float64]


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h: four dimensions, 64 bytes of parameters, ten sources."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.POINTER(Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


class Importance:
    """Sums of squares of the inputs of every matrix `blk.*`, collected while windows are read."""

    def __init__(self) -> None:
        base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        base.ggml_op_name.restype = ctypes.c_char_p
        self._op_name = base.ggml_op_name
        self._sums: dict[str, Doubles] = defaultdict(lambda: np.zeros(1))
        self._rows: dict[str, int] = defaultdict(int)
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    def matrix(self) -> dict[str, npt.NDArray[np.float32]]:
        """Tensor's name -> [columns]."""
        return {name: (sums / self._rows[name]).astype(np.float32) for name, sums in self._sums.items()}

    def _see(self, at: int, ask: bool, _: int | None) -> bool:
        """Called before (`ask`) and after each operation of the graph."""
        tensor = Tensor.from_address(at)
        if self._op_name(tensor.op) != b"MUL_MAT":
            return not ask
        weight, x = tensor.src[0].contents, tensor.src[1].contents
        is_wanted = weight.name.startswith(b"blk.") and x.type == llama_cpp.GGML_TYPE_F32
        if ask or not is_wanted:
            return is_wanted or not ask
        cols, rows = x.ne[0], x.ne[1] * x.ne[2] * x.ne[3]
        assert x.nb[1] == 4 * cols
        values = np.ctypeslib.as_array((ctypes.c_float * (rows * cols)).from_address(x.data))
        squares = np.square(values.reshape(rows, cols), dtype=np.float64).sum(axis=0)
        name = weight.name.decode()
        self._sums[name] = self._sums[name] + squares
        self._rows[name] += rows
        return True


def kept(source: Path, ids: Path, place: Path, threads: int) -> tuple[dict[str, Any], float]:
    """The matrix and the seconds it took, computed now unless `place` holds that of these very files."""
    key = str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in (source, ids)])
    if place.is_file():
        with np.load(place) as found:
            if str(found["key"]) == key:
                held = {name: found[name] for name in found.files if name.startswith("blk.")}
                return held, float(found["seconds"])
    started = time.perf_counter()
    matrix = importance(source, np.load(ids), threads)
    seconds = time.perf_counter() - started
    np.savez(place, key=key, seconds=seconds, **matrix)
    return matrix, seconds


def importance(source: Path, windows: npt.NDArray[np.int32], threads: int) -> dict[str, Any]:
    """Read every window from an empty cache, all rows of the last layer too, as llama-imatrix does."""
    seen, length = Importance(), windows.shape[1]
    model = llama_cpp.llama_model_load_from_file(str(source).encode(), llama_cpp.llama_model_default_params())
    assert model, source
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = length
    params.n_threads = params.n_threads_batch = threads
    params.cb_eval = seen.callback
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    for number, window in enumerate(windows):
        print(f"window {number + 1} of {len(windows)}", file=sys.stderr, flush=True)
        for place, token in enumerate(window):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = int(token), place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return seen.matrix()


def quantise(source: Path, out: Path, matrix: dict[str, Any], kind: str, threads: int) -> None:
    """Write the file."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # a nameless one ends it
    for entry, (name, values) in zip(entries, matrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, TYPES[kind]
    params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    params.imatrix = entries
    partial = out.with_name(f"partial-{out.name}")
    done = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params)
    assert done == 0, f"llama_model_quantize gave {done}"
    partial.replace(out)


def main() -> None:
    """The matrix, then the file."""
    source, out, ids = (Path(text).resolve() for text in sys.argv[1:4])
    threads, kind = int(sys.argv[4]), sys.argv[5]
    llama_cpp.llama_backend_init()
    matrix, importance_s = kept(source, ids, out.with_name("importance.npz"), threads)
    started = time.perf_counter()
    quantise(source, out, matrix, kind, threads)
    record = {
        "versions": {
            "llama-cpp-python": version("llama-cpp-python"),
            "llama.cpp": llama_cpp.llama_version().decode(),
        },
        "settings": {"type": kind, "importance_matrix": len(matrix), "head_and_embedding": "q8_0"},
        "seconds": time.perf_counter() - started,
        "importance_s": importance_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
