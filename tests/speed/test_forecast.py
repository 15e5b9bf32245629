"""The steps of a workload, counted by a machine that takes a second for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from paces import TOY, machine

from hasten.core import Recipe, Workload
from hasten.errors import UsageError
from hasten.speed.cost import Load
from hasten.speed.forecast import Case, fleet_for, forecast, memory_of
from hasten.speed.pace import Ceilings, Link, Piece, Spent, Step, known, published

W8 = Recipe.parse("w8")


@dataclass
class Counting:
    """A second a step, whatever it is."""

    source: str = "counted"
    is_measured: bool = False
    steps: list[Step] = field(default_factory=list)

    def spent(self, load: Load, step: Step) -> Spent:
        self.steps.append(step)
        return Spent(1.0, "memory", {"a step": 1.0})


def test_prompts_are_read_in_chunks_and_answers_run_beside_them() -> None:
    pace = Counting()
    found = forecast(TOY, W8, Case(Workload(300, 5, 3)), pace)
    assert pace.steps[0] == Step(0, 301.0, 1, (Piece(0, 300), Piece(0, 212, ends=False)))
    assert pace.steps[1] == Step(1, 301.0, 1, (Piece(212, 88), Piece(0, 300)))
    assert found.ttft_ms.value == 2000
    # The first sequence has two tokens by then, the others one: 3 and 4 are left.
    assert [(step.answers, step.context) for step in pace.steps[2:]] == [(3, 302.0), (2, 304.0)]
    assert found.decode_tok_per_s is not None and found.tpot_ms is not None
    assert found.decode_tok_per_s.value == pytest.approx((3 * 3 + 2) / 4)
    assert found.tpot_ms.value == pytest.approx(1000)  # each sequence has a token a step


def test_answers_that_are_over_do_not_run_beside_later_prompts() -> None:
    pace = Counting()
    forecast(TOY, W8, Case(Workload(512, 2, 4)), pace)
    assert [step.answers for step in pace.steps] == [0, 1, 1, 1, 1]


def test_many_steps_are_sampled_and_their_sum_stays() -> None:
    for prompt in (512 * 96, 512 * 97, 512 * 1000 + 1):
        pace = Counting()
        found = forecast(TOY, W8, Case(Workload(prompt, 1, 1)), pace)
        assert found.ttft_ms.value == pytest.approx(1000 * -(-prompt // 512))
        assert len(pace.steps) <= 98 and found.tpot_ms is None
    linear = Ceilings(100.0, 1.0, 1.0)
    fine = forecast(TOY, W8, Case(Workload(512 * 90, 1, 1)), linear).ttft_ms.value
    coarse = forecast(TOY, W8, Case(Workload(512 * 180, 1, 1)), linear).ttft_ms.value
    assert coarse == pytest.approx(4 * fine, rel=0.02)  # nearly all of it is attention, which grows so


def test_a_cached_part_is_past_and_at_least_one_token_is_computed() -> None:
    pace = Counting()
    forecast(TOY, W8, Case(Workload(100, 1, 1), cached=0.8), pace)
    forecast(TOY, W8, Case(Workload(100, 1, 1), cached=0.9999), pace)
    assert [step.pieces for step in pace.steps] == [(Piece(80, 20),), (Piece(99, 1),)]


def test_accepted_drafts_save_steps() -> None:
    pace = Counting()
    found = forecast(TOY, W8, Case(Workload(10, 13, 1), drafts=4, accepted=2.0), pace)
    assert found.decode_tok_per_s is not None
    assert found.decode_tok_per_s.value == pytest.approx(3) and pace.steps[1].answer_rows == 5


def test_several_devices_share_the_work_and_pay_for_sums() -> None:
    one = Ceilings(100.0, 1.0, 1.0)
    four = Ceilings(100.0, 1.0, 1.0, devices=4, link=Link(10.0, latency_us=0.0))
    pieces = Step(pieces=(Piece(0, 512),))
    load = _load()
    summed = 2 * 3 * (2 * 64 * 512 * 2 * 3 / 4) / 10e9
    assert four.spent(load, pieces).seconds == pytest.approx(one.spent(load, pieces).seconds / 4 + summed)
    with pytest.raises(Exception, match="unknown"):
        Ceilings(100.0, 1.0, 1.0, devices=2).spent(load, pieces)


def _load() -> Load:
    from hasten.speed.cost import load_of

    return load_of(TOY, W8)


def test_memory_by_hand() -> None:
    found = memory_of(TOY, W8, Case(Workload(100, 28, 2)))
    layer = ((128 + 64 + 64) * 64 + 64 * 128 + 3 * 128 * 64) * 8.5 / 8
    assert found.weights == 3 * layer + 1008 * 64 * 8.5 / 8  # the head's rows are padded to 16
    assert found.keys_and_values == 2 * 128 * 3 * 2 * 2 * 32 * 2
    assert found.activations == 200 * (4 * (64 + 128 + 128 + 128) + 2 * (128 + 128)) + 4 * 2 * 1064
    assert found.total == found.weights + found.keys_and_values + found.activations + 98_000_000 + 420_000


def test_copies_for_a_load() -> None:
    case, pace = Case(Workload(512, 128, 1)), machine()
    few, many = (fleet_for(TOY, Recipe.parse("w4"), case, pace, rate) for rate in (1.0, 400.0))
    alone = forecast(TOY, Recipe.parse("w4"), case, pace)
    assert few.replicas == 1 < many.replicas
    assert alone.tpot_ms is not None and few.ttft_ms >= alone.ttft_ms.value
    assert few.tpot_ms >= 0.9 * alone.tpot_ms.value and many.tpot_ms > few.tpot_ms
    assert few.busy < many.busy <= 0.85 and many.waiting_ms > few.waiting_ms >= 0
    for rate in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UsageError):
            fleet_for(TOY, W8, case, pace, rate)
    with pytest.raises(UsageError, match="more than"):
        fleet_for(TOY, Recipe.parse("w4"), case, pace, 1e12)


def test_published_machines_name_their_sources_and_files_are_checked(tmp_path: object) -> None:
    from pathlib import Path

    for one in known().values():
        assert one.source and one.read_gb_per_s > 50 and one.bf16_tflops > 1
        assert "published" in one.pace(W8).source and not one.pace(W8).is_measured
    h200 = published("H200")
    assert h200.pace(Recipe.parse("fp8")).int8_tops == h200.fp8_tflops
    assert (
        h200.pace(Recipe.parse("w4")).int8_tops == h200.bf16_tflops
    )  # narrow weights are multiplied as bf16
    fast = forecast(TOY, Recipe.parse("w8"), Case(Workload()), h200.pace(W8))
    assert fast.ttft_ms.low < fast.ttft_ms.value < fast.ttft_ms.high
    file = Path(str(tmp_path)) / "mine.json"
    whole = '{"name": "mine", "source": "a sheet", "read_gb_per_s": 300, "bf16_tflops": 20}'
    file.write_text(whole)
    assert published(str(file)).read_gb_per_s == 300
    changes = (("300", "-3"), ("300", "true"), ('mine"', 'm", "speed": "x"'), ("20}", '20, "kind": "tpu"}'))
    for wrong in ("[", "[]", "{}", *(whole.replace(*change) for change in changes)):
        file.write_text(wrong)
        with pytest.raises(UsageError) as caught:
            published(str(file))
        assert caught.value.hint
    with pytest.raises(UsageError, match="no machine"):
        published("h2oo")
