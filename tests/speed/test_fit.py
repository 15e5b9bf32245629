"""Times of a calibrated machine: exact by hand, and laws that every machine's must keep."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from paces import TOY, machine

from hasten.core import Attention, FeedForward, Recipe, Workload, as_json
from hasten.errors import MachineError, UsageError
from hasten.speed.cost import load_of
from hasten.speed.fit import (
    NINETY,
    Calibration,
    Curve,
    Point,
    answer_features,
    line,
    non_negative,
    prompt_features,
)
from hasten.speed.forecast import Case, forecast
from hasten.speed.pace import Piece, Step

W4 = Recipe.parse("w4")


def test_a_decode_step_by_hand() -> None:
    spent = machine().spent(load_of(TOY, W4), Step(answers=1, context=100))
    layer = (128 + 64 + 64) * 64 + 64 * 128 + 2 * 128 * 64 + 64 * 128
    linear = 3 * (4 * 4e-6 + layer * 0.021e-9)  # four products a layer
    head = 4e-6 + 64_000 * 0.021e-9
    others = 3 * (2 * (1e-6 + 64e-9) + 128e-9 + 1e-6 + (4 + 2 * 2) * 32 * 1e-9)
    keys = 2 * 2 * 2 * 32 * 100
    attention = 3 * (5e-6 + 128 * 1e-9 + keys * 1e-11 + 100 * 128 * 4e-12)
    fixed = 1e-4 + 1e-5 + 1000 * 1e-10
    assert spent.parts["linear layers"] == pytest.approx(linear)
    assert spent.parts["the output head"] == pytest.approx(head)
    assert spent.parts["norms, rotation, gates"] == pytest.approx(others)
    assert spent.parts["attention"] == pytest.approx(attention)
    assert spent.seconds == pytest.approx(linear + head + others + attention + fixed)


def test_prompts_and_answers_are_two_calls_where_the_kernels_differ() -> None:
    step = Step(answers=8, context=100, pieces=(Piece(0, 56, ends=False),))
    apart, joined = (machine(splits=s).spent(load_of(TOY, W4), step) for s in (True, False))
    one = load_of(TOY, W4).products[0]
    assert one.weights * 0.001e-9 * 64 < apart.parts["linear layers"]
    assert apart.parts["linear layers"] > joined.parts["linear layers"]  # the fixed parts and slopes twice
    floats = load_of(TOY, Recipe.parse("bf16"))  # no integers: one call on every machine
    assert machine().spent(floats, step) == machine(splits=False).spent(floats, step)


def test_between_two_numbers_of_rows_times_are_between_too() -> None:
    found = Curve((Point(1, 0.0, 1.0, 0.1), Point(3, 4.0, 2.0, 0.2)))
    assert found.at(2) == Point(2, 2.0, 1.5, 0.2)
    assert found.at(0.5) == found.points[0]
    beyond = found.at(5)
    assert (beyond.fixed_s, beyond.unit_s) == (8.0, 3.0) and beyond.error == pytest.approx(0.4)


def test_a_line_is_found_again_and_no_factor_is_negative() -> None:
    units = [1e6, 4e6, 3e7]
    found = line(1, units, [5e-6 + one * 2e-11 for one in units])
    assert (found.fixed_s, found.unit_s) == (pytest.approx(5e-6), pytest.approx(2e-11))
    assert found.error == 0.01  # a fit through few points is no proof of more
    falling, error = non_negative([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], [3.0, 2.0, 1.0])
    assert falling[1] == 0.0 and falling[0] > 0 and error > 0.3


def test_features_of_attention_know_windows_and_what_a_prompt_shares() -> None:
    mixer = Attention(4, 2, 32)
    assert answer_features(mixer, False, 2, 2, 100) == [1.0, 256, 2 * 100 * 256, 2 * 100 * 128]
    assert answer_features(replace(mixer, window=10), True, 2, 6, 100) == [
        1.0,
        768,
        2 * 10 * 144,
        6 * 10 * 128,
    ]
    features = prompt_features(mixer, False, 100, 64)
    assert features[3] == (64 * 100 + 64 * 65 / 2) * 128
    assert features[2] == pytest.approx((100 + 65 / 2) * 256)  # its keys once: 64 queries go together


@pytest.mark.parametrize("recipe", ["w4", "bf16"])
def test_more_of_anything_takes_longer(recipe: str) -> None:
    pace, made = machine(), Recipe.parse(recipe)

    def times(prompt: int, batch: int, output: int = 32) -> tuple[float, float]:
        found = forecast(TOY, made, Case(Workload(prompt, output, batch)), pace)
        assert found.tpot_ms is not None
        return found.ttft_ms.value, found.tpot_ms.value

    for lists in ([(p, 1) for p in (16, 100, 512, 513, 2000, 4000)], [(100, b) for b in (1, 2, 8, 32)]):
        ttft, tpot = zip(*(times(*one) for one in lists), strict=True)
        assert list(ttft) == sorted(ttft) and list(tpot) == sorted(tpot)
        assert len(set(ttft)) == len(ttft)
    wide = replace(TOY, blocks=tuple(replace(b, feed_forward=FeedForward(256)) for b in TOY.blocks))
    assert forecast(wide, made, Case(Workload()), pace).ttft_ms.value > times(512, 1, 128)[0]


def test_what_helps_helps() -> None:
    pace, work = machine(), Workload(512, 64, 1)
    plain = forecast(TOY, W4, Case(work), pace)
    seen = forecast(TOY, W4, Case(work, cached=0.75), pace)
    drafted = forecast(TOY, W4, Case(work, drafts=4, accepted=3.0), pace)
    wasted = forecast(TOY, W4, Case(work, drafts=4, accepted=0.0), pace)
    assert plain.tpot_ms and drafted.tpot_ms and wasted.tpot_ms
    assert seen.ttft_ms.value < plain.ttft_ms.value
    assert drafted.tpot_ms.value < plain.tpot_ms.value < wasted.tpot_ms.value
    for wrong in ({"cached": 1.0}, {"cached": -0.1}, {"drafts": 2, "accepted": 3.0}, {"accepted": 1.0}):
        with pytest.raises(UsageError) as caught:
            Case(work, **wrong)  # type: ignore[arg-type]
        assert caught.value.hint


def test_an_interval_joins_the_fits_errors_with_the_machines() -> None:
    load, step = load_of(TOY, W4), Step(answers=1, context=100)
    quiet, moving = machine().spent(load, step), machine(noise=0.2).spent(load, step)
    assert quiet.low_s < quiet.seconds < quiet.high_s
    assert quiet.seconds / quiet.low_s == pytest.approx(quiet.high_s / quiet.seconds)
    own = math.log(quiet.high_s / quiet.seconds) / NINETY
    assert 0.005 < own < 0.1
    assert math.log(moving.high_s / moving.seconds) / NINETY == pytest.approx(math.hypot(own, 0.2))
    other = forecast(TOY, Recipe.parse("w5"), Case(Workload()), machine()).ttft_ms
    known = forecast(TOY, W4, Case(Workload()), machine()).ttft_ms
    assert other.high / other.value > known.high / known.value  # w5 was not timed


def test_a_format_that_was_not_timed_goes_by_its_bytes() -> None:
    w4, w5 = (machine().spent(load_of(TOY, Recipe.parse(n)), Step(1, 10.0)).parts for n in ("w4", "w5"))
    weights = sum(p.weights * p.count for p in load_of(TOY, W4).products if p.part != "head")
    assert w5["linear layers"] - w4["linear layers"] == pytest.approx(weights * 0.021e-9 * (5.5 / 4.5 - 1))
    with pytest.raises(UsageError, match="no kernel"):
        machine().spent(load_of(TOY, Recipe.parse("fp8")), Step(1, 10.0))
    floats = {name: curve for name, curve in machine().curves.items() if "w4" not in name}
    with pytest.raises(MachineError, match="no format like w4"):
        replace(machine(), curves=floats).spent(load_of(TOY, W4), Step(1, 10.0))


def test_one_token_is_bound_by_memory_and_a_prompt_by_arithmetic() -> None:
    wide = (replace(TOY.blocks[0], feed_forward=FeedForward(14336)),) * 30
    load = load_of(replace(TOY, width=4096, blocks=wide), W4)
    assert machine().spent(load, Step(answers=1, context=4000)).bound == "memory"
    assert machine().spent(load, Step(pieces=(Piece(0, 512),))).bound == "compute"


def test_a_calibration_that_was_disturbed_is_doubtful() -> None:
    assert not replace(machine(), untrusted=20, timed=200).is_doubtful
    assert replace(machine(), untrusted=21, timed=200).is_doubtful


def test_a_calibration_survives_its_record() -> None:
    made = machine(noise=0.1)
    record = {k: v for k, v in as_json(made).items() if k not in ("source", "is_measured")}
    assert Calibration.from_json(json.loads(json.dumps(record))) == made
