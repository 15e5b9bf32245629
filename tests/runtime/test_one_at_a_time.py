"""A model that is used from two threads at once, inside its own stream, while Python ends, or closed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import UsageError
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, choose

TEXT = np.random.default_rng(5).integers(0, 262, 400, dtype=np.int32)


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Iterator[LanguageModel]:
    options = EngineOptions(threads=1, max_sequences=4, prefill_chunk=4096)
    opened = hasten.load(tiny_folder("qwen3"), "w8", options=options)
    yield opened
    opened.close()


def test_two_threads_get_right_answers_or_an_error(model: LanguageModel) -> None:
    prompts = ["abc", "what is", "hello there", "x y z"]
    right = {prompt: model.generate([prompt], 8, chat=False)[0].token_ids for prompt in prompts}
    results: list[bool] = []
    refused: list[UsageError] = []

    def work(prompt: str) -> None:
        for _ in range(20):
            try:
                results.append(model.generate([prompt], 8, chat=False)[0].token_ids == right[prompt])
            except UsageError as wrong:
                refused.append(wrong)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results) and len(results) + len(refused) == 80
    assert all("another thread" in one.message for one in refused)
    assert model.executor.pool.free == model.executor.pool.pages
    for prompt in prompts:
        assert model.generate([prompt], 8, chat=False)[0].token_ids == right[prompt]


def test_generate_inside_an_engines_stream(model: LanguageModel) -> None:
    """The same thread may: nobody computes between two steps."""
    request = Request(tuple(TEXT[:20].tolist()), max_new_tokens=12, sampling=SamplingOptions(ignore_eos=True))
    with model.engine() as engine:
        alone = [token for output in engine.stream(request) for token in output.token_ids]
    right = model.generate(["abc"], 6, chat=False)[0].token_ids
    with model.engine() as engine:
        tokens = []
        for output in engine.stream(request):
            tokens += output.token_ids
            assert model.generate(["abc"], 6, chat=False)[0].token_ids == right
    assert tokens == alone


def test_one_sampler_for_two_sequences_is_refused() -> None:
    logits = np.zeros((2, 50), np.float32)
    sampler = SequenceSampler(SamplingOptions(), [1], 50)
    with pytest.raises(UsageError, match="sampler"):
        choose(logits, [sampler, sampler], [[], []], [0, 0], [None, None], [None, None])
    assert choose(logits[:1], [sampler], [[]], [0], [None], [None])[0].tokens == [0]


EXIT = """
import threading, time
import numpy as np
from hasten import _native
data = np.zeros(1 << 26, np.uint8)
def work():
    while True:
        _native.checksums(data, 1 << 20, 1)
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""


def test_python_may_end_while_a_daemon_thread_is_in_native_code() -> None:
    """CPython up to 3.13 ends such a thread by unwinding its stack, which C++ does not survive."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_model_says_so(tiny_folder: Callable[..., Path]) -> None:
    model = hasten.load(tiny_folder("qwen3"), "w8", threads=1)
    stream = model.stream([5, 6, 7], 8)
    first = next(stream)
    model.close()
    model.close()
    for call in (
        lambda: model.generate(["x"], 1, chat=False),
        lambda: model.stream([5], 1),
        lambda: model.engine(),
        lambda: model.hidden([5]),
        lambda: model.config,
        lambda: model.threads,
        lambda: model.replace("layers.0.q", None),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match="closed"):
            call()
    with pytest.raises(AttributeError):
        model.no_such_thing  # noqa: B018
    again = hasten.load(tiny_folder("qwen3"), "w8", threads=1)
    assert [first, *stream] == list(again.stream([5, 6, 7], 8))  # what runs already runs on
