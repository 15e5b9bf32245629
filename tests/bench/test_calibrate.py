"""Rounds beside a step of known speed, and a whole calibration of small layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path

import pytest

from hasten.bench import calibrate
from hasten.bench.calibrate import COMPUTES, READS, Bench, Watch
from hasten.core import Recipe, Workload
from hasten.errors import MachineError
from hasten.speed.forecast import Case, forecast
from hasten.weights import FORMATS


def watch(slow: Sequence[float], learned: int = 8) -> Watch:
    """A machine that is as many times slower as said, after it was quiet while it was learned."""
    times: Iterator[float] = chain(repeat(1.0, learned), slow, repeat(1.0))
    made = Watch(lambda: (lambda now: (0.01 * now, 0.002 * now))(next(times)), sleep=lambda _: None)
    made.learn(learned)
    return made


def test_a_round_is_held_against_the_step_beside_it() -> None:
    found = watch([1.3] * 6).rounds(lambda: {"a": 1.3, "b": 2.6}, READS)
    assert found == {"a": pytest.approx(1.0), "b": pytest.approx(2.0)}


def test_rounds_of_a_slow_moment_are_taken_again_and_counted() -> None:
    times = iter([9.0, 9.0, *[1.0] * 20])
    disturbed = watch([1.0, 3.0, 3.0, 1.0])
    assert disturbed.rounds(lambda: {"a": next(times)}, COMPUTES) == {"a": 1.0}
    assert disturbed.repeated >= 2 and disturbed.untrusted == 0


def test_rounds_that_never_agree_are_counted() -> None:
    times = iter(range(1, 100))
    wild = watch([])
    wild.rounds(lambda: {"a": 2.0 ** next(times)}, READS)
    assert wild.untrusted == 1
    always = watch([5.0] * 100)
    assert always.rounds(lambda: {"a": 7.0}, READS)["a"] > 0
    assert always.untrusted == 1 and always.wait_s < 10


def test_rounds_are_few_once_it_is_late() -> None:
    late, taken = watch([]), []
    late.until = 0.0
    assert late.rounds(lambda: taken.append(1) or {"a": float(len(taken))}, READS) == {"a": 1.0}  # type: ignore[func-returns-value]
    assert len(taken) == 2 and late.untrusted == 1


def test_quieter_moments_that_come_later_correct_what_came_before() -> None:
    made = Watch(iter([(0.02, 0.002)] * 4 + [(0.01, 0.002)] * 40).__next__, sleep=lambda _: None)
    made.learn(4)
    for _ in range(6):
        made.rounds(lambda: {"a": 1.0}, READS)
    assert made.correction(READS) == pytest.approx(0.5) and made.correction(COMPUTES) == 1.0
    assert made.noise < 0.1


def test_keys_of_a_bench_are_written_before_they_are_timed() -> None:
    bench = Bench(calibrate._blocks(1, 64, 64, (2, 1, 32), 16), FORMATS["w8"], 1, 128)
    bench.fill()
    pages = [bench._decoder.read_page(page) for page in range(bench.pages)]
    assert len(pages) == 4 and pages[0].any()
    assert all((page == pages[0]).all() for page in pages)


def test_a_calibration_of_small_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = (
        calibrate._blocks(1, 64, 128, (2, 1, 32), 32),
        calibrate._blocks(1, 128, 256, (4, 2, 32), 64),
    )
    for name, value in {
        "ANSWERING": small,
        "READING": small,
        "ANSWER_ROWS": (1, 4),
        "PROMPT_ROWS": (16, 32),
        "HEADS": ((2, 1, 32), (4, 2, 32)),
        "ANSWER_CASES": ((1, 32), (2, 64), (2, 32), (1, 64), (4, 64)),
        "PROMPT_CASES": ((0, 16), (0, 32), (32, 16), (32, 32)),
        "_LAYERS": 1,
        "_KEYS": 256,
        "_PAST": 64,
        "_CHOICES": 1000,
        "FORMATS_TIMED": ("bf16", "w4"),
    }.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate, "Canary", lambda threads: lambda: (0.01, 0.002))
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path))
    said: list[str] = []
    whole = calibrate.calibrate
    monkeypatch.setattr(
        calibrate, "calibrate", lambda threads, say: whole(threads, ("bf16", "w4"), said.append, 0.0)
    )
    first = calibrate.load_or_calibrate(1)
    assert said[:2] == ["timing layers in bf16", "timing layers in w4"]
    assert calibrate.load_or_calibrate(1) == first and len(said) == 3  # kept
    assert {one.name for one in first.formats} == {"bf16", "w4"}
    found = forecast(small[1], Recipe.parse("w4"), Case(Workload(40, 4, 2)), first)
    assert 0 < found.ttft_ms.low < found.ttft_ms.value < found.ttft_ms.high < 1000


def test_a_machine_without_memory_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "available_bytes", lambda: 10**9)
    with pytest.raises(MachineError, match=r"2\.5 GB") as caught:
        calibrate.calibrate(1)
    assert caught.value.hint and "--machine" in caught.value.hint
