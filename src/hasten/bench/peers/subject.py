"""Hasten itself, as the worker process runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.bench.peers import EngineSpec
from hasten.bench.sample import Sample
from hasten.core import Workload
from hasten.speed.cost import Cost

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel


def prepare(spec: EngineSpec) -> str:
    """Nothing to prepare: packing is part of loading, or done before, in an artifact."""
    return spec.source


def load(spec: EngineSpec, prepared: str) -> Subject:
    """`hasten.load` of the source, with the format as the recipe; empty keeps the source's own."""
    import hasten
    from hasten.engine.model import load as load_model

    model = load_model(  # keeping it would write to the disk while others are timed
        prepared, recipe=spec.format or None, threads=spec.threads, context=spec.context, store=False
    )
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
        """See `peers.Engine`."""
        from hasten.bench.measure import run_once

        return run_once(self.model, prompts, output)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special ones."""
        return list(self.model.tokenizer.encode(text, add_special=False))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self.model.tokenizer.decode(ids))

    def cost(self, workload: Workload) -> Cost:
        """What the workload asks of the machine with this model."""
        from hasten.bench.measure import model_cost

        return model_cost(self.model, workload)

    def about(self) -> dict[str, Any]:
        """Name and weights of the model."""
        return {"model": self.model.name, "bits_per_weight": self.model.bits_per_weight}

    def close(self) -> None:
        """See `peers.Engine`."""
        self.model.close()
