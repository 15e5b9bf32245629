"""What does not hold in the article's formula."""

from __future__ import annotations

import pytest

from hasten.speed import article_speed, dimensions, worked_example


def test_the_worked_example_does_not_compute() -> None:
    example = worked_example()
    assert example.as_written == pytest.approx(8.0e-8, rel=1e-3)
    assert example.as_stated == pytest.approx(8.0e-6, rel=1e-3)
    assert example.printed / example.as_written == pytest.approx(
        1041, rel=1e-2
    )  # a thousand times off, at least
    assert example.printed * 1e6 == pytest.approx(83.3)  # microseconds, not milliseconds


def test_its_sum_adds_parameters_to_bytes() -> None:
    parameters, transfer = dimensions()
    assert parameters == {"parameter": 1}
    assert transfer == {"byte": 1}


def test_a_faster_link_makes_it_slower() -> None:
    given = {"p": 1e12, "e": 0.8, "m": 1e7, "d": 2.0, "c": 0.9}
    assert article_speed(r=2e8, **given) < article_speed(r=1e8, **given)
