"""Workloads: lengths, moments, files that people write."""

from __future__ import annotations

import dataclasses
import json
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from hasten.bench.measure import PromptRing, check
from hasten.bench.workload import TRAFFICS, Lengths, Recorded, Traffic, traffic
from hasten.core import Workload
from hasten.engine.trace import Trace, TraceModel, TraceRequest
from hasten.errors import HastenError, UsageError

IDS = list(range(5000))
PLAIN = Traffic("plain", "", Lengths(10, 100, 300), Lengths(5, 50, 80), shared=40, ttft_ms=500, tpot_ms=50)


def test_lengths_hit_their_three_points() -> None:
    lengths = Lengths(10, 100, 300)
    assert [lengths.at(share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [10, 10, 100, 300, 300]
    drawn = [lengths.at(i / 1000) for i in range(1001)]
    assert drawn == sorted(drawn)


@pytest.mark.parametrize("lengths", [(0, 1, 2), (3, 2, 4), (1, 5, 4)])
def test_lengths_that_fall_are_refused(lengths: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        Lengths(*lengths)


def test_a_load_is_the_same_for_the_same_seed_and_has_its_rate() -> None:
    one, two, other = (list(PLAIN.requests(IDS, 400, 5.0, seed=seed)) for seed in (3, 3, 4))
    assert one == two != other
    gaps = [after.at_s - before.at_s for before, after in pairwise(one)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 5, rel=0.2)
    faster = list(PLAIN.requests(IDS, 400, 50.0, seed=3))
    assert [(r.prompt, r.output) for r in faster] == [(r.prompt, r.output) for r in one]
    assert {r.prompt[:40] for r in one} == {tuple(IDS[:40])}
    assert len({r.prompt[40:60] for r in one}) == len(one), "nothing is shared beyond what all begin with"
    own = [len(r.prompt) - 40 for r in one]
    assert statistics.median(own) == pytest.approx(100, rel=0.2) and max(own) == 300


def test_without_a_rate_all_come_at_once() -> None:
    assert {r.at_s for r in PLAIN.requests(IDS, 5)} == {0.0}


@pytest.mark.parametrize(
    ("ids", "count", "rate"), [([], 1, 1.0), (IDS, 0, 1.0), (IDS, 1, 0.0), (IDS, 1, -1.0)]
)
def test_a_load_of_nothing_is_refused(ids: list[int], count: int, rate: float) -> None:
    with pytest.raises(UsageError):
        list(PLAIN.requests(ids, count, rate))


def test_what_is_in_time() -> None:
    assert PLAIN.in_time(500, 50, 9e9) and PLAIN.in_time(500, None, 9e9)
    assert not PLAIN.in_time(501, 50, 0) and not PLAIN.in_time(1, 51, 0)
    strict = dataclasses.replace(PLAIN, deadline_ms=300)
    assert strict.in_time(1, 1, 300) and not strict.in_time(1, 1, 301)


def test_every_named_one_can_be_measured() -> None:
    for name, one in TRAFFICS.items():
        assert one.name == name and one.about
        assert check(one.typical()).prompt < one.longest
        assert any((one.ttft_ms, one.deadline_ms))
    assert TRAFFICS["decide"].deadline_ms == 300
    assert TRAFFICS["translate"].prompt == TRAFFICS["translate"].output


def test_prompts_of_a_round_share_their_beginning_alone() -> None:
    ring, work = PromptRing(IDS), Workload(60, 4, 2, shared=40)
    first, second = ring.round(0, work), ring.round(1, work)
    assert all(prompt[:40] == ring.shared(work) == IDS[:40] for prompt in first + second)
    assert len({tuple(prompt[40:]) for prompt in first + second}) == 4
    assert all(len(prompt) == 60 for prompt in first + second)
    with pytest.raises(UsageError):
        check(Workload(40, 4, 1, shared=40))


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"prompt": 300, "output": [50, 100, 300], "shared": 20, "deadline_ms": 900}))
    found = traffic(str(path))
    assert (found.name, found.prompt, found.output) == ("mine", Lengths(300, 300, 300), Lengths(50, 100, 300))
    assert found.typical(8) == Workload(320, 100, 8, 20) and found.deadline_ms == 900


@pytest.mark.parametrize(
    ("written", "said", "hint"),
    [
        ({"prompt": 1, "output": 1, "outptu": 2}, "unknown key 'outptu'", "did you mean output?"),
        ({"prompt": 1}, "lacks 'output'", "output"),
        ({"prompt": "x", "output": 1}, "'prompt' must be", "50"),
        ({"prompt": [1, 2], "output": 1}, "'prompt' must be", "50"),
        ({"prompt": True, "output": 1}, "'prompt' must be", "50"),
        ({"prompt": 0, "output": 1}, "from 1 on", "50"),
        ({"prompt": 1, "output": 1, "shared": -1}, "'shared'", "500"),
        ({"prompt": 1, "output": 1, "ttft_ms": 0}, "'ttft_ms'", "500"),
        ([1], "one JSON object", "prompt"),
    ],
)
def test_files_with_faults(written: object, said: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(written))
    with pytest.raises(UsageError, match=said) as caught:
        traffic(str(path))
    assert hint in str(caught.value.hint)


def test_names_that_nobody_knows_and_files_that_are_no_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        traffic("sumarize")
    assert "did you mean summarize?" in str(caught.value.hint)
    (tmp_path / "x").write_text("{")
    for name in (str(tmp_path), str(tmp_path / "x")):
        with pytest.raises(HastenError):
            traffic(name)


def recorded_request(at: float, marks: list[int], output: int) -> TraceRequest:
    answer = np.zeros(output, np.int32)
    return TraceRequest(at, at, at + 1, np.array(marks, np.int32), (answer,), 0, None, True)


def test_a_recorded_service_is_a_workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = tuple(recorded_request(10.0 + 2 * i, [1, 2, 3, 10 + i, 20 + i], 4 + i) for i in range(3))
    day = Trace(TraceModel("m", 1, 1, 1, 1, True, 1.0, 1.0), requests)
    monkeypatch.setattr("hasten.engine.trace.read_trace", lambda _: day)
    path = tmp_path / "day.jsonl"
    path.write_text('{"hasten_trace": 1}\n')
    found = traffic(str(path))
    assert found.recorded == tuple(Recorded(2.0 * i, 5, 4 + i) for i in range(3))
    assert found.shared == 3 and found.longest == 11
    load = list(found.requests(IDS, 5))
    assert [r.at_s for r in load] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert [r.output for r in load] == [4, 5, 6, 4, 5]
    assert {len(r.prompt) for r in load} == {5}
    assert [r.at_s for r in found.requests(IDS, 3, rate=5.0)] == pytest.approx([0.0, 0.2, 0.4])
