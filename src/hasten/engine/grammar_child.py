"""The program that compiles grammars on trial and checks answers; `hasten.engine.grammar_trial` starts it.

It may die of a grammar or a schema: that is what it is for. Each grammar gets a smaller stack, less memory
and less processor time than the server has for the same work, so a grammar that is read here is read there
too. It imports nothing of Hasten, to start within 0.1 s, and ends by itself when its parent is gone or it is
idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

REQUEST = struct.Struct("<cId")  # kind, bytes that follow, seconds of processor time that they may take
GRAMMAR, CHECK = b"g", b"c"
READY, READ = b"!", b"+"
SIZE = struct.Struct("<I")  # bytes of what came of it, which follow
COMPILE_STACK = 64 << 20
MASK_STACK = 512 << 10  # masks are made on ordinary threads, of 8 MB
_MEMORY = 1 << 30  # beyond what the process has when it starts
_IDLE_S = 120.0
_NICE = 5  # the engine's threads come first
_MASKS = 4


class _Bytes:
    """A vocabulary of the 256 bytes and an end: compiling does not depend on the tokens."""

    is_tokenizer_wrapper = True
    special_token_ids = (256,)
    eos_token_id = 256
    bos_token_id = None

    def __init__(self) -> None:
        self.tokens = [bytes((value,)) for value in range(256)] + [b"<end>"]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def main() -> None:
    """Read grammars from standard input, answer each that did not end this process."""
    sys.path[:] = json.loads(sys.argv[1])
    from llguidance import LLParserLimits, LLTokenizer

    wrapper: Any = _Bytes()
    vocabulary = LLTokenizer(wrapper, n_vocab=257, eos_token=[256])
    limits = LLParserLimits(**json.loads(sys.argv[2]), verbose_errors=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    _limit_memory()
    os.write(1, READY)
    waiting = select.poll()
    waiting.register(0, select.POLLIN)
    while waiting.poll(1000 * _IDLE_S):
        header = _receive(REQUEST.size)
        if len(header) < REQUEST.size:
            return
        kind, size, seconds = REQUEST.unpack(header)
        source = _receive(size).decode()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process: SIGPROF has no handler
        found = b""
        if kind == CHECK:
            found = json.dumps(_violations(**json.loads(source))).encode()
        else:
            _try(vocabulary, source, limits)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, READ + SIZE.pack(len(found)) + found)


def _try(vocabulary: Any, source: str, limits: Any) -> None:
    from llguidance import LLMatcher

    made: list[LLMatcher] = []
    _on_stack(COMPILE_STACK, lambda: made.append(LLMatcher(vocabulary, source, log_level=0, limits=limits)))
    _on_stack(MASK_STACK, lambda: _walk(made.pop()) if made else None)


_BACKTRACKS = 100_000  # steps of a pattern that looks around
_LONGEST = 300  # characters of a violation; so what is told of an answer fits the pipe


def _violations(schema: Any, text: str, most: int) -> list[str]:
    """What of a text does not match a schema. Nothing is fetched: a reference that leads out is refused."""
    from jsonschema_rs import FancyRegexOptions, ValidationError, validator_for

    def nothing_at(uri: str) -> Any:
        raise ValueError("schemas are not fetched; put it into $defs")

    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [f"it is no JSON: {error}"]
    try:
        limits = FancyRegexOptions(backtrack_limit=_BACKTRACKS)
        found = validator_for(schema, retriever=nothing_at, pattern_options=limits).iter_errors(value)
        return [f"{_place(one)}{one.message}"[:_LONGEST] for one in islice(found, most)]
    except (ValidationError, ValueError) as error:
        return [f"the schema cannot be checked: {str(error).splitlines()[0][:200]}"]


def _place(error: Any) -> str:
    path = "".join(f"[{part!r}]" for part in error.instance_path)
    return f"at {path}: " if path else ""


def _walk(matcher: Any) -> None:
    for _ in range(_MASKS):
        allowed = [token for token, bias in enumerate(matcher.compute_logit_bias()) if bias]
        if matcher.is_error() or matcher.is_stopped() or not allowed:
            return
        matcher.compute_ff_tokens()
        matcher = matcher.deep_copy()
        if not matcher.try_consume_tokens([allowed[-1]]):
            return


def _on_stack(size: int, work: Callable[[], object]) -> None:
    def run() -> None:
        with contextlib.suppress(BaseException):  # an error is not an end: the server will say the same
            work()

    threading.stack_size(size)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def _limit_memory() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no /proc
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _receive(size: int) -> bytes:
    parts: list[bytes] = []
    while size and (part := os.read(0, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


if __name__ == "__main__":
    main()
