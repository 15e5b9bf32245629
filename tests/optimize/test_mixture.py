"""The mixture's closed loop, with a judge that is a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hasten.core import Budget, Format, Recipe, Verdict
from hasten.optimize.choice import Candidate
from hasten.optimize.mixture import fit_mixture, predicted_harm, refine_mixture
from hasten.optimize.sensitivity import Choice, Group, Sensitivity, SensitivityMap

TOKENS = 8192


def menu(harm: float) -> tuple[Choice, ...]:
    return (
        Choice(None, 850, 0.0),
        Choice(Format.of(6), 650, harm / 16),
        Choice(Format.of(5), 550, harm / 4),
        Choice(Format.of(4), 450, harm),
    )


GROUPS = tuple(
    Sensitivity(
        Group(f"layers.{i}.down", (f"layers.{i}.down",)), 0.001 * (1 + i % 5), menu(0.001 * (1 + i % 5))
    )
    for i in range(40)
)
MAP = SensitivityMap(GROUPS)


def verdict(rise: float, half: float, budget: float, tokens: int = TOKENS) -> Verdict:
    status = "pass" if rise + half <= budget else "fail" if rise - half > budget else "insufficient"
    return Verdict(status, 8.0, 8.0, rise, rise - half, rise + half, abs(rise), 0.1, 0.9, tokens)


class Judge:
    """Perplexity rises by `slope` times the predicted harm plus what the base costs."""

    def __init__(
        self, slope: Callable[[float], float], budget: float, half: float, base: float = 0.0
    ) -> None:
        self.slope, self.budget, self.half, self.base = slope, budget, half, base
        self.tried: list[Candidate] = []

    def __call__(self, recipe: Recipe) -> Candidate:
        harm = predicted_harm(recipe, GROUPS)
        assert harm is not None
        size = sum(
            next(c.bytes for c in s.menu if c.layout == recipe.layout_for(s.group.tensors[0])) for s in GROUPS
        )
        found = Candidate(
            recipe, size / 100, size, verdict(self.base + self.slope(harm), self.half, self.budget)
        )
        self.tried.append(found)
        return found


def uniform(judge: Judge) -> list[Candidate]:
    found = [judge(Recipe.parse(name)) for name in ("source", "w6", "w5", "w4")]
    judge.tried.clear()
    return found


@pytest.mark.parametrize("budget", [0.005, 0.01, 0.03])
@pytest.mark.parametrize(
    "slope", [lambda h: h, lambda h: 3 * h, lambda h: 0.4 * h, lambda h: 2 * h**1.3, lambda h: h + 8 * h * h]
)
def test_uses_the_budget_and_keeps_it(slope: Callable[[float], float], budget: float) -> None:
    judge = Judge(slope, budget, half=0.2 * budget, base=0.05 * budget)
    found = fit_mixture(MAP, uniform(judge), Budget(budget), judge, TOKENS)
    if slope(0.12) <= 0.6 * budget:
        assert found is None  # w4 alone is nearly within the first aim
        return
    assert found is not None
    assert found.passes
    assert found.verdict.ppl_increase_high > 0.75 * budget
    assert len(judge.tried) <= 4
    assert found.weight_bytes == min(c.weight_bytes for c in judge.tried if c.passes)
    assert found.recipe.name == f"mix:{budget * 100:g}%"
    assert "Mixtures tried" in found.because


def test_nothing_to_mix_where_the_narrowest_is_harmless() -> None:
    judge = Judge(lambda h: 0.001 * h, 0.01, half=0.001)
    assert fit_mixture(MAP, uniform(judge), Budget(0.01), judge, TOKENS) is None
    assert not judge.tried


def test_the_nearest_is_reported_where_none_passes() -> None:
    judge = Judge(lambda h: h, 0.01, half=0.03)
    found = fit_mixture(MAP, uniform(judge), Budget(0.01), judge, TOKENS)
    assert found is not None
    assert not found.passes
    assert found.verdict.ppl_increase_high == min(c.verdict.ppl_increase_high for c in judge.tried)


def test_sensitive_groups_get_more_bits() -> None:
    judge = Judge(lambda h: h, 0.02, half=0.001)
    found = fit_mixture(MAP, uniform(judge), Budget(0.02), judge, TOKENS)
    assert found is not None

    def bits(harm: float) -> float:
        widths = [
            layout.bits if (layout := found.recipe.layout_for(s.group.tensors[0])) else 8
            for s in GROUPS
            if s.harm == harm
        ]
        return sum(widths) / len(widths)

    assert bits(0.001) <= bits(0.003) <= bits(0.005)
    assert bits(0.001) < bits(0.005)


def test_unknown_layouts_have_no_prediction() -> None:
    assert predicted_harm(Recipe.parse("w4-g128"), GROUPS) is None
    assert predicted_harm(Recipe.parse("source"), GROUPS) == 0


def test_a_better_method_narrows_the_mixture_further() -> None:
    judge = Judge(lambda h: h, 0.01, half=0.001)
    found = fit_mixture(MAP, uniform(judge), Budget(0.01), judge, TOKENS)
    assert found is not None
    better = Judge(lambda h: 0.6 * h, 0.01, half=0.001)
    refined = refine_mixture(MAP, found, Budget(0.01), better, TOKENS, "best")
    assert refined.passes
    assert refined.recipe.method == "best"
    assert refined.weight_bytes < found.weight_bytes
    assert refined.verdict.ppl_increase_high > 0.006
    assert len(better.tried) == 1, "such a model takes minutes"


def test_of_equal_mixtures_the_better_one_stays() -> None:
    judge = Judge(lambda h: h, 0.01, half=0.0)
    found = fit_mixture(MAP, uniform(judge), Budget(0.01), judge, TOKENS)
    assert found is not None
    worse = Judge(lambda h: 3 * h, 0.01, half=0.0)
    refined = refine_mixture(MAP, found, Budget(0.01), worse, TOKENS, "best")
    assert refined.recipe == found.recipe


def test_without_uniform_recipes_perplexity_rises_as_kl_does() -> None:
    judge = Judge(lambda h: 1.2 * h, 0.01, half=0.001)
    kept = judge(Recipe("mix:1%"))
    found = fit_mixture(MAP, [kept], Budget(0.01), judge, TOKENS)
    assert found is not None
    assert found.passes
    assert found.verdict.ppl_increase_high > 0.0075
    assert found.recipe.method == "rtn"
