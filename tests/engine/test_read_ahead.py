"""Pages on a disk that is slow, hangs or fails: no answer depends on it, and no stream waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_engine import gather, plain, random_prompt

import hasten
from hasten.cache.kv_disk import KvDisk
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.runtime.sampling import SamplingOptions

FOREVER = SamplingOptions(ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    options = EngineOptions(threads=1, context=256, max_sequences=3, prefill_chunk=64)
    return hasten.load(tiny_folder("qwen3"), "bf16", options=options)


def long_prompt(name: str = "long", **rest: Any) -> Request:
    return Request(random_prompt(7, 200), 8, FOREVER, id=name, **rest)


def finish(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    until = time.monotonic() + 60
    while engine.busy:
        assert time.monotonic() < until, "the engine never ends"
        outputs += engine.step()
    return outputs


def usage_of(outputs: list[Output], name: str) -> Any:
    return next(one.usage for one in outputs if one.request_id == name and one.usage is not None)


@pytest.fixture
def kept(model: LanguageModel, tmp_path: Path) -> ServingOptions:
    """The long prompt's six full pages lie on disk."""
    options = ServingOptions(kv_disk=tmp_path / "kv", speculate=False)
    with Engine(model, options) as engine:
        engine.add(long_prompt())
        finish(engine)
    return options


class Gate:
    """Holds every read of the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reads = threading.Event(), 0
        read, has = KvDisk.read, KvDisk.has

        def waits(disk: KvDisk, key: bytes, out: np.ndarray) -> bool:
            self.reads += 1
            assert self.open.wait(60)
            return read(disk, key, out)

        def looks(disk: KvDisk, key: bytes) -> bool:
            assert self.open.wait(60)
            return has(disk, key)

        monkeypatch.setattr(KvDisk, "read", waits)
        monkeypatch.setattr(KvDisk, "has", looks)


def patient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("hasten.engine.keep._LEAST_WAIT_S", seconds)
    monkeypatch.setattr("hasten.engine.keep._MOST_WAIT_S", seconds)


def test_what_lies_on_disk_is_not_computed_again(
    model: LanguageModel, kept: ServingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 20)
    with Engine(model, kept) as engine:
        engine.add(long_prompt())
        outputs = finish(engine)
        assert gather(outputs, "long") == plain(model, long_prompt())
        assert usage_of(outputs, "long").cached_tokens == 192
        assert engine.stats().disk_hit_tokens == 192
        assert not engine._keeper._ahead._arrived  # type: ignore[union-attr]


def test_a_disk_that_hangs_stops_no_stream_and_is_waited_for_within_a_bound(
    model: LanguageModel, kept: ServingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 0.3)
    gate = Gate(monkeypatch)
    other = Request(random_prompt(1, 40), 150, FOREVER, id="other")
    engine = Engine(model, kept)
    engine.add(other)
    outputs = engine.step()
    started = time.monotonic()
    engine.add(long_prompt())
    steps = 0
    while not any(one.request_id == "long" for one in outputs):
        new = engine.step()
        outputs += new
        steps += any(one.request_id == "other" for one in new)
        assert time.monotonic() - started < 30
    assert steps > 3, "the other stream stood still meanwhile"
    again = time.monotonic()
    engine.add(Request(random_prompt(8, 200), 3, FOREVER, id="next"))  # the disk is known to be slow by now
    assert engine._answers["next"][0].reading is None
    outputs += finish(engine)
    assert time.monotonic() - again < 30
    for asked in (other, long_prompt()):
        assert gather(outputs, asked.id) == plain(model, asked)
    assert usage_of(outputs, "long").cached_tokens == 0
    gate.open.set()
    engine.close()
    assert model.executor.pool.free == model.executor.pool.pages


def test_alone_it_waits_and_the_engine_hears_of_others_meanwhile(
    model: LanguageModel, kept: ServingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 20)
    gate = Gate(monkeypatch)
    with Engine(model, kept) as engine:
        engine.add(long_prompt())
        for _ in range(3):
            started = time.monotonic()
            assert engine.step() == []
            assert time.monotonic() - started < 5
        other = Request(random_prompt(1, 20), 3, FOREVER, id="other", prefix_cache=False)
        engine.add(other)
        outputs: list[Output] = []
        while "other" in engine:
            outputs += engine.step()
        assert gather(outputs, "other") == plain(model, other)
        assert engine.cancel("long")
        assert [one.finish_reason for one in engine.step()] == ["cancelled"]
        engine.add(long_prompt("again"))
        gate.open.set()
        outputs = finish(engine)
        assert gather(outputs, "again") == plain(model, long_prompt("again"))
        assert usage_of(outputs, "again").cached_tokens == 192


def test_pages_that_came_in_time_are_used_and_the_rest_is_computed(
    model: LanguageModel, kept: ServingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 0.5)
    read, reads = KvDisk.read, []
    closing = threading.Event()

    def slows_down(disk: KvDisk, key: bytes, out: np.ndarray) -> bool:
        reads.append(key)
        if len(reads) > 2:
            closing.wait(60)
        return read(disk, key, out)

    monkeypatch.setattr(KvDisk, "read", slows_down)
    engine = Engine(model, kept)
    engine.add(long_prompt())
    outputs = finish(engine)
    assert gather(outputs, "long") == plain(model, long_prompt())
    assert usage_of(outputs, "long").cached_tokens in (0, 32, 64)  # two, if this machine was in time
    closing.set()
    engine.close()


def test_reading_that_takes_longer_than_computing_is_not_tried(
    model: LanguageModel, kept: ServingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 0.05)
    with Engine(model, kept) as engine:
        ahead = engine._keeper._ahead
        assert ahead is not None
        ahead._page_s = 0.05
        engine.add(long_prompt())
        assert engine._answers["long"][0].reading is None
        assert ahead._page_s < 0.05, "what is not read is never measured: it has to be believed less"
        outputs = finish(engine)
        assert gather(outputs, "long") == plain(model, long_prompt())
        for turn in range(60):
            engine.add(Request(random_prompt(100 + turn, 40), 1, FOREVER, id="probe"))
            if engine._answers["probe"][0].reading is not None:
                break
            finish(engine)
        else:
            raise AssertionError("it is never tried again")
        finish(engine)


def test_a_reader_that_fails_at_any_page_changes_no_answer(
    model: LanguageModel, kept: ServingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 20)
    read = KvDisk.read
    for bad in range(1, 8):
        count = 0

        def fails(disk: KvDisk, key: bytes, out: np.ndarray, bad: int = bad) -> bool:
            nonlocal count
            count += 1
            return count != bad and read(disk, key, out)

        monkeypatch.setattr(KvDisk, "read", fails)
        with Engine(model, kept) as engine:
            engine.add(long_prompt())
            outputs = finish(engine)
            assert gather(outputs, "long") == plain(model, long_prompt())
            assert usage_of(outputs, "long").cached_tokens == 32 * min(bad - 1, 6)
