"""A GPU that is lost in mid-stream: streams end with an error, the server is not ready, nothing hangs.

The GPU's executor runs in plain torch on a CPU here; the fault is raised where CUDA would raise it.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running_server import serving

from hasten.core import EngineOptions
from hasten.engine.async_engine import AsyncEngine, EngineClosed
from hasten.engine.model import LanguageModel, load_packed
from hasten.engine.request import Request
from hasten.errors import MachineError
from hasten.models.open import open_model
from hasten.runtime.executor import choose_device
from hasten.runtime.gpu.plain import PlainStep
from hasten.runtime.sampling import SamplingOptions
from hasten.serve import pool
from hasten.serve.options import ServeOptions
from hasten.weights.packed import pack_model

FOREVER = SamplingOptions(ignore_eos=True)
FAULT = "CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA to enable assertions."


@pytest.fixture
def loaded(tiny_folder: Callable[..., Path]) -> Callable[[], LanguageModel]:
    source = open_model(tiny_folder("qwen3"))
    packed = pack_model(source, _bf16(), 1)
    options = EngineOptions(threads=1, context=256, max_sequences=4, device="torch")
    return lambda: load_packed(packed, source, options)


def _bf16() -> Any:
    from hasten.core import Recipe

    return Recipe.parse("bf16")


@pytest.fixture
def pull(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set: from then on every step fails as it does without its GPU."""
    is_lost, run = threading.Event(), PlainStep.run

    def step(self: PlainStep, *arguments: Any) -> Any:
        if is_lost.is_set():
            raise RuntimeError(FAULT)
        return run(self, *arguments)

    monkeypatch.setattr(PlainStep, "run", step)
    return is_lost


def test_a_stream_ends_with_what_happened_and_what_to_do(
    loaded: Callable[[], LanguageModel], pull: threading.Event
) -> None:
    stream = loaded().stream([5, 6, 7], 100, FOREVER)
    next(stream)
    pull.set()
    with pytest.raises(MachineError, match=r"the GPU stopped working: CUDA error.*failure$") as lost:
        list(stream)
    assert lost.value.hint and "nvidia-smi" in lost.value.hint


def test_what_a_lost_gpu_holds_is_never_freed(
    loaded: Callable[[], LanguageModel], pull: threading.Event
) -> None:
    """torch would end the process: a pinned tensor's end asks CUDA for an event."""
    model: Any = loaded()
    executor, stream = weakref.ref(model.executor), model.stream([5, 6, 7], 100, FOREVER)
    next(stream)
    pull.set()
    with pytest.raises(MachineError):
        list(stream)
    del stream
    model.close()
    del model
    gc.collect()
    assert executor() is not None


def test_every_stream_ends_and_the_engine_takes_nothing_new(
    loaded: Callable[[], LanguageModel], pull: threading.Event
) -> None:
    async def told(engine: AsyncEngine, name: str) -> str:
        with pytest.raises(EngineClosed) as end:
            async for _ in engine.stream(Request((5, 6, 7), 200, FOREVER, id=name)):
                pull.set()
        return end.value.message

    async def main() -> None:
        engine = AsyncEngine(loaded())
        found = await asyncio.wait_for(asyncio.gather(*(told(engine, str(i)) for i in range(3))), 30)
        assert all("the GPU stopped working" in message for message in found), found
        assert engine.failed
        await asyncio.wait_for(engine.close(), 30)

    asyncio.run(main())


def test_a_server_says_that_it_is_not_ready(
    loaded: Callable[[], LanguageModel], pull: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load that follows fails, as CUDA does for the rest of a process; the server lives and says so."""
    monkeypatch.setattr(pool, "_LOOK_S", 60.0)
    loads: list[str] = []

    def load(ref: str) -> Any:
        loads.append(ref)
        if len(loads) == 2:
            raise MachineError("no usable GPU here: CUDA error: unspecified launch failure")
        model = loaded()
        return model, AsyncEngine(model)

    with serving(ServeOptions(port=0, log=False), {"a": None}, load) as server:  # type: ignore[dict-item]
        assert server.ask("/ready").status == server.ask("/health").status == 200
        pull.set()
        body = {"model": "a", "prompt": "hello", "max_tokens": 8}
        reply = server.ask("/v1/completions", body)
        assert (reply.status, reply.error["code"]) == (503, "engine_stopped")
        assert "the GPU stopped working" in reply.error["message"]
        assert server.ask("/ready").status == 503
        again = server.ask("/v1/completions", body)
        assert again.status == 503 and "cannot be loaded: no usable GPU" in again.error["message"]
        assert server.ask("/ready").status == 503 and len(loads) == 2
        health = server.ask("/health")  # a supervisor starts the process again
        assert (health.status, health.json) == (503, {"status": "device lost"})


def test_a_server_that_goes_on_elsewhere_is_well_again(
    loaded: Callable[[], LanguageModel], pull: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_LOOK_S", 60.0)

    def load(ref: str) -> Any:
        pull.clear()
        model = loaded()
        return model, AsyncEngine(model)

    with serving(ServeOptions(port=0, log=False), {"a": None}, load) as server:  # type: ignore[dict-item]
        body = {"model": "a", "prompt": "hello", "max_tokens": 8}
        pull.set()
        assert server.ask("/v1/completions", body).status == 503
        assert server.ask("/health").json == {"status": "device lost"}
        assert server.ask("/v1/completions", body).status == 200
        assert server.ask("/health").status == server.ask("/ready").status == 200


def test_auto_goes_on_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.runtime.gpu import driver

    def lost() -> None:
        raise MachineError("no usable GPU here: unspecified launch failure (CUDA error 719)")

    monkeypatch.setattr(driver, "find_gpu", lost)
    assert choose_device("auto") == ("cpu", "no usable GPU here: unspecified launch failure (CUDA error 719)")
