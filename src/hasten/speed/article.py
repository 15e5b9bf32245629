"""The article's formula for inference speed, as it stands, and what does not hold in it.

    V = P * E / (M + R * D / C)

with P the hardware's compute performance, E the degree of algorithm optimisation, M the model's parameters, R
the data rate between memory and hardware, D the data preprocessing time and C the effect of the cache. It
names the right three levers (hardware, algorithms, caching), and this project keeps them. As a formula it
cannot be used:

- Its sum adds a number of parameters to a number of bytes (`dimensions`).
- V is called a speed but read as a time in the worked example.
- A faster link R makes V smaller, and preprocessing time D counts only by way of R.
- P = 100 is never given in the example (R's value stands there), and M = 1000 * 10^6 is a hundred times the
  stated ten million parameters.
- The example prints 0.0000833 s and calls it 83.3 ms; its own expression is 8.0e-8, and 0.0000833 s is 83.3
  microseconds (`worked_example`).
- Nothing says memory-bound or compute-bound, prefill or decode, batch or context.

`hasten.speed.estimate` is what takes its place: seconds on both sides, measured ceilings, the slower of two
limits.
"""

from __future__ import annotations

from dataclasses import dataclass

PRINTED_IN_THE_ARTICLE = 0.0000833  # "s a sample, that is, 83.3 ms"

Dimension = dict[str, int]  # exponents of units, such as {"byte": 1, "second": -1}

# The units that the article's words allow; it gives none itself.
_P: Dimension = {"operation": 1, "second": -1}
_M: Dimension = {"parameter": 1}
_R: Dimension = {"byte": 1, "second": -1}
_D: Dimension = {"second": 1}
_NONE: Dimension = {}  # E and C are fractions


@dataclass(frozen=True)
class WorkedExample:
    """The article's example again: `as_written` with its numbers, `as_stated` with ten million parameters."""

    as_written: float
    as_stated: float
    printed: float


def article_speed(p: float, e: float, m: float, r: float, d: float, c: float) -> float:
    """V = P * E / (M + R * D / C), a number without a meaning: see this file's docstring.

    Raises:
        ZeroDivisionError: C is zero, or the sum is.
    """
    return p * e / (m + r * d / c)


def worked_example() -> WorkedExample:
    """Ten million parameters, R = 100 MB/s, E = 0.8, D = 2 s, C = 0.9; R's 100 also stands in P's place."""
    return WorkedExample(
        as_written=article_speed(p=100, e=0.8, m=1000 * 10**6, r=100, d=2, c=0.9),
        as_stated=article_speed(p=100, e=0.8, m=10 * 10**6, r=100, d=2, c=0.9),
        printed=PRINTED_IN_THE_ARTICLE,
    )


def dimensions() -> tuple[Dimension, Dimension]:
    """Units of the two terms the formula adds, M and R * D / C: a sum has a meaning where they are equal."""
    return _M, _times(_times(_R, _D), _NONE)


def numerator_dimension() -> Dimension:
    """Units of P * E."""
    return _times(_P, _NONE)


def _times(a: Dimension, b: Dimension) -> Dimension:
    total = {unit: a.get(unit, 0) + b.get(unit, 0) for unit in {**a, **b}}
    return {unit: power for unit, power in total.items() if power}
