"""The engine over every executor: company, memory and another thread change no answer; and a new device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from executor_models import (
    GREEDY,
    compute,
    on_each_device,
    on_each_exact_device,
    options,
    packed,
    shared,
    text,
)

from hasten.core import EngineOptions, ServingOptions
from hasten.engine.grammar import Grammar
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.errors import UsageError
from hasten.runtime.executor import EXECUTORS, Executor, Part
from hasten.runtime.pages import CachedSequence
from hasten.runtime.reference import ReferenceExecutor
from hasten.runtime.sampling import SamplingOptions
from hasten.weights.packed import PackedModel


class Busy:
    """Another thread that computes one step after another."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._stop = False
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        ids, sequence = text(27, 400), CachedSequence()
        while not self._stop:
            with suppress(UsageError):
                compute(self._executor, Part(sequence, ids))
            self._executor.pool.truncate(sequence, 0)

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()


CALLS: dict[str, Callable[[LanguageModel, np.ndarray], Any]] = {
    "generate": lambda model, page: model.generate(["hello"], 2, chat=False),
    "hidden": lambda model, page: model.hidden(text(28, 5)),
    "head": lambda model, page: model.logits_of(np.zeros((1, 64), np.float32)),
    "read_page": lambda model, page: model.executor.read_page(0),
    "write_page": lambda model, page: model.executor.write_page(0, page),
    "copy_page": lambda model, page: model.executor.copy_page(0, 1),
    "replace": lambda model, page: model.replace("layers.0.q", model.packed.linears["layers.0.q"]),
    "engine": lambda model, page: list(
        model.engine(ServingOptions(prefix_cache=False)).stream(Request((5, 6), 2))
    ),
}


@on_each_device
@pytest.mark.parametrize("name", CALLS)
def test_a_second_thread_is_refused_at_once(running: Any, device: str, name: str) -> None:
    """It is told so while the first one computes, and works again behind it."""
    model, call = running(device, context=512), CALLS[name]
    page = np.zeros(model.executor.page_bytes, np.uint8)
    with Busy(model.executor):
        for _ in range(2000):
            try:
                call(model, page)
            except UsageError as refused:
                assert "another thread" in refused.message and refused.hint and "hasten serve" in refused.hint
                break
            time.sleep(1e-4)  # the other thread's turn
        else:
            pytest.fail("it was never refused")
    call(model, page)  # and now it may


# The engine over each ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hasten.models.tokenizer import Tokenizer
    from tiny_tokenizers import save_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def running(tokenizer: Any) -> Callable[..., LanguageModel]:
    def get(device: str, name: str = "qwen3", pages: int | None = None, **more: Any) -> LanguageModel:
        if pages is not None:
            more["kv_gb"] = (pages + 0.5) * shared(device, name).page_bytes / 1e9
        own = replace(packed(name), linears=dict(packed(name).linears))
        return LanguageModel(own, tokenizer, name, options(device, **more))

    return get


SHARED = tuple(text(30, 45))
REQUESTS = {
    "greedy": Request(SHARED, 12, GREEDY),
    "grows": Request(tuple(text(35, 20)), 85, GREEDY),
    "grows too": Request(tuple(text(36, 20)), 80, GREEDY),
    "sampled": Request((*SHARED, 100), 12, SamplingOptions(1.0, seed=11, ignore_eos=True), logprobs=2),
    "penalties": Request((*SHARED, 101), 12, SamplingOptions(0.8, repetition_penalty=1.3, ignore_eos=True)),
    "several": Request((*SHARED, 104), 6, SamplingOptions(1.0, seed=2, ignore_eos=True), n=2),
    "grammar": Request(SHARED, 12, SamplingOptions(1.0, seed=4), grammar=Grammar("regex", "(ab|cd|ef)+z")),
    "long": Request(tuple(text(31, 90)), 12, GREEDY),
    "repeats": Request(tuple(text(32, 6) * 6), 24, GREEDY),
}


def answers(model: LanguageModel, serving: ServingOptions, rounds: int) -> tuple[list[Any], Any]:
    """Tokens, log-probabilities and texts of all requests, asked for together; and the engine's figures."""
    with model.engine(serving) as engine:
        found: list[Any] = []
        for _ in range(rounds):
            found = together(engine, REQUESTS)
            while engine.tidy():
                pass
        stats = engine.stats()
    assert model.executor.pool.free == model.executor.pool.pages
    return found, stats


def together(engine: Any, requests: dict[str, Request]) -> list[Any]:
    outputs: list[Output] = []
    for name, request in requests.items():
        engine.add(replace(request, id=name))
    while engine.busy:
        outputs += engine.step()
    ends = {(one.request_id, one.index): one.finish_reason for one in outputs if one.finish_reason}
    assert set(ends.values()) <= {"length", "stop"}, ends
    return [
        (key, [t for one in mine for t in one.token_ids], [p for one in mine for p in one.logprobs])
        for key in sorted(ends)
        for mine in [[one for one in outputs if (one.request_id, one.index) == key]]
    ]


@dataclass(frozen=True)
class Way:
    """A way of going through the engine that must leave no trace in an answer."""

    chunk: int
    pages: int | None
    prefix: bool
    rounds: int  # what one has computed the next one finds


@on_each_exact_device
@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_company_prefix_hits_chunks_preemption_and_masks_change_no_answer(
    running: Any, device: str, name: str
) -> None:
    alone_in = running(device, name)
    alone = []
    for kind, request in REQUESTS.items():
        with alone_in.engine(ServingOptions(prefix_cache=False, speculate=False)) as engine:
            alone += together(engine, {kind: request})
    alone.sort()
    for way in (Way(512, None, False, 1), Way(7, None, True, 2), Way(512, 6, True, 1)):
        model = running(device, name, way.pages, prefill_chunk=way.chunk)
        found, stats = answers(model, ServingOptions(prefix_cache=way.prefix), way.rounds)
        assert found == alone, way
        assert (stats.prefix_hit_tokens > 0) == way.prefix
        assert (stats.preemptions > 0) == (way.pages is not None)


@on_each_device
def test_replace_ends_what_was_begun(running: Any, device: str) -> None:
    """What is open goes on from the tokens it has: nothing of what was computed before is used."""
    model, ids = running(device), text(33, 40)
    before = list(model.stream(ids, 6, GREEDY))
    open_stream = model.stream(ids, 6, GREEDY)
    first = next(open_stream)
    gate, up = (model.packed.linears[f"layers.1.{part}"] for part in ("gate", "up"))
    model.replace("layers.1.gate", up)
    model.replace("layers.1.up", gate)
    assert list(model.stream(ids, 6, GREEDY)) != before
    assert list(open_stream) == list(model.stream([*ids, first], 5, GREEDY))


# A new one --------------------------------------------------------------------------------------------------


class Abacus(ReferenceExecutor):
    """A device of one's own."""

    def __init__(self, packed: PackedModel, options: EngineOptions) -> None:
        super().__init__(packed, options)
        self.name = "abacus"


def test_a_new_device_is_one_class_and_one_line(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no device 'abacus'") as refused:
        running("abacus")
    assert ", ".join(EXECUTORS) in refused.value.hint
    monkeypatch.setitem(EXECUTORS, "abacus", f"{__name__}:Abacus")
    model = running("abacus")
    assert model.executor.name == "abacus"
    assert list(model.stream(text(34, 9), 5)) == list(running("reference").stream(text(34, 9), 5))
