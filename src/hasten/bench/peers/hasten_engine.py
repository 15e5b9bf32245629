"""Our own Engine in a process of its own, stepped by its owner: what a server adds is measured against it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hasten.bench.load import Answer
from hasten.bench.peers import EngineSpec

if TYPE_CHECKING:
    from hasten.engine.engine import Engine
    from hasten.engine.model import LanguageModel


def prepare(spec: EngineSpec) -> str:
    """Nothing to prepare."""
    return spec.source


def load(spec: EngineSpec, prepared: str) -> HastenEngine:
    """`hasten.load` of the source (an artifact), and an Engine with the options in `format`.

    `format` is a list of options, `prefix_cache=off,kv_gb=0.5`: those of ServingOptions are switches, and
    kv_gb is EngineOptions's.
    """
    return HastenEngine(spec, prepared)


class HastenEngine:
    """A model and its Engine."""

    def __init__(self, spec: EngineSpec, prepared: str) -> None:
        import hasten
        from hasten.core import EngineOptions, ServingOptions
        from hasten.engine.engine import Engine
        from hasten.engine.model import load as load_model

        given = dict(part.split("=") for part in spec.format.split(",") if part)
        kv_gb = float(given.pop("kv_gb")) if "kv_gb" in given else None
        switches: dict[str, Any] = {name: value == "on" for name, value in given.items()}
        options = EngineOptions(threads=spec.threads, context=spec.context, kv_gb=kv_gb)
        self.model: LanguageModel = load_model(prepared, options=options)
        self.engine: Engine = Engine(self.model, ServingOptions(**switches))
        self.version = hasten.__version__
        self.format = self.model.recipe.name
        self.weight_bytes: int | None = self.model.weight_bytes
        self.notes = spec.format

    def chats(self, prompts: list[list[int]], output: int) -> list[Answer]:
        """All prompts at once, greedily, `output` tokens each, past end tokens."""
        from hasten.engine.request import Request
        from hasten.runtime.sampling import SamplingOptions

        start = time.perf_counter()
        sampling = SamplingOptions(ignore_eos=True)
        ids = [self.engine.add(Request(tuple(p), output, sampling)) for p in prompts]
        times: dict[str, list[float]] = {name: [] for name in ids}
        cached: dict[str, int] = {}
        while self.engine.busy:
            for news in self.engine.step():
                times[news.request_id].extend([time.perf_counter() - start] * len(news.token_ids))
                if news.usage is not None:
                    cached[news.request_id] = news.usage.cached_tokens
        return [
            Answer(
                times[name][0],
                times[name][-1],
                len(times[name]),
                finish_reason="length",
                prompt_tokens=len(prompt),
                cached_tokens=cached.get(name),
            )
            for name, prompt in zip(ids, prompts, strict=True)
        ]

    def close(self) -> None:
        """Free engine and model."""
        self.engine.close()
        self.model.close()
