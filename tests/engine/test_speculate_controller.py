"""The controller on made-up tables of step times: it drafts where that pays and stops where not."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product

import pytest

from hasten.engine.speculate import Acceptance, StepTimes, bucket_of, choose

ALWAYS = 1


def table(seconds: Callable[[int], float], rows: int = 64) -> StepTimes:
    times = StepTimes()
    for _ in range(6):
        for row in range(1, rows + 1):
            times.observe(row, seconds(row))
    return times


def flat(_rows: int) -> float:
    return 0.01


def proportional(rows: int) -> float:
    return 0.01 * rows


def stairs(rows: int) -> float:
    """Tiles of eight rows."""
    return 0.01 * (1 + (rows - 1) // 8)


def test_free_rows_are_all_used() -> None:
    assert choose([[0.5, 0.25, 0.125], [0.1]], table(flat)) == [3, 1]


def test_rows_that_cost_a_step_each_are_never_used() -> None:
    assert choose([[0.99, 0.98, 0.97]], table(proportional)) == [0]


def test_a_step_is_filled_to_where_it_becomes_dearer() -> None:
    long = [0.9**n for n in range(1, 16)]
    assert choose([long], table(stairs)) == [7]
    assert choose([long, []], table(stairs)) == [6, 0]
    assert choose(
        [[0.99**n for n in range(1, 16)]], table(lambda rows: 0.01 * (1 + (rows - 1) // 8 * 0.4))
    ) == [15]


def test_a_gain_past_a_dear_row_is_found() -> None:
    """The second row costs as much as it gives, the next six are free."""
    assert choose([[0.9**n for n in range(1, 8)]], table(lambda rows: 0.01 if rows == 1 else 0.02)) == [7]


def test_the_likelier_sequence_gets_the_rows() -> None:
    lengths = choose([[0.2, 0.04], [0.9, 0.8, 0.7, 0.6]], table(lambda rows: 0.01 * (1 + 0.12 * (rows - 1))))
    assert lengths == [0, 4]


def test_sequences_without_drafts_count() -> None:
    """A row that is worth it for one sequence alone holds up fifteen others."""
    times = table(lambda rows: 0.01 * (1 + 0.3 * (rows - 1)))
    assert choose([[0.5]], times) == [1]
    assert choose([[0.04]] + [[]] * 15, times) == [0] * 16
    assert choose([], times) == []


def test_the_choice_is_the_best_of_all() -> None:
    rng = random.Random(5)
    for _ in range(50):
        cost = sorted(rng.uniform(0.01, 0.03) for _ in range(12))
        gains = [sorted((rng.random() for _ in range(3)), reverse=True) for _ in range(3)]

        def rate(
            lengths: tuple[int, ...], cost: list[float] = cost, gains: list[list[float]] = gains
        ) -> float:
            tokens = 3 + sum(sum(own[:n]) for own, n in zip(gains, lengths, strict=True))
            return tokens / cost[2 + sum(lengths)]

        best = max(map(rate, product(range(4), repeat=3)))
        chosen = rate(tuple(choose(gains, table(lambda rows, cost=cost: cost[rows - 1], 12))))  # type: ignore[misc]
        assert chosen >= best / 1.021


def test_times_between_measured_rows_lie_on_a_line() -> None:
    times = StepTimes()
    assert times.curve(1, 3)[0] == 1.0
    for _ in range(5):
        times.observe(1, 0.010)
        times.observe(5, 0.018)
    assert times.curve(1, 5) == pytest.approx([0.010, 0.012, 0.014, 0.016, 0.018])
    assert times.curve(6, 2) == pytest.approx([0.020, 0.022])


def test_before_it_is_measured_a_row_costs_little() -> None:
    """So that it is tried: a hopeful guess is put right by the first step, a gloomy one never."""
    times = StepTimes()
    times.observe(16, 0.032)
    curve = times.curve(16, 4)
    assert curve[0] == pytest.approx(0.032)
    assert curve[0] < curve[1] < curve[3] < 0.032 * 1.2
    assert choose([[0.9]] * 16, times) == [1] * 16


def test_no_row_is_thought_dearer_than_those_before() -> None:
    times = StepTimes()
    for _ in range(5):
        times.observe(15, 0.015)
        times.observe(16, 0.030)
    assert times.curve(32, 1)[0] <= 0.0601


def test_a_slow_spell_changes_no_choice() -> None:
    """Others on the machine slow all steps alike; half of the table is measured while they do."""
    gains = [[0.8**n for n in range(1, 9)]]
    quiet, noisy = StepTimes(), StepTimes()
    for turn in range(400):
        rows = 1 + turn % 9
        quiet.observe(rows, stairs(rows) * (1 + 0.05 * rows))
        noisy.observe(rows, stairs(rows) * (1 + 0.05 * rows) * (3 if 100 < turn < 300 else 1))
        if turn > 40 and turn not in range(100, 120) and turn not in range(300, 320):
            assert choose(gains, noisy) == choose(gains, quiet)


def test_one_slow_step_is_not_believed_for_ever() -> None:
    times = table(lambda rows: 0.01 * (1 + 0.02 * rows), 4)
    for _ in range(10):
        times.observe(1, 0.0102)
    times.observe(8, 1.0)
    assert times.curve(8, 1)[0] < 0.02, "capped by what was to be expected"
    for _ in range(600):
        times.observe(1, 0.0102)
    assert times.curve(8, 1)[0] == pytest.approx(0.0102 * (1 + 0.05 * 7), rel=0.01), "forgotten"


def test_longer_matches_fall_into_later_classes() -> None:
    classes = [bucket_of(length) for length in range(1, 200)]
    assert classes == sorted(classes)
    assert classes[0] == 0
    assert len(set(classes)) == 12


def test_chances_are_learnt_by_length_source_and_evidence() -> None:
    acceptance = Acceptance()
    before = acceptance.chance(0, 3, 0), acceptance.chance(1, 3, 0), acceptance.chance(0, 40, 0)
    for _ in range(200):
        acceptance.learn(0, 3, 0, False, 1.0)
        acceptance.learn(0, 3, ALWAYS, True, 1.0)
    assert acceptance.chance(0, 3, 0) < 0.05
    assert acceptance.chance(0, 3, ALWAYS) > 0.95
    assert (acceptance.chance(1, 3, 0), acceptance.chance(0, 40, 0)) == before[1:]
    for _ in range(1500):
        acceptance.learn(0, 3, 0, True, 1.0)
    assert acceptance.chance(0, 3, 0) > 0.9, "the past fades"


def test_chances_come_near_the_truth() -> None:
    rng = random.Random(3)
    acceptance = Acceptance()
    for _ in range(2000):
        acceptance.learn(0, 2, 0, rng.random() < 0.3, 1.0)
    assert acceptance.chance(0, 2, 0) == pytest.approx(0.3, abs=0.08)


def test_an_answer_of_its_own_kind_is_lifted_or_lowered() -> None:
    acceptance = Acceptance()
    good = bad = 1.0
    for _ in range(15):
        good = acceptance.learn(0, 2, 0, True, good)
        bad = acceptance.learn(0, 2, 0, False, bad)
    assert good > 2
    assert bad < 0.7
    assert acceptance.chance(0, 2, 0, bad) < acceptance.chance(0, 2, 0) < acceptance.chance(0, 2, 0, good)
    for _ in range(1000):
        bad = acceptance.learn(0, 2, 0, False, bad)
    assert bad >= 1 / 16, "never so low that one answer cannot come back"


def test_gains_are_products_of_chances() -> None:
    acceptance = Acceptance()
    gains = acceptance.gains(0, 4, [0, 0, 2], [1.0] * 4)
    chances = [acceptance.chance(0, 4, 0), acceptance.chance(0, 5, 0), acceptance.chance(0, 6, 2)]
    assert gains == pytest.approx([chances[0], chances[0] * chances[1], chances[0] * chances[1] * chances[2]])
    assert gains == sorted(gains, reverse=True)
    assert acceptance.gains(0, 1, [3] * 15, [1 / 16] * 4) == [], "what is hopeless is not looked at"
