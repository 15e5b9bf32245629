"""llama.cpp through llama-cpp-python's low-level binding, and its server.

The weights are requantised from the source GGUF by llama.cpp's own `llama_model_quantize`, `pure` for Q4_0
so that head and embedding are Q4_0 too: the same bits as Hasten's `w4`. Load and context parameters are
llama.cpp's defaults (memory map, repacking, n_batch 2048, n_ubatch 512, flash attention `auto`, f16 KV) but
for the thread counts. The next token is NumPy's argmax over the logits row, which is faster than
llama.cpp's own greedy sampler.

`GGML_NATIVE=ON` compiles AMX in where the compiler's machine has it, and llama.cpp then uses it;
`cmake_args` gives the flags for builds with and without it.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

from hasten.bench.figures import Sample, TokenClock
from hasten.bench.peers import EngineSpec, Peer, key_of, made_once
from hasten.errors import PeerError

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


PEER = Peer(
    formats=("q4_0", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "source"),
    requires=("llama_cpp",),
    install=LLAMA_CPP,
    install_env=cmake_args(),
    crash_hint=f"build it anew: {cmake_args()} pip install --no-cache-dir --force-reinstall {LLAMA_CPP}",
)
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}
"""Values of llama.cpp's `enum llama_ftype`."""


def prepare(spec: EngineSpec) -> str:
    """Requantise the source once; `source` (or a file that already is of this type) is used as it is."""
    source = Path(spec.source)
    if not source.is_file() or source.suffix != ".gguf":
        raise PeerError(
            f"llama.cpp needs a GGUF file as the source, got {spec.source}",
            hint="convert the folder with llama.cpp's convert_hf_to_gguf.py and benchmark the .gguf",
        )
    if spec.format == "source" or (spec.format != "q4_0" and _file_type(source) == FILE_TYPES[spec.format]):
        return str(source)
    pure = "pure-" if spec.format == "q4_0" else ""
    target = Path(spec.cache) / key_of(source) / f"{pure}{spec.format}.gguf"
    return str(made_once(target, lambda part: _quantize(source, part, spec.format, spec.threads)))


def load(spec: EngineSpec, prepared: str) -> LlamaCpp:
    return LlamaCpp(spec, prepared)


def _quantize(source: Path, target: Path, form: str, threads: int) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = FILE_TYPES[form]
    params.allow_requantize = True
    params.pure = form == "q4_0"
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code != 0:
        raise PeerError(f"llama.cpp could not requantise {source} to {form} (code {code})")


def _open(path: Path | str, **fields: Any) -> Any:
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 0
    for name, value in fields.items():
        setattr(params, name, value)
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise PeerError(f"llama.cpp could not open {path}", hint="its message is above, on stderr")
    return model


def _file_type(path: Path) -> int | None:
    import llama_cpp

    model = _open(path, vocab_only=True)
    text = ctypes.create_string_buffer(64)
    length = llama_cpp.llama_model_meta_val_str(model, b"general.file_type", text, len(text))
    llama_cpp.llama_model_free(model)
    return int(text.value) if length > 0 else None


class LlamaCpp:
    def __init__(self, spec: EngineSpec, path: str) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._model = _open(path)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = spec.context * spec.batch
        params.n_seq_max = spec.batch
        params.n_threads = params.n_threads_batch = spec.threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise PeerError(f"llama.cpp could not make a context of {params.n_ctx} tokens")
        self._chunk = int(llama_cpp.llama_n_batch(self._context))
        self._vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        self.version = str(llama_cpp.__version__)
        self.format = spec.format
        self.weight_bytes: int | None = int(llama_cpp.llama_model_size(self._model))
        info = llama_cpp.llama_print_system_info().decode()
        self.notes = "CPU features: " + " ".join(re.findall(r"(\w+) = 1", info))

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        clock = TokenClock(prompts)
        last: list[int] = []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, len(prompt), self._chunk):
                part = prompt[start : start + self._chunk]
                ends = start + len(part) == len(prompt)
                self._decode(
                    [(t, start + i, sequence) for i, t in enumerate(part)], last_only=True, want=ends
                )
            last.append(self._argmax(-1))
            clock.push(sequence, last[sequence])
        for step in range(output - 1):
            rows = [(last[s], len(prompts[s]) + step, s) for s in range(len(prompts))]
            self._decode(rows, last_only=False, want=True)
            for sequence in range(len(prompts)):
                last[sequence] = self._argmax(sequence)
                clock.push(sequence, last[sequence])
        return clock.finish()

    def _decode(self, rows: list[tuple[int, int, int]], *, last_only: bool, want: bool) -> None:
        """Run rows of (token, position, sequence); logits for the last or for all of them where wanted."""
        api = self._api
        batch = api.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequence) in enumerate(rows):
                batch.token[i] = token
                batch.pos[i] = position
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = want and (not last_only or i == len(rows) - 1)
            code = api.llama_decode(self._context, batch)
        finally:
            api.llama_batch_free(batch)
        if code != 0:
            raise PeerError(f"llama.cpp's llama_decode failed with code {code}")

    def _argmax(self, row: int) -> int:
        import numpy as np

        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())
