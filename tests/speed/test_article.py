"""What does not hold in the article's formula."""

from __future__ import annotations

import pytest

PRINTED = 0.0000833  # "s a sample, that is, 83.3 ms"
GIVEN = {
    "p": 100,
    "e": 0.8,
    "r": 100,
    "d": 2,
    "c": 0.9,
}  # R = 100 MB/s, D = 2 s; P is R's value, none is stated


def article_speed(p: float, e: float, m: float, r: float, d: float, c: float) -> float:
    """The article's V = P * E / (M + R * D / C): a number without a meaning.

    P is the hardware's compute performance, E the degree of algorithm optimisation, M the model's parameters,
    R the data rate between memory and hardware, D the data preprocessing time and C the effect of the cache.
    These are the right three levers (hardware, algorithms, caching), and this project keeps them. As a
    formula it cannot be used:

    - Its sum adds a number of parameters to a number of bytes.
    - V is called a speed but read as a time in the worked example.
    - A faster link R makes V smaller, and preprocessing time D counts only by way of R.
    - P = 100 is never given in the example (R's value stands there), and M = 1000 * 10^6 is a hundred times
      the stated ten million parameters.
    - The example prints 0.0000833 s and calls it 83.3 ms; its own expression is 8.0e-8, and 0.0000833 s is
      83.3 microseconds.
    - Nothing says memory-bound or compute-bound, prefill or decode, batch or context.

    Raises:
        ZeroDivisionError: C is zero, or the sum is.
    """
    return p * e / (m + r * d / c)


def test_the_worked_example_does_not_compute() -> None:
    as_written = article_speed(m=1000 * 10**6, **GIVEN)
    assert as_written == pytest.approx(8.0e-8, rel=1e-3)
    assert article_speed(m=10 * 10**6, **GIVEN) == pytest.approx(8.0e-6, rel=1e-3)  # as stated: ten million
    assert PRINTED / as_written == pytest.approx(1041, rel=1e-2)  # a thousand times off, at least
    assert pytest.approx(83.3) == PRINTED * 1e6  # microseconds, not milliseconds


def test_its_sum_adds_parameters_to_bytes() -> None:
    """M counts parameters; R * D / C is bytes a second times seconds over a fraction."""
    rate, time = {"byte": 1, "second": -1}, {"second": 1}
    product = {unit: rate.get(unit, 0) + time.get(unit, 0) for unit in {**rate, **time}}
    assert {unit: power for unit, power in product.items() if power} == {"byte": 1} != {"parameter": 1}
    numbers = {"p": 1.0, "e": 1.0, "c": 1.0}
    assert 1 / article_speed(m=3, r=2, d=5, **numbers) == pytest.approx(3 + 2 * 5)  # and they are added


def test_a_faster_link_makes_it_slower() -> None:
    given = {"p": 1e12, "e": 0.8, "m": 1e7, "d": 2.0, "c": 0.9}
    assert article_speed(r=2e8, **given) < article_speed(r=1e8, **given)
