"""An engine whose machine runs short of memory: fewer run, cached pages go, no answer changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.model import LanguageModel
from hasten.engine.request import Output, Request
from hasten.machine.memory import LOOK_S, MemoryRoom
from hasten.runtime.executor import Executor
from hasten.runtime.sampling import SamplingOptions

RESERVE_PAGES = 4
Machines = Callable[[], "Machine"]


class Machine:
    """So many pages' worth of memory, of which the model's pages and other programs take some."""

    def __init__(self, folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages, self.others, self.now = 1 << 20, 0, 0.0
        self.model: LanguageModel | None = None
        self.page = 3 * 2 * 2 * 32 * 64  # layers, keys and values, heads, tokens, bytes
        room = MemoryRoom(self.available, RESERVE_PAGES * self.page, lambda: self.now)
        monkeypatch.setattr(f"hasten.runtime.{device}.memory_room", lambda: room)
        options = EngineOptions(threads=1, context=256, max_sequences=4, prefill_chunk=64, device=device)
        self.model = hasten.load(folder, "w8", options=options, store=False)
        assert self.model.executor.page_bytes == self.page

    @property
    def executor(self) -> Executor:
        assert self.model is not None
        return self.model.executor

    def available(self) -> int:
        held = 0 if self.model is None else self.executor.pool.held_bytes()
        return (self.pages - self.others) * self.page - held


@pytest.fixture(params=["cpu", "reference"])
def machine(
    request: pytest.FixtureRequest, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Machine:
    return Machine(tiny_folder("llama"), request.param, monkeypatch)


def requests(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    prompts = [[int(t) for t in rng.integers(0, 262, rng.integers(20, 150))] for _ in range(count)]
    return [Request(prompt, 40, SamplingOptions(ignore_eos=True)) for prompt in prompts]


def answers(
    machine: Machine, asked: list[Request], each: Callable[[int], None] = lambda step: None
) -> tuple[list[list[int]], list[Output], int]:
    """Token ids and last output of each request, and preemptions; `each` is called before each step."""
    assert machine.model is not None
    engine = machine.model.engine(ServingOptions(speculate=False))
    tokens: dict[str, list[int]] = {engine.add(one): [] for one in asked}
    ends: dict[str, Output] = {}
    step = 0
    while engine.busy:
        each(step)
        step += 1
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ends[output.request_id] = output
    preempted = engine.stats().preemptions
    engine.close()
    return list(tokens.values()), [ends[name] for name in tokens], preempted


def test_answers_do_not_change_and_memory_is_kept(machine: Machine) -> None:
    asked = requests(10)
    expected, _, _ = answers(machine, asked)
    least: list[int] = []

    def squeeze(step: int) -> None:
        """Others take memory and give it back, at most what is free above the reserve in a second."""
        machine.now += LOOK_S
        wanted = (0, 5, 12, 3)[step // 12 % 4]
        free = machine.available() // machine.page - RESERVE_PAGES
        machine.others = min(wanted, machine.others + max(0, free) + 2)
        least.append(machine.available())

    machine.pages, machine.now = 24, LOOK_S
    machine.executor.pool.look()
    found, ends, preempted = answers(machine, asked, squeeze)
    assert found == expected and {end.finish_reason for end in ends} == {"length"}
    assert preempted > 0, "memory was short"
    assert min(least) >= 0


def test_one_that_cannot_go_on_fails_alone_and_says_why(machine: Machine) -> None:
    asked = requests(3, seed=1)
    expected, _, _ = answers(machine, asked)
    machine.pages, machine.others = 24, 24

    def relent(step: int) -> None:
        machine.now += LOOK_S
        if step == 1:
            machine.others = 0

    found, ends, _ = answers(machine, asked, relent)
    assert ends[0].finish_reason == "error" and "free pages of 32 tokens are too few" in ends[0].error
    assert found[1:] == expected[1:]


def test_an_idle_engine_gives_its_cache_back(machine: Machine) -> None:
    assert machine.model is not None
    machine.pages = 60
    pool = machine.executor.pool
    with machine.model.engine(ServingOptions()) as engine:
        for request in requests(6):
            for _ in engine.stream(request):
                pass
        cached = engine.stats().kv_pages_cached
        assert cached > 10 and engine.holds_memory
        machine.now, machine.others = machine.now + LOOK_S, 60 - cached
        engine.spare_memory()
        assert machine.available() >= RESERVE_PAGES * machine.page
        machine.now, machine.others = machine.now + LOOK_S, 60
        engine.spare_memory()
        assert engine.stats().kv_pages_cached == 0 and pool.held_bytes() == 0 and not engine.holds_memory
