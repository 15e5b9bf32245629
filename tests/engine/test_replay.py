"""Replaying a trace: against a live engine on a tiny model, and against what can be said by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.cache.kv_folder import HEADER_BYTES
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.request import Request
from hasten.engine.trace import Trace, TraceModel, TraceRequest, TraceWriter, read_trace, replay
from hasten.errors import UsageError
from hasten.runtime.sampling import SamplingOptions

PAGE, BYTES = 32, 1000
POLICIES = ("lru", "lfu", "s3fifo", "cost")


def chats(seed: int, users: int, turns: int) -> list[list[list[int]]]:
    """What users say: a system prompt that some share, then turns of their own; [users][turns][tokens]."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(0, 262, length).tolist() for length in (150, 70, 45)]
    return [
        [
            [
                *(systems[min(int(rng.zipf(1.7)), 3) - 1] if turn == 0 else []),
                *rng.integers(0, 262, n).tolist(),
            ]
            for turn, n in enumerate(rng.integers(5, 90, turns))
        ]
        for _ in range(users)
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Time that passes by a millisecond each time somebody looks: what else this machine does is left out."""
    ticks = itertools.count()

    def now() -> float:
        return next(ticks) / 1000

    monkeypatch.setattr("time.perf_counter", now)
    return now


def live(
    model: Any, options: ServingOptions, path: Path, seed: int, clock: Any, users: int = 40
) -> tuple[float, float]:
    """Serve chats, three at a time, and record them: the engine's own (hit ratio, disk hit ratio)."""
    engine, writer = Engine(model, options), TraceWriter(path)
    described = TraceModel.of("tiny", model)
    rng = np.random.default_rng(seed)
    left = [(chat, []) for chat in chats(seed, users, turns=4)]
    pause = False
    running: dict[str, tuple[Any, Request, list[int], float]] = {}
    while left or running:
        while left and len(running) < 3 and not (running and pause):
            chat, said = left.pop(int(rng.integers(len(left))))
            prompt = (*said, *chat[0])
            sampling = SamplingOptions(temperature=1.0, seed=len(left), ignore_eos=True)
            request = Request(prompt, max_new_tokens=int(rng.integers(1, 40)), sampling=sampling)
            arrived = clock()
            running[engine.add(request)] = ((chat[1:], list(prompt)), request, [], arrived)
        # pages on their way from disk arrive first: who waits for how long, and so what is found where, would
        # else depend on the machine
        while any(engine._keeper.is_reading(one) for one in engine._scheduler.waiting):
            engine._keeper.wait_for_disk(0.01)
        outputs = engine.step()
        if engine._keeper._ahead is not None:  # pages that wait to be written are found too
            engine._keeper._ahead.disk.flush()
        for output in outputs:
            (chat, said), request, tokens, arrived = running[output.request_id]
            tokens.extend(output.token_ids)
            if output.usage is not None:
                del running[output.request_id]
                writer.add(described, request, [tokens], output.usage, arrived)
                if chat:
                    left.append((chat, said + tokens))
        pause = bool(running) and (
            pause or bool(rng.random() < 0.02)
        )  # all fall silent: the engine tidies up
        while not running and engine.tidy():
            for _ in range(300):
                clock()
    stats = engine.stats()
    engine.close()
    writer.close()
    total = stats.prefix_query_tokens
    return stats.prefix_hit_tokens / total, stats.disk_hit_tokens / total


def opened(folder: Path, recipe: str) -> Any:
    """57 pages, for a working set of several hundred: the policy decides what is found."""
    return hasten.load(folder, recipe, options=EngineOptions(threads=1, context=608, max_sequences=3))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("recipe", ["w8", "bf16"])  # on AMX the engine settles answers of the first
def test_a_replay_hits_as_the_engine_did(
    tiny_folder: Callable[..., Path], tmp_path: Path, clock: Any, policy: Any, recipe: str
) -> None:
    """Within 1 point, the bar; another size is farther away."""
    model = opened(tiny_folder("qwen3"), recipe)
    ratio, _ = live(model, ServingOptions(cache_policy=policy, speculate=False), tmp_path / "t", 3, clock)
    trace = read_trace(tmp_path / "t")
    ram = trace.model.kv_pages * trace.model.page_bytes
    result = replay(trace, policy, ram)
    print(f"{policy} {recipe}: live {ratio:.4f}, replayed {result.hit_ratio:.4f}")
    assert abs(result.hit_ratio - ratio) < 0.01
    assert replay(trace, policy, ram // 2).hit_ratio < ratio - 0.03
    assert replay(trace, policy, ram * 8).hit_ratio > ratio + 0.03
    assert result.ttft_saved_s > 0 and result.disk_hit_ratio == 0


def test_the_disk_tier_is_replayed_too(
    tiny_folder: Callable[..., Path], tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hasten.engine.keep._LEAST_WAIT_S", 20.0)  # the disk is always in time
    monkeypatch.setattr("hasten.engine.keep._MOST_WAIT_S", 20.0)
    model = opened(tiny_folder("qwen3"), "bf16")
    limit = 400 * (model.executor.page_bytes + HEADER_BYTES)
    serving = ServingOptions(speculate=False, kv_disk=tmp_path / "kv", kv_disk_gb=limit / 1e9)
    ratio, disk_ratio = live(model, serving, tmp_path / "t", 4, clock, users=60)
    trace = read_trace(tmp_path / "t")
    result = replay(trace, "lru", trace.model.kv_pages * trace.model.page_bytes, limit)
    print(f"live {ratio:.4f} {disk_ratio:.4f}, replayed {result.hit_ratio:.4f} {result.disk_hit_ratio:.4f}")
    assert disk_ratio > 0.05
    assert abs(result.hit_ratio - ratio) < 0.01 and abs(result.disk_hit_ratio - disk_ratio) < 0.01


def made(
    prompt: list[int], start: float, end: float, output: tuple[int, ...] = (), **more: Any
) -> TraceRequest:
    marks = [np.array(tokens, np.int32) for tokens in (prompt, output)]
    fields = {"cached_tokens": 0, "prefill_s": 0.01 * len(prompt), "reads": True, **more}
    return TraceRequest(start, start, end, marks[0], (marks[1],), **fields)


def trace_of(*requests: TraceRequest, shares: bool = True) -> Trace:
    return Trace(TraceModel("hand", PAGE, BYTES, 10, 4, shares, 1.0, 0.01), requests)


def test_what_can_be_said_by_hand() -> None:
    text = list(range(100))
    again = trace_of(made(text, 0, 1), made(text, 2, 3), made(text[:70] + [7] * 30, 4, 5))
    result = replay(again, "lru", 100 * BYTES)
    assert result.hit_tokens == 99 + 70 and result.prompt_tokens == 300 and result.requests == 3
    assert result.ttft_saved_s == pytest.approx(0.01 * 169) and result.ttft_saved_ms == pytest.approx(
        563.3, abs=0.1
    )
    assert replay(again, "lru", 100 * BYTES, seconds_per_token=1.0).ttft_saved_s == pytest.approx(169)
    assert replay(trace_of(made(text, 0, 1), made(text, 2, 3, reads=False)), "lru", 10**6).hit_tokens == 0
    assert replay(again, "lru", 3 * BYTES).hit_tokens == 0, "no prompt fits"


@pytest.mark.parametrize("shares", [True, False])
def test_the_next_turn_finds_the_answer(shares: bool) -> None:
    text, answer = list(range(50)), tuple(range(100, 240))
    turn = made([*text, *answer, 5, 6, 7], 9, 10)
    talk = trace_of(made(text, 0, 1, answer), turn, shares=shares)
    assert replay(talk, "lru", 10**6).hit_tokens == (189 if shares else 190)
    at_once = trace_of(made(text, 0, 1, answer), made([*text, *answer, 5, 6, 7], 1.001, 10), shares=False)
    assert replay(at_once, "lru", 10**6).hit_tokens < 180, "there was no time to compute the answer as prompt"


def test_disk_holds_what_memory_does_not() -> None:
    one, two = list(range(320)), list(range(1000, 1320))
    turns = trace_of(*(made(text, at, at + 0.5) for at, text in enumerate([one, two] * 3)))
    without = replay(turns, "lru", 12 * BYTES)
    with_disk = replay(turns, "lru", 12 * BYTES, 100 * (BYTES + HEADER_BYTES))
    assert without.hit_tokens < 400 < 1100 < with_disk.hit_tokens
    assert 0 < with_disk.disk_hit_tokens <= with_disk.hit_tokens
    assert with_disk.ttft_saved_s < with_disk.hit_tokens * 0.01


def test_less_memory_than_a_page_is_refused() -> None:
    with pytest.raises(UsageError, match="no page"):
        replay(trace_of(made([1, 2], 0, 1)), "lru", 10)
