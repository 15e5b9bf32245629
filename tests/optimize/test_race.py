"""Races with models whose times are drawn: who leaves when, and that noise does not choose."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from hasten.bench.figures import Sample
from hasten.optimize.race import SAME, Lap, Racer, apart, race


def lap(seconds: float) -> Lap:
    return Lap(Sample(100, seconds / 3, 10, 2 * seconds / 3, (tuple(range(11)),)))


def cost(one: Lap) -> float:
    return one.sample.ttft_s + one.sample.decode_s


def racer(name: str, times: Callable[[int], float], taken: list[str], is_pacer: bool = False) -> Racer:
    def run(number: int) -> Lap:
        taken.append(name)
        return lap(times(number))

    return Racer(name, run, is_pacer)


def test_far_behind_leaves_after_two_rounds_and_the_start_after_its_own() -> None:
    taken: list[str] = []
    found = race(
        [
            racer("start", lambda _: 9.0, taken, is_pacer=True),
            racer("a", lambda _: 1.0, taken),
            racer("b", lambda _: 1.1, taken),
            racer("far", lambda _: 1.5, taken),
        ],
        cost,
        predicted={"a": 1.0, "b": 1.1, "far": 1.5},
        least=4,
    )
    assert {name: taken.count(name) for name in found} == {"start": 2, "a": 4, "b": 3, "far": 2}
    assert found["start"].ratio is None, "nobody is compared with the start"
    assert found["b"].believed == pytest.approx(1.1) and found["a"].believed == 1.0
    ratio = found["far"].ratio
    assert ratio is not None and ratio.median == pytest.approx(1.5) and ratio.n == 2


def test_close_ones_get_more_rounds_and_equal_ones_stop_early() -> None:
    draw, taken = random.Random(1), list[str]()
    race(
        [
            racer("a", lambda _: draw.gauss(1.0, 0.03), taken),
            racer("b", lambda _: draw.gauss(1.02, 0.03), taken),
        ],
        cost,
        least=3,
    )
    assert taken.count("a") == taken.count("b") > 3
    taken.clear()
    race([racer("a", lambda _: 1.0, taken), racer("b", lambda _: 0.999, taken)], cost, least=3)
    assert len(taken) == 6


def test_a_wrong_prediction_yields_to_rounds_that_agree() -> None:
    """b is said to be 7 % dearer, and is 5 % cheaper in every round."""
    found = race(
        [racer("a", lambda _: 1.05, []), racer("b", lambda _: 1.0, [])],
        cost,
        predicted={"a": 1.0, "b": 1.07},
        least=3,
    )
    assert found["b"].believed == 1.0 and (found["a"].believed or 0) > 1.03


def test_a_slow_minute_of_the_machine_moves_nobody() -> None:
    """Every second round takes half as long again for all; the ratio does not see it."""
    slow = lambda number: 1.25 if number % 2 else 1.0  # noqa: E731
    found = race([racer("a", slow, []), racer("b", lambda number: 1.05 * slow(number), [])], cost, least=3)
    ratio = found["b"].ratio
    assert ratio is not None
    assert (ratio.low, ratio.high) == (pytest.approx(1.05), pytest.approx(1.05))


def test_a_disturbed_round_counts_for_nobody_and_is_said() -> None:
    said: list[str] = []
    found = race(
        [racer("a", lambda n: 3.0 if n == 2 else 1.0, []), racer("b", lambda _: 1.1, [])],
        cost,
        least=3,
        say=said.append,
    )
    assert found["a"].disturbed == 1 and 2 not in found["a"].laps and 2 not in found["b"].laps
    assert len(found["a"].laps) == 3
    assert any("other work disturbed a" in text for text in said)


def test_the_time_limit_ends_a_race_after_a_round() -> None:
    taken: list[str] = []
    found = race(
        [racer("a", lambda _: 1.0, taken), racer("b", lambda _: 1.1, taken)], cost, is_over=lambda: True
    )
    assert taken == ["a", "b"] and found["b"].ratio is not None


def chosen(seed: int, truth: float, off: float) -> str:
    """Of a mixture and a source that is slower by `truth`, and predicted so but for `off`.

    Beside them a process takes a core at random moments."""
    draw = random.Random(seed)
    state = {"left": 0, "busy": False}

    def noise() -> float:
        if state["left"] == 0:
            state["left"], state["busy"] = draw.randint(1, 6), not state["busy"]
        state["left"] -= 1
        share = draw.random() if state["busy"] else 0.0  # of a run that the other process was there
        return (1 + 0.9 * share) * draw.gauss(1.0, 0.02)

    found = race(
        [
            racer("bf16", lambda _: 2.5 * noise(), [], is_pacer=True),
            racer("mix", lambda _: noise(), []),
            racer("source", lambda _: truth * noise(), []),
        ],
        cost,
        predicted={"mix": 1.0, "source": truth + off},
    )
    assert found["source"].believed is not None and found["mix"].believed is not None
    return "source" if found["source"].believed / found["mix"].believed <= 1 + SAME else "mix"


@pytest.mark.parametrize(
    ("truth", "off", "expected"),
    [(0.98, 0.0, "source"), (1.07, 0.0, "mix"), (1.07, 0.03, "mix"), (1.12, -0.04, "mix")],
)
def test_beside_a_neighbour_nine_of_ten_races_choose_alike(truth: float, off: float, expected: str) -> None:
    choices = [chosen(seed, truth, off) for seed in range(40)]
    assert choices.count(expected) >= 36, choices


def test_one_after_another_has_an_interval_of_its_own() -> None:
    found = apart({"a": [1.0, 1.02, 0.98], "b": [1.2, 1.19, 1.21]})
    assert found["a"].median == 1.0
    assert found["b"].median == pytest.approx(1.2)
    assert found["b"].low < 1.2 < found["b"].high
