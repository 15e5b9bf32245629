"""llama_cpp.server, the OpenAI-compatible server of llama-cpp-python, on a GGUF file.

It answers one request at a time behind a lock; the others wait. `interrupt_requests` is turned off, or each
new request would end the one that is being answered. It keeps the keys and values of the last request, and a
request that begins the same computes the rest alone. `logits_all` is off: it is on by default and would
compute and keep the logits of every prompt token. Everything else is the server's default, but for threads
and context; batch sizes as llama.cpp's own defaults (n_batch 2048, n_ubatch 512).
"""

from __future__ import annotations

from hasten.bench.http_stream import Address
from hasten.bench.peers import EngineSpec

REQUIRES = ("llama_cpp", "fastapi", "uvicorn", "pydantic_settings", "sse_starlette", "starlette_context")
INSTALL = 'pip install "llama-cpp-python[server]==0.3.36"'
READY = "/v1/models"


def command(python: str, spec: EngineSpec, prepared: str, address: Address, decode_threads: int) -> list[str]:
    """The command line that serves a prepared GGUF (see `peers.llama_cpp.prepare`).

    Args:
        decode_threads: threads for answer tokens; prompts take all of `spec.threads`. More are not always
            faster here: on a 2-core AMX machine one thread decodes 42 tokens a second and two decode 24.
    """
    options = {
        "model": prepared,
        "host": address.host,
        "port": address.port,
        "n_ctx": spec.context,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": decode_threads,
        "n_threads_batch": spec.threads,
        "logits_all": False,
        "interrupt_requests": False,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value).lower())]
    flags[1] = prepared  # a path keeps its capitals
    return [python, "-m", "llama_cpp.server", *flags]
