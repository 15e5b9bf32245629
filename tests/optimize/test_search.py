"""The closed loop on the model of NumPy: choice, record, resuming, giving up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeModel, FakeWorkshop
from hasten.bench.figures import Sample
from hasten.compress.result import Progress
from hasten.core import Budget, EngineOptions, Goal, Recipe, Workload
from hasten.errors import BudgetError, DeviceLost, MachineError, UsageError
from hasten.optimize.choice import WORKLOADS, Aims
from hasten.optimize.prospect import OptimizeResult
from hasten.optimize.search import Effort, Search
from hasten.optimize.workshop import Workshop
from hasten.quality.text import Text

TOKENS = 4096
Run = Callable[..., OptimizeResult]


@pytest.fixture(scope="module")
def texts() -> dict[int, Text]:
    return {bits: FakeWorkshop(kept_bits=bits).text(evaluation=TOKENS + 1) for bits in (16, 8)}


@pytest.fixture
def run(tmp_path: Path, texts: dict[int, Text], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))

    def search(
        workshop: FakeWorkshop,
        budget: float = 0.02,
        goal: Goal = "latency",
        fresh: bool = False,
        watch: Callable[[Progress], None] = lambda p: None,
    ) -> OptimizeResult:
        text = texts[workshop.kept_bits]
        effort = Effort(tokens=TOKENS, runs=3)
        aims = Aims(Budget(budget), goal)
        return Search(workshop, aims, text, effort, fresh, watch).run(tmp_path / "out.hasten")

    return search


def test_the_chosen_one_is_the_fastest_that_passes(run: Run) -> None:
    result = run(FakeWorkshop())
    passing = [c for c in result.candidates if c.verdict.status == "pass" and c.measurement is not None]
    assert result.chosen in passing
    assert result.chosen.cost("latency") <= 1.02 * min(c.cost("latency") for c in passing)
    assert result.chosen.verdict.ppl_increase_high <= 0.02
    assert result.speedup.decode > 2.0
    names = {c.recipe.name for c in (*result.candidates, *result.untried)}
    assert names >= {"w8", "w6", "w5", "w5-head8", "w4-head8", "w4", "mix:2%"}
    assert all(c.because for c in (*result.candidates, *result.untried))


class Disturbed(FakeWorkshop):
    """Other work slows some runs of one recipe to a third."""

    def __init__(self, name: str, numbers: tuple[int, ...]) -> None:
        super().__init__(kept_bits=8)
        self.name_hit, self.numbers = name, numbers
        self.taken: list[str] = []

    def run(self, model: FakeModel, workload: Workload, number: int) -> Sample:
        self.taken.append(model.recipe.name)
        found = super().run(model, workload, number)
        if model.recipe.name != self.name_hit or number not in self.numbers:
            return found
        return replace(found, ttft_s=3 * found.ttft_s, decode_s=3 * found.decode_s)


def test_a_disturbed_round_is_taken_again_and_said(run: Run) -> None:
    quiet, noisy = run(FakeWorkshop(kept_bits=8)), Disturbed("mix:2%", (2,))
    result = run(noisy, fresh=True)
    assert result.chosen.recipe == quiet.chosen.recipe
    mixture = next(c for c in result.candidates if c.recipe.name == "mix:2%")
    assert mixture.measurement is not None
    assert mixture.measurement.disturbed_rounds == 1
    assert mixture.measurement.decode_tok_per_s.median == pytest.approx(1e6 / (500 + mixture.weight_bytes))
    assert any("disturbed" in why and "mix:2%" in why for why in result.plan.because)


def test_who_is_clearly_slower_is_timed_less(run: Run) -> None:
    """Every run of the mixture takes three times as long: two rounds are enough to know."""
    noisy = Disturbed("mix:2%", tuple(range(1, 99)))
    result = run(noisy)
    mixture = next(c for c in result.candidates if c.recipe.name == "mix:2%")
    assert mixture.measurement is not None and mixture.measurement.decode_tok_per_s.n == 2
    assert result.chosen.recipe.name != "mix:2%"
    assert noisy.taken.count(result.chosen.recipe.name) > 3


def test_a_cache_that_cannot_be_written_costs_a_warning(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same result, found once: what is not on disk is remembered while the search goes on."""
    monkeypatch.setattr("hasten.weights.packed_store._said", set())
    expected, workshop, blocked = run(FakeWorkshop()), FakeWorkshop(), tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(blocked))
    found = run(workshop)
    assert found.chosen.recipe.name == expected.chosen.recipe.name
    assert [c.recipe.name for c in found.candidates] == [c.recipe.name for c in expected.candidates]
    assert len(workshop.measured) == len(set(workshop.measured))
    assert caplog.text.count("what the search finds is not kept") == 1


def test_only_what_may_win_is_timed(run: Run) -> None:
    workshop = FakeWorkshop()
    result = run(workshop)
    timed = {c.recipe.name for c in result.candidates if c.measurement is not None}
    passing = [c for c in result.candidates if c.passes]
    least = min(c.weight_bytes for c in passing)
    assert timed <= {c.recipe.name for c in passing if c.weight_bytes <= 1.35 * least}
    assert all(c.weight_bytes > 1.15 * least for c in passing if c.recipe.name not in timed)
    assert {"bf16", *timed} == set(workshop.measured)
    assert len(workshop.measured) == len(set(workshop.measured))


def test_what_cannot_win_is_not_packed(run: Run) -> None:
    workshop = FakeWorkshop(kept_bits=8)
    result = run(workshop)
    untried = {u.recipe.name: u.because for u in result.untried}
    assert "which keeps the source's own values" in untried["w8"]
    assert not untried.keys() & set(workshop.built)
    worse = [u for u in result.untried if "does not pass" in u.because]
    failed = [c for c in result.candidates if not c.passes]
    assert all(any(u.weight_bytes <= c.weight_bytes for c in failed) for u in worse)


def test_the_mixture_is_lighter_than_any_uniform_one_that_passes(run: Run) -> None:
    result = run(FakeWorkshop(kept_bits=8))
    mixture = next(c for c in result.candidates if c.recipe.name.startswith("mix"))
    assert mixture.passes
    uniform = [c for c in result.candidates if c.passes and not c.recipe.name.startswith("mix")]
    assert all(c.weight_bytes > mixture.weight_bytes for c in uniform)
    for layer in range(2):  # what is computed in one pass has one layout
        names = [f"layers.{layer}.{part}" for part in ("q", "k", "v")]
        assert len({mixture.recipe.layout_for(name) for name in names}) == 1


def test_the_source_is_tried_where_it_is_not_the_baseline_itself(run: Run) -> None:
    assert "source" in [c.recipe.name for c in run(FakeWorkshop(kept_bits=8)).candidates]


@pytest.mark.parametrize(("share", "is_together"), [(0.6, True), (0.8, False)])
def test_a_race_takes_seven_tenths_of_the_free_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch, share: float, is_together: bool
) -> None:
    finalists = [c for c in run(Disturbed("", ())).candidates if c.measurement is not None]
    assert len(finalists) > 1
    free = round(sum(c.size for c in finalists) / share)
    monkeypatch.setattr("hasten.optimize.trials.available_bytes", lambda: free)
    workshop = Disturbed("", ())  # nothing slows it: it says who ran when
    run(workshop)
    blocks = [name for name, _ in groupby(workshop.taken)]
    assert (len(blocks) > len(set(blocks))) == is_together


@pytest.mark.parametrize("goal", ["throughput", "memory"])
def test_goals(run: Run, goal: Goal) -> None:
    result = run(FakeWorkshop(), goal=goal)
    assert result.baseline.measurement.workload == WORKLOADS[goal]
    if goal == "memory":
        assert result.chosen.weight_bytes == min(c.weight_bytes for c in result.candidates if c.passes)


def test_json_is_what_was_promised(run: Run) -> None:
    document = json.loads(json.dumps(run(FakeWorkshop()).to_json(), allow_nan=False))
    assert list(document) == [
        "schema_version", "machine", "model", "baseline", "candidates", "untried", "chosen", "artifact",
        "speedup",
    ]  # fmt: skip
    first = document["candidates"][0]
    assert {"recipe", "bits_per_weight", "measurement", "verdict", "because"} <= set(first)
    assert {"status", "ppl_increase", "kl_mean", "kl_p99", "top1_agreement", "tokens"} <= set(
        first["verdict"]
    )
    assert set(document["speedup"]) == {"decode", "prefill", "ttft"}
    assert document["chosen"] in [c["recipe"] for c in document["candidates"]]
    assert all(c["because"] for c in document["candidates"])
    assert document["baseline"]["measurement"]["decode_tok_per_s"]["n"] == 2


def test_the_artifact_has_a_plan_and_a_report(run: Run) -> None:
    result = run(FakeWorkshop())
    plan: dict[str, Any] = json.loads((result.artifact / "plan.json").read_text())
    assert plan["recipe"]["name"] == plan["search"]["chosen"] == result.chosen.recipe.name
    assert plan["verdict"]["status"] == "pass"
    assert len(plan["sensitivity"]) == 9
    assert len(plan["because"]) >= 2
    assert len(plan["text"]["sha256"]) == 64
    assert plan["estimate"] is None  # this machine's ceilings are unknown
    assert "<svg" in (result.artifact / "report.html").read_text()


def test_stopped_and_started_again(run: Run) -> None:
    stopped = FakeWorkshop(interrupt_at="base")
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    done = set(stopped.built) - {"bf16"}
    assert done
    again = FakeWorkshop()
    result = run(again)
    timed = {c.recipe.name for c in result.candidates if c.measurement is not None}
    assert not (done - timed) & set(again.built), "what was judged is not judged again"
    whole = run(FakeWorkshop(), fresh=True)
    assert result.to_json() == whole.to_json()


def test_a_finished_search_keeps_quality_and_times_again(run: Run) -> None:
    first = run(FakeWorkshop())
    again = FakeWorkshop()
    seen: list[str] = []
    second = run(again, watch=lambda p: seen.append(p.detail))
    assert second.to_json() == first.to_json()
    assert not any("quality" in detail for detail in seen)
    timed = {c.recipe.name for c in first.candidates if c.measurement is not None}
    assert set(again.measured) == {"bf16", *timed}


def test_fresh_reads_nothing_old(run: Run) -> None:
    first, again = FakeWorkshop(), FakeWorkshop()
    run(first)
    run(again, fresh=True)
    assert "base" in again.built and again.built == first.built


def test_damaged_records_are_misses(run: Run, tmp_path: Path) -> None:
    first = run(FakeWorkshop())
    records = list((tmp_path / "cache" / "optimize").iterdir())
    assert records
    for record in records:
        record.write_bytes(record.read_bytes()[:-40])
    assert run(FakeWorkshop()).to_json() == first.to_json()


@pytest.mark.parametrize("change", ["seed", "kept_bits"])
def test_another_source_is_another_search(run: Run, change: str) -> None:
    run(FakeWorkshop())
    other = FakeWorkshop(seed=3) if change == "seed" else FakeWorkshop(kept_bits=8)
    result = run(other)
    assert {c.recipe.name for c in result.candidates} <= set(other.built) | {"mix:2%"}


def test_no_budget_left_is_an_error_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="comes nearest") as caught:
        run(FakeWorkshop(), budget=0.0)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out.hasten").exists()


def test_models_are_closed_whatever_happens(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = FakeWorkshop.build

    def watched(self: FakeWorkshop, recipe: Any) -> Any:
        made.append(build(self, recipe))
        return made[-1]

    monkeypatch.setattr(FakeWorkshop, "build", watched)
    run(FakeWorkshop())
    with pytest.raises(KeyboardInterrupt):
        run(FakeWorkshop(interrupt_at="mix:2%"), fresh=True)
    assert len(made) > 8
    assert all(model.closed for model in made)


@pytest.mark.parametrize("budget", [-0.01, float("nan"), float("inf")])
def test_budgets_that_mean_nothing(budget: float) -> None:
    with pytest.raises(UsageError):
        Aims(Budget(budget))


def test_unknown_goal() -> None:
    with pytest.raises(UsageError, match="speed"):
        Aims(goal="speed")  # type: ignore[arg-type]


def test_without_torch_the_plan_says_so(run: Run) -> None:
    result = run(FakeWorkshop())
    assert any("torch is not installed" in reason for reason in result.plan.because)
    assert all(c.recipe.method == "rtn" for c in result.candidates)


def test_with_torch_calibrated_integers_are_tried(run: Run) -> None:
    result = run(FakeWorkshop(can_calibrate=True, kept_bits=8))
    by_name = {c.recipe.name: c for c in result.candidates}
    assert by_name["w4-best"].verdict.kl_mean < by_name["w4-head8"].verdict.kl_mean
    mixture = by_name["mix:2%"]
    assert mixture.recipe.method == "gptq"
    plain = next(c for c in run(FakeWorkshop(kept_bits=8)).candidates if c.recipe.name == "mix:2%")
    assert mixture.passes
    assert mixture.weight_bytes <= plain.weight_bytes
    assert not any("torch" in reason for reason in result.plan.because)
    assert any("GPTQ" in reason for reason in result.plan.because)


def test_calibration_can_be_left_out(run: Run, tmp_path: Path, texts: dict[int, Text]) -> None:
    workshop = FakeWorkshop(can_calibrate=True)
    search = Search(workshop, Aims(Budget(0.02)), texts[16], Effort(tokens=TOKENS), calibrate=False)
    result = search.run(tmp_path / "out.hasten")
    assert "w4-best" not in [c.recipe.name for c in result.candidates]
    assert any("switched off" in reason for reason in result.plan.because)


def test_a_recipe_without_room_is_left_out_and_said(run: Run) -> None:
    built: list[str] = []

    class Small(FakeWorkshop):
        def build(self, recipe: Recipe) -> FakeModel:
            built.append(recipe.name)
            if recipe.name in ("w5-head8", "base"):
                raise MachineError("the weights take 16 GB, 4 GB are free")
            if recipe.name == "w5" and self.name == "lost":
                raise DeviceLost("the GPU stopped working")
            return super().build(recipe)

    found = run(Small())
    assert "w5-head8" not in [c.recipe.name for c in found.candidates] and found.candidates
    said = "the weights take 16 GB, 4 GB are free."
    assert {f"w5-head8 was not tried: {said}", f"No mixture was tried: {said}"} <= set(found.plan.because)
    assert built.count("base") == 1, "a map that does not fit is tried once"
    with pytest.raises(DeviceLost):
        run(Small(name="lost", seed=3))


def test_the_machine_is_looked_at_once(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look runs the drivers' own programs; the ceilings are asked for only where speed counts."""
    looks: list[None] = []
    monkeypatch.setattr("hasten.machine.probe.gpus", lambda: looks.append(None) or ())
    monkeypatch.setattr("hasten.machine.probe.load_or_measure", lambda *_: {"int8_tops": 1.5})
    workshop = Workshop(tiny_folder("llama"), EngineOptions(threads=1))
    assert workshop.machine(ceilings=False).int8_tops is None
    assert workshop.machine().int8_tops == workshop.machine().int8_tops == 1.5
    assert len(looks) == 1
