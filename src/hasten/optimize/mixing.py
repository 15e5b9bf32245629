"""Draws the map and fits the mixture: what `optimize` and a recipe called `mix:1%` both do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hasten.core import Budget
from hasten.optimize.candidate import Candidate
from hasten.optimize.held_out import split
from hasten.optimize.memory import SearchMemory
from hasten.optimize.mixture import fit_mixture, refine_mixture
from hasten.optimize.progress import Observer
from hasten.optimize.sensitivity import Check, Harms, SensitivityMap, draw, measure_harms
from hasten.optimize.trials import Trials
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.text import Text
from hasten.recipe import Method
from hasten.weights.formats import format_named


@dataclass
class Mixing:
    """Everything a mixture is made with; its integers are found by `method`."""

    workshop: Workshop
    source: Callable[[], Built]  # the source in bf16, made at first use
    text: Text
    memory: SearchMemory
    trials: Trials
    budget: Budget
    seconds: float  # for the map's comparisons
    observer: Observer
    calibrated: str | None = None  # what calibrated integers depend on; None: there are none

    @property
    def method(self) -> Method:
        """How the mixture's integers are found: calibrated where that is possible."""
        return "rtn" if self.calibrated is None else "gptq"

    @cached_property
    def map(self) -> SensitivityMap:
        """Every group's harm at every width; measured once for a source, text and method."""
        key = {"method": self.method, "calibrated": self.calibrated}
        kept = self.memory.read("harms", **key)
        if kept is None:
            harms = measure_harms(
                self.workshop,
                self.source(),
                split(self.text.calibration).held_out,
                seconds=self.seconds,
                observer=self.observer,
                method=self.method,
            )
            self.memory.write("harms", harms, **key)
        else:
            harms = harms_from(kept)
        return draw(self.workshop, harms, method=self.method)

    def fit(self, judged: Sequence[Candidate] = ()) -> Candidate | None:
        """The cheapest mixture within the budget, or the nearest to it; None where there is nothing to mix.

        With torch, widths are searched with matrices that GPTQ finds one by one, each a read once it was
        found; the best of them is then made layer after layer, which takes minutes and loses less.

        Args:
            judged: uniform recipes with their verdicts.
        """
        tokens = max((c.verdict.tokens for c in judged), default=self.trials.tokens)
        found = fit_mixture(self.map, judged, self.budget, self.trials.judge, tokens)
        if found is None or self.calibrated is None:
            return found
        return refine_mixture(self.map, found, self.budget, self.trials.judge, tokens, "best")


def harms_from(kept: Any) -> Harms:
    """Harms out of their JSON."""
    checks = (Check(c["group"], format_named(c["layout"]), c["harm"]) for c in kept["checks"])
    return Harms(tuple(kept["at_probe"]), tuple(checks))
