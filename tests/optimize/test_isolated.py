"""A search in a process of its own: crashes, hangs, signals, and what comes through."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.compress.result import Observer, Progress
from hasten.errors import BudgetError, MachineError
from hasten.optimize.isolated import isolated

Fault = Callable[[], object]


def search(tell: Observer, broken: dict[str, str], faults: dict[str, Fault]) -> list[str]:
    """Tries three recipes; each may have a fault. Returns those that were tried to the end."""
    done = []
    for name in ("w8", "mix:1%", "w4"):
        if name in broken:
            continue
        tell(Progress("recipes", f"{name}: quality", 1, 8))
        faults.get(name, lambda: None)()
        tell(Progress("recipes", name, candidate="judged"))
        done.append(name)
    return [*done, *broken.values()]


def crash() -> None:
    faulthandler.disable()  # pytest's would print where
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(600)


def run(faults: dict[str, Fault], seen: list[Progress], silent_s: float = 30.0) -> list[str]:
    return isolated(lambda tell, broken: search(tell, broken, faults), seen.append, silent_s)


def test_what_comes_out_is_what_came_in() -> None:
    seen: list[Progress] = []
    assert run({}, seen) == ["w8", "mix:1%", "w4"]
    assert [one.detail for one in seen if one.candidate] == ["w8", "mix:1%", "w4"]


def test_a_recipe_that_crashes_is_given_up_and_the_search_goes_on() -> None:
    seen: list[Progress] = []
    assert run({"mix:1%": crash}, seen) == ["w8", "w4", "was killed by SIGSEGV"]
    assert any("mix:1% is given up: the process was killed by SIGSEGV" in one.detail for one in seen)


def test_a_recipe_that_hangs_is_killed() -> None:
    began = time.monotonic()
    assert run({"w4": hang}, [], silent_s=0.5) == ["w8", "mix:1%", "gave no sign of life for 0.5 s"]
    assert time.monotonic() - began < 20


def test_several_recipes_may_crash() -> None:
    assert run({"w8": crash, "w4": lambda: os._exit(3)}, []) == [
        "mix:1%", "was killed by SIGSEGV", "ended with code 3"
    ]  # fmt: skip


def test_a_crash_outside_of_any_recipe_ends_it_with_a_reason() -> None:
    def before(tell: Observer, broken: dict[str, str]) -> None:
        tell(Progress("reference", "opening the model"))
        crash()

    with pytest.raises(MachineError, match="SIGSEGV while at reference: opening the model") as caught:
        isolated(before, lambda _: None)
    assert caught.value.hint


def test_errors_come_through_with_their_hints() -> None:
    def fails(tell: Observer, broken: dict[str, str]) -> None:
        raise BudgetError("nothing fits", hint="allow more")

    with pytest.raises(BudgetError, match="nothing fits") as caught:
        isolated(fails, lambda _: None)
    assert (caught.value.hint, caught.value.exit_code) == ("allow more", 3)


def test_a_fault_of_ours_is_named() -> None:
    def fails(tell: Observer, broken: dict[str, str]) -> None:
        raise KeyError("lost")

    with pytest.raises(RuntimeError, match="KeyError: 'lost'"):
        isolated(fails, lambda _: None)


def children() -> set[str]:
    """Processes that this one has started and that are not gone."""
    return {one for each in Path("/proc/self/task").glob("*/children") for one in each.read_text().split()}


def test_ctrl_c_in_the_parent_ends_the_child() -> None:
    started: list[Progress] = []
    before = children()  # other tests' servers and helpers

    def stop(one: Progress) -> None:
        started.append(one)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolated(lambda tell, broken: search(tell, broken, {"w8": hang}), stop)
    assert started
    assert children() <= before


def test_large_results_come_whole() -> None:
    assert len(isolated(lambda tell, broken: b"x" * 5_000_000, lambda _: None)) == 5_000_000
