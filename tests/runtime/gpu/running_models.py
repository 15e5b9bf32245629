"""Tiny models behind the engine, as the tests of the GPU's executor run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from hasten.core import EngineOptions, Recipe, ServingOptions
from hasten.engine import keep
from hasten.engine.model import LanguageModel, load_packed
from hasten.engine.request import Request
from hasten.models.source import Source
from hasten.runtime.sampling import SamplingOptions
from hasten.weights.packed import pack_model

BF16 = 0.03  # of the logits' spread: two ways of rounding activations
FP8 = 0.06  # e4m3 has 3 bits behind the first; one sequence is decoded without rounding to it, a prompt with
GREEDY = SamplingOptions(ignore_eos=True)


@contextmanager
def running(
    source: Source, device: str = "cuda", recipe: str = "bf16", **options: Any
) -> Iterator[LanguageModel]:
    wanted = {"threads": 1, "context": min(512, source.config.context), "device": device}
    model = load_packed(
        pack_model(source, Recipe.parse(recipe), 1), source, EngineOptions(**(wanted | options))
    )
    try:
        yield model
    finally:
        model.close()


def answers(
    model: LanguageModel, requests: Sequence[Request], stats: list[Any] | None = None, **options: Any
) -> list[list[int]]:
    """Tokens of each request, all run together; `stats` gets the engine's."""
    found: dict[str, list[int]] = {str(i): [] for i in range(len(requests))}
    named = [Request(**{**vars(one), "id": str(i)}) for i, one in enumerate(requests)]
    with model.engine(ServingOptions(**options)) as engine:
        for output in engine.run(named):
            found[output.request_id] += output.token_ids
        if stats is not None:
            stats.append(engine.stats())
    return list(found.values())


def is_greedy(
    model: LanguageModel, prompt: Sequence[int], tokens: Sequence[int], rounding: float = BF16
) -> bool:
    """Whether each token has the largest logit after those before it, or ties with it within rounding.

    A token drawn blindly falls short by 2 to 3 times the spread.
    """
    found = model.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    short = found.max(1) - np.take_along_axis(found, np.array(tokens)[:, None], 1)[:, 0]
    return bool((short < 10 * rounding * found.std()).all() and np.median(short) == 0)


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages from disk are waited for, however busy the machine is."""
    for name in ("_LEAST_WAIT_S", "_MOST_WAIT_S"):
        monkeypatch.setattr(keep, name, 30.0)
