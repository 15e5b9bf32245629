"""`optimize --min-task`: what passes by text is held against tasks too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeWorkshop
from hasten.cli.optimize import _wanted
from hasten.core import Budget, Status
from hasten.errors import BudgetError, UsageError
from hasten.optimize import trials
from hasten.optimize.choice import Aims
from hasten.optimize.prospect import OptimizeResult
from hasten.optimize.search import Effort, Search
from hasten.quality.answers import InProcess, TaskResult


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Recipes that were asked; below 6 bits a model knows no JSON."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    names: list[str] = []

    def reached(
        subject: Any, wanted: Mapping[str, float], limit: int | None = None, *, step: Any
    ) -> tuple[Status, tuple[TaskResult, ...]]:
        assert isinstance(subject, InProcess)
        model: Any = subject._model
        names.append(model.recipe.name)
        step("json", 1, 100)
        good = model.bits_per_weight > 6
        share, low, high = (0.97, 0.92, 0.99) if good else (0.61, 0.51, 0.70)
        found = TaskResult("json", "pass", 100, 0, 0.0, share, low, high)
        return "pass" if good and wanted["json"] <= low else "fail", (found,)

    monkeypatch.setattr(trials, "reached", reached)
    return names


def search(folder: Path, share: float | None) -> OptimizeResult:
    workshop = FakeWorkshop()
    budget = Budget(0.3, None, None if share is None else (("json", share),))
    text, effort = workshop.text(evaluation=4097), Effort(tokens=4096, runs=2)
    return Search(workshop, Aims(budget), text, effort).run(folder / "out.hasten")


def test_a_recipe_that_lost_a_task_is_out(asked: list[str], tmp_path: Path) -> None:
    assert search(tmp_path, None).chosen.bits_per_weight < 6
    assert asked == []
    found = search(tmp_path, 0.9)
    assert found.chosen.bits_per_weight > 6
    assert found.chosen.verdict.task_shares == {"json": 0.97}
    assert "json 0.9" in found.chosen.because
    assert "Right answers: json 97%." in found.chosen.because
    lost = [c for c in found.candidates if c.bits_per_weight < 6]
    assert lost
    for candidate in lost:
        assert candidate.verdict.status == "fail"
        assert (
            "json: 61% of 100 answers are right (51% to 70%); the lower end must reach 0.9"
            in candidate.because
        )
    names = len(asked)
    assert search(tmp_path, 0.9).chosen.recipe == found.chosen.recipe
    assert len(asked) == names, "what was asked is kept"


def test_nothing_reaches_the_share(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="json: 97% of 100") as caught:
        search(tmp_path, 0.95)
    assert caught.value.exit_code == 3


def test_flags() -> None:
    assert _wanted(None) is None
    assert _wanted(["json:90%", "copy:0.5", "json:80%"]) == (("json", 0.8), ("copy", 0.5))
    with pytest.raises(UsageError):
        _wanted(["jsn:90%"])
