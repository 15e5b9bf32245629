"""The choice of kernels: by the stopwatch, kept, and never a reason to fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten import _native
from hasten.machine import probe
from hasten.machine.probe import LEAST_BYTES, choose_kernels, measure_ways

TABLE = dict(probe.KNOWN)  # as it is shipped: tests see an empty one
W4 = (4, 32, True)
W6 = (6, 32, True)


class Stopwatch:
    """A stand-in for the native module whose ways take the times it is told."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds = seconds
        self.timed: list[tuple[int, int]] = []

    def int_ways(self) -> list[str]:
        return ["one", "two", "three"]

    def row_classes(self) -> list[int]:
        return [1, 4, 1 << 30]

    def way_for(self, *_: object) -> str:
        return "two"

    def time_ways(
        self,
        bits: int,
        group: int,
        symmetric: bool,
        rows: int,
        cols: int,
        tokens: int,
        threads: int,
        rounds: int,
    ) -> list[float]:
        self.timed.append((tokens, rows * cols * bits // 8))
        return self.seconds[tokens]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "KNOWN", {})
    yield
    _native.forget_ways()


def test_the_fastest_is_taken_unless_it_is_noise() -> None:
    watch = Stopwatch({1: [1.0, 2.0, 3.0], 4: [0.99, 1.0, 1.2], 256: [5.0, 4.0, 1.0]})
    assert measure_ways(watch, W4, 896, 2) == ("one", "two", "three")


def test_a_way_must_be_the_faster_one_twice() -> None:
    """The machine was slow while all but one way were timed: the second timing shows it."""
    watch = Stopwatch({tokens: [0.5, 1.0, 1.0] for tokens in (1, 4, 256)})
    first = watch.time_ways

    def time_ways(*shape: int) -> list[float]:
        seconds = first(*shape)  # type: ignore[arg-type]
        return seconds if len(watch.timed) % 2 else [1.1, 1.0, 0.9]

    watch.time_ways = time_ways  # type: ignore[method-assign, assignment]
    assert measure_ways(watch, W4, 896, 2) == ("two", "two", "two")
    assert len(watch.timed) == 6


def test_few_rows_are_timed_on_more_weights_than_many() -> None:
    watch = Stopwatch({tokens: [1.0, 1.0, 1.0] for tokens in (1, 4, 256)})
    measure_ways(watch, W6, 896, 2)
    sizes = dict(watch.timed)
    assert sizes[1] > 6 << 20
    assert sizes[256] < sizes[1] / 3


def test_what_was_measured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int, bool]] = []
    wanted = tuple(_native.int_ways()[-1] for _ in _native.row_classes())

    def measured(_: object, fmt: tuple[int, int, bool], *__: object) -> tuple[str, ...]:
        counted.append(fmt)
        return wanted

    monkeypatch.setattr(probe, "measure_ways", measured)
    large = [(W4, 896, LEAST_BYTES), (W6, 896, LEAST_BYTES // 2), (W6, 128, LEAST_BYTES)]
    assert choose_kernels(large[:1], 2) == {W4: wanted}
    assert _native.way_for(*W4, 1) == wanted[0]
    _native.forget_ways()
    assert choose_kernels(large, 2) == {W4: wanted, W6: wanted}
    assert counted == [W4, W6]  # each once
    assert _native.way_for(*W6, 8) == wanted[0]
    assert choose_kernels(large[:1], 3) == {W4: wanted}  # other threads: measured anew
    assert counted == [W4, W6, W4]


def test_a_small_model_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "measure_ways", lambda *_: pytest.fail("timed"))
    assert choose_kernels([(W4, 64, 1000), (W6, 64, LEAST_BYTES - 1)], 2) == {}
    assert choose_kernels([], 2) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("known", TABLE, ids=str)
def test_the_table_of_processors_names_ways_that_exist(known: tuple[str, str]) -> None:
    assert len(TABLE[known]) == len(_native.row_classes())
    if known[1] not in _native.isas():
        pytest.skip(f"no {known[1]} here")
    before = _native.isa()
    try:
        _native.use_isa(known[1])
        assert set(TABLE[known]) <= set(_native.int_ways())
    finally:
        _native.use_isa(before)


def test_a_known_processor_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(_native.int_ways()[0] for _ in _native.row_classes())
    monkeypatch.setattr(probe, "measure_ways", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(probe, "processor_id", lambda: "Some 1 2 3")
    monkeypatch.setattr(probe, "KNOWN", {("Some 1 2 3", _native.isa()): known})
    assert choose_kernels([(W4, 896, LEAST_BYTES)], 2) == {W4: known}


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(blocked / "below"))
    wanted = tuple(_native.int_ways()[0] for _ in _native.row_classes())
    monkeypatch.setattr(probe, "measure_ways", lambda *_: wanted)
    assert choose_kernels([(W4, 896, LEAST_BYTES)], 2) == {W4: wanted}


def test_the_real_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_ROUNDS", 2)
    ways = measure_ways(_native, W4, 256, 1)
    assert len(ways) == len(_native.row_classes())
    assert set(ways) <= set(_native.int_ways())
