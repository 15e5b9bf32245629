"""A model in use by another thread says so at once; what weights were replaced under cannot go on."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import UsageError
from hasten.runtime.pages import CachedSequence
from hasten.runtime.sampling import SamplingOptions, SequenceSampler, choose

TEXT = np.random.default_rng(5).integers(0, 262, 400, dtype=np.int32)


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> Iterator[LanguageModel]:
    options = EngineOptions(threads=1, max_sequences=4, prefill_chunk=4096)
    opened = hasten.load(tiny_folder("qwen3"), "w8", options=options)
    yield opened
    opened.close()


class Busy:
    """Another thread that computes one step after another; `held` is true while it is inside of one."""

    def __init__(self, model: LanguageModel) -> None:
        self._executor = model.executor
        self._stop = False
        self.refused = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop:
            sequence = CachedSequence()
            try:
                self._executor.step([(sequence, TEXT)], [])
            except UsageError:
                self.refused += 1
            self._executor.pool.truncate(sequence, 0)

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()


def calls(model: LanguageModel) -> dict[str, Callable[[], Any]]:
    executor = model.executor
    linear = model.packed.linears["layers.0.q"]
    hidden = np.zeros((1, model.config.hidden_size), np.float32)
    page = np.zeros(executor.page_bytes, np.uint8)
    return {
        "generate": lambda: model.generate(["hello"], 2, chat=False),
        "hidden": lambda: model.hidden(TEXT[:5]),
        "head": lambda: model.logits_of(hidden),
        "read_page": lambda: executor.read_page(0),
        "write_page": lambda: executor.write_page(0, page),
        "copy_page": lambda: executor.copy_page(0, 1),
        "replace": lambda: model.replace("layers.0.q", linear),
        "profile": lambda: executor.profile(),
        "engine": lambda: list(model.engine(ServingOptions(prefix_cache=False)).stream(Request((5, 6)))),
    }


NAMES = ("generate", "hidden", "head", "read_page", "write_page", "copy_page", "replace", "profile", "engine")


@pytest.mark.parametrize("name", NAMES)
def test_a_second_thread_is_refused_at_once(model: LanguageModel, name: str) -> None:
    """It is told so while the first one computes, and works again behind it."""
    call = calls(model)[name]
    with Busy(model):
        for _ in range(2000):
            try:
                call()
            except UsageError as refused:
                assert "another thread" in refused.message and refused.hint and "hasten serve" in refused.hint
                break
        else:
            pytest.fail("it was never refused")
    call()  # and now it may


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


# Closed and replaced --------------------------------------------------------------------------------------


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


def test_replace_ends_what_was_begun(model: LanguageModel) -> None:
    ids = TEXT[:40].tolist()
    options = SamplingOptions(ignore_eos=True)
    before = list(model.stream(ids, 6, options))
    open_stream = model.stream(ids, 6, options)
    first = next(open_stream)
    for layer in range(2):  # queries and keys change places: other answers
        q, k = (model.packed.linears[f"layers.{layer}.{part}"] for part in ("gate", "up"))
        model.replace(f"layers.{layer}.gate", k)
        model.replace(f"layers.{layer}.up", q)
    after = list(model.stream(ids, 6, options))
    assert after != before
    # what was open goes on from the tokens it has: nothing of what was computed before is used
    assert list(open_stream) == list(model.stream([*ids, first], 5, options))
