"""docs/records.py: what a record says of its goals; docs/prose_figures.py: figures inside sentences."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def page_maker(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def records() -> ModuleType:
    return page_maker("records")


@pytest.fixture(scope="module")
def prose(records: ModuleType) -> ModuleType:
    return page_maker("prose_figures")


def bar(**more: Any) -> dict[str, Any]:
    return {
        "name": "decode",
        "unit": "x",
        "figure": 1.5,
        "limit": 2.0,
        "at_least": True,
        "passed": False,
    } | more


def verdict(records: ModuleType, **more: Any) -> str:
    return str(records.goals({"bars": [bar(**more)]})[0].verdict)


def test_goals_are_missed_reached_or_not_measured(records: ModuleType) -> None:
    assert verdict(records) == "**missed**"
    assert verdict(records, figure=2.5, passed=True) == "reached"
    assert verdict(records, figure=None) == "**not measured**"
    assert verdict(records, figure=None, why="no GPU here") == "**not measured**: no GPU here"
    assert verdict(records, limit=None) == "no goal"
    assert "**missed**" in records.goals_table({"bars": [bar()]})


def test_disturbed_rounds_and_an_undecided_goal_are_shown(records: ModuleType) -> None:
    ratio = {"median": 1.9, "low": 1.6, "high": 2.2, "n": 7}
    shown = records.goals_table({"bars": [bar(ratio=ratio, disturbed=3, verdict="UNDECIDED", unit="tok/s")]})
    assert "| 1.90 [1.60, 2.20] x | 7, 3 disturbed | at least 2 x | **undecided** |" in shown


def test_a_goal_inside_the_interval_is_reached_by_the_median_alone(records: ModuleType) -> None:
    ratio = {"median": 2.1, "low": 1.2, "high": 2.4, "n": 9}
    details = {"budget": {"ratio": ratio}}
    name = "mix:1%: decode over uniform int8"
    found = records.goals({"bars": [bar(name=name, figure=2.1, passed=True)], "details": details})
    assert found[0].verdict == "reached by the median" and "[1.20, 2.40]" in found[0].shown


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "unknown"),
        (0.0, "0"),
        (1390.2, "1,390"),
        (98.62, "98.6"),
        (56.0001, "56.0"),
        (0.00058, "0.000580"),
        (99.97, "100"),
        (2.9e-9, "2.9e-9"),
        (-0.5, "-0.500"),
    ],
)
def test_figures_have_three_digits(records: ModuleType, value: float | None, said: str) -> None:
    assert records.figure(value) == said


def test_the_command_line_names_no_folder_of_the_machine(records: ModuleType) -> None:
    assert (
        records.command({"command": "a.py --model /tmp/x/m.gguf"}) == "python benchmarks/a.py --model m.gguf"
    )
    assert records.command({"command": "python benchmarks/gpu/b.py"}) == "python benchmarks/gpu/b.py"


def test_the_kind_of_processor_is_read_from_its_caches(records: ModuleType) -> None:
    machine = {"cpu": "AMD EPYC", "isa": ["avx2", "avx512"], "l1d_bytes": 49152, "cores": 2}
    assert records.machine({"machine": machine}) == "AMD EPYC, Zen 5, AVX-512, 2 cores"
    older = machine | {"isa": ["avx2"], "l1d_bytes": 32768}
    assert records.machine({"machine": older}) == "AMD EPYC, Zen 3 or older, AVX2, 2 cores"
    assert records.machine({"machine": "NVIDIA H200"}) == "NVIDIA H200"


def test_a_figure_in_a_sentence_is_the_records(prose: ModuleType) -> None:
    mark = "half zero: <!-- figure: us: wide, zeros / {} -->{}<!-- end --> us"
    found = prose.filled(mark.format("as it was", "1"))
    assert found != mark.format("as it was", "1") and prose.filled(found) == found
    assert prose.filled(mark.format("as it was", "")) != prose.filled(mark.format("pruned", ""))


@pytest.mark.parametrize("which", ["ms: wide", "us: wide, zeros / melted", "us: narrow / pruned"])
def test_a_figure_that_no_record_has(prose: ModuleType, which: str) -> None:
    with pytest.raises((KeyError, StopIteration)):
        prose.filled(f"<!-- figure: {which} -->1<!-- end -->")


def test_a_mark_without_an_end(prose: ModuleType) -> None:
    with pytest.raises(ValueError, match="mark"):
        prose.filled("<!-- figure: us: wide, zeros / pruned -->504 us")
