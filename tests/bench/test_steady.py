"""Disturbed rounds are found, repeated and counted."""

from __future__ import annotations

import pytest

from hasten.bench.figures import disturbed, steady


def play(rates: list[float], runs: int) -> tuple[list[float], int, bool, int]:
    """The rounds kept, how many were disturbed, whether they are trusted, and how many were taken."""
    taken: list[int] = []

    def take(number: int) -> float:
        taken.append(number)
        return rates[number - 1]

    found = steady(take, lambda rate: [rate], runs)
    assert taken == list(range(1, len(taken) + 1))
    return list(found.rounds), found.disturbed, found.trusted, len(taken)


def test_quiet_rounds_are_taken_once() -> None:
    assert play([50, 51, 49, 52, 50], 5) == ([50, 51, 49, 52, 50], 0, True, 5)


def test_a_disturbed_round_is_repeated() -> None:
    assert play([50, 17.8, 49, 51], 3) == ([50, 49, 51], 1, True, 4)


def test_the_first_round_may_be_the_disturbed_one() -> None:
    assert play([20, 50, 51, 49], 3) == ([50, 51, 49], 1, True, 4)


def test_a_machine_that_never_rests() -> None:
    """Twice as many rounds and no more; then everything is kept, and marked."""
    kept, _, trusted, taken = play([50.0, 20, 49, 21, 22, 20], 3)
    assert (kept, trusted, taken) == ([50.0, 20, 49, 21, 22, 20], False, 6)


def test_one_round_has_nothing_to_be_held_against() -> None:
    assert play([3.0], 1) == ([3.0], 0, True, 1)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_rate_of_a_round_can_tell(place: int) -> None:
    """Decode and prefill of every engine: whoever is slowed, the round does not count."""
    rounds = [[50.0, 700.0, 30.0] for _ in range(4)]
    rounds[2][place] *= 0.5
    assert disturbed(rounds) == [False, False, True, False]


def test_what_is_said() -> None:
    heard: list[str] = []
    steady(lambda number: [50.0, 10.0, 50.0, 50.0][number - 1], lambda rate: [rate], 3, heard.append)
    assert heard == ["1 of 3 rounds were disturbed by other work: one more"]
