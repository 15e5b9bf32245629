"""Hasten itself, as a worker process runs it: timed like the peers, or stepped under many chats."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.bench.figures import Answer, Sample
from hasten.bench.peers import EngineSpec
from hasten.core import Workload
from hasten.speed.cost import Cost

if TYPE_CHECKING:
    from hasten.engine.engine import Engine
    from hasten.engine.model import LanguageModel


def prepare(spec: EngineSpec) -> str:
    """Nothing to prepare: packing is part of loading, or done before, in an artifact."""
    return spec.source


def load(spec: EngineSpec, prepared: str) -> Subject | HastenEngine:
    """`hasten.load` of the source; the format is the recipe, and empty keeps the source's own values.

    For chats an Engine on an artifact, with the options in `format`: `prefix_cache=off,kv_gb=0.5`. Those of
    ServingOptions are switches, and kv_gb is EngineOptions's.
    """
    if spec.chats:
        return HastenEngine(spec, prepared)
    import hasten
    from hasten.core import EngineOptions
    from hasten.engine.model import load as load_model

    options = EngineOptions(
        threads=spec.threads,
        context=spec.context,
        max_sequences=max(spec.batch, EngineOptions.max_sequences if spec.device == "cpu" else 1),
        device=spec.device,
        gpu_memory=spec.gpu_memory,
        tensor_parallel=spec.tensor_parallel,
    )  # keeping the model would write to the disk while others are timed
    model = load_model(prepared, recipe=spec.format or None, options=options, store=False)
    return Subject(model=model, version=hasten.__version__, format=model.recipe.name)


@dataclass
class Subject:
    """Our engine behind the peers' interface, and what only it can answer: tokens, text, cost."""

    model: LanguageModel
    version: str
    format: str
    notes: str = ""

    @property
    def weight_bytes(self) -> int | None:
        """Bytes of the linear weights one token reads."""
        return self.model.weight_bytes

    def generate(self, prompts: list[list[int]], output: int) -> Sample:
        from hasten.bench.measure import run_once

        return run_once(self.model, prompts, output)

    def encode(self, text: str) -> list[int]:
        return list(self.model.tokenizer.encode(text, add_special=False))

    def decode(self, ids: list[int]) -> str:
        return str(self.model.tokenizer.decode(ids))

    def cost(self, workload: Workload) -> Cost:
        from hasten.bench.measure import model_cost

        return model_cost(self.model, workload)

    def about(self) -> dict[str, Any]:
        return {
            "model": self.model.name,
            "bits_per_weight": self.model.bits_per_weight,
            "device": self.model.device,
            "device_because": self.model.device_because,
        }


class HastenEngine:
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
        self.engine.close()
        self.model.close()
