"""Logits keep their bits whatever the chunk, the company, the threads and the pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import kernel_twins as twin
import numpy as np
import pytest

import hasten
from executor_step import hidden_after
from hasten import _native
from hasten.core import EngineOptions
from hasten.engine.model import LanguageModel
from hasten.runtime.pages import CachedSequence

# gemma3: windows, two norms a block, tied head; phi3: LongRoPE, whose threshold of 16 tokens all texts pass
EACH_KIND = [
    ("qwen3", "w4-kv8"),
    ("gemma3", "bf16-kv8"),
    ("gemma3-capped", "w5-head8"),
    ("phi3", "w6"),
    ("llama-odd", "bf16"),
    ("olmo2", "w4"),
]
CASES = twin.fewer([*EACH_KIND, ("qwen3", "bf16"), ("qwen3", "w4"), ("gemma3", "w8")], EACH_KIND)
TEXT = np.random.default_rng(11).integers(0, 262, 83, dtype=np.int32)
RAGGED = [TEXT[:70], TEXT[5:6], TEXT[10:57], TEXT[30:63], TEXT[1:3]]


@pytest.fixture(scope="module")
def load(tiny_folder: Callable[..., Path]) -> Iterator[Callable[..., LanguageModel]]:
    """(tiny model, recipe, options) -> the model, packed once for each pair."""
    models: dict[tuple[str, str, EngineOptions], LanguageModel] = {}

    def get(name: str, recipe: str, **options: int) -> LanguageModel:
        key = (name, recipe, EngineOptions(**{"threads": 1, "max_sequences": 8, **options}))
        if key not in models:
            models[key] = hasten.load(tiny_folder(name), recipe, options=key[2])
        return models[key]

    yield get
    for model in models.values():
        model.close()


def churn(model: LanguageModel, seed: int) -> list[CachedSequence]:
    """Fill the cache with other texts and give some of it back: free pages in no order, none clean."""
    rng = np.random.default_rng(seed)
    held = [CachedSequence() for _ in range(12)]
    for sequence in held:
        hidden_after(model.executor, [(sequence, rng.integers(0, 262, rng.integers(1, 70), dtype=np.int32))])
    for at in rng.permutation(12)[:9]:
        model.executor.pool.truncate(held[at], 0)
    return held


def release(model: LanguageModel, sequences: list[CachedSequence]) -> None:
    for sequence in sequences:
        model.executor.pool.truncate(sequence, 0)


@pytest.mark.parametrize("name, recipe", CASES)
def test_chunks(isa: str, load: Callable[..., LanguageModel], name: str, recipe: str) -> None:
    whole = load(name, recipe).logits(TEXT)
    assert np.isfinite(whole).all()
    for chunk in twin.fewer((1, 3, 7, 64), (3, 64)):
        logits = load(name, recipe, prefill_chunk=chunk).logits(TEXT)
        np.testing.assert_array_equal(logits, whole, err_msg=f"chunks of {chunk}")


@pytest.mark.parametrize("name, recipe", CASES)
def test_threads(isa: str, load: Callable[..., LanguageModel], name: str, recipe: str) -> None:
    one = load(name, recipe).logits(TEXT)
    for threads in twin.fewer((2, 3), (3,)):
        np.testing.assert_array_equal(load(name, recipe, threads=threads).logits(TEXT), one)


@pytest.mark.parametrize("name, recipe", CASES)
def test_pages(isa: str, load: Callable[..., LanguageModel], name: str, recipe: str) -> None:
    """Scrambled pages that hold older texts."""
    model = load(name, recipe)
    fresh = model.logits(TEXT)
    free = model.executor.pool.free
    for seed in range(2):
        held = churn(model, seed)
        np.testing.assert_array_equal(model.logits(TEXT), fresh)
        release(model, held)
    assert model.executor.pool.free == free


@pytest.mark.parametrize("name, recipe", CASES)
def test_company(isa: str, load: Callable[..., LanguageModel], name: str, recipe: str) -> None:
    """Prompts of 70, 1, 47, 33 and 2 tokens in one step, then the rest of each."""
    model = load(name, recipe)
    executor = model.executor
    alone = [model.hidden(text) for text in RAGGED]
    sequences = [CachedSequence() for _ in RAGGED]
    for sequence, text in zip(sequences, RAGGED, strict=True):
        sequence.kv_class = executor.kv_class(len(text), True)
    # all but the last token of each text together, the first text in two pieces
    parts = [RAGGED[0][:41], *(text[:-1] for text in RAGGED[1:])]
    batch = [(s, part) for s, part in zip(sequences, parts, strict=True) if len(part)]
    together = hidden_after(executor, batch)
    for out, (sequence, part) in zip(together, batch, strict=True):
        which = next(i for i, s in enumerate(sequences) if s is sequence)
        np.testing.assert_array_equal(out, alone[which][: len(part)], err_msg=f"text {which}")
    rest = [(s, t[s.length :]) for s, t in zip(sequences, RAGGED, strict=True)][::-1]
    last = hidden_after(executor, rest, last=1)
    np.testing.assert_array_equal(np.concatenate(last[::-1]), np.stack([hidden[-1] for hidden in alone]))
    release(model, sequences)


@pytest.mark.parametrize("rows", [1, 2, 5, 17, 70])
@pytest.mark.parametrize("recipe", ["bf16", "w4"])
def test_rows_of_the_head(isa: str, load: Callable[..., LanguageModel], recipe: str, rows: int) -> None:
    """263 entries of vocabulary: the last panel is not whole."""
    model = load("qwen3", recipe)
    hidden = model.hidden(TEXT)
    whole = model.logits_of(hidden)
    assert whole.shape == (len(TEXT), 263)
    np.testing.assert_array_equal(model.logits_of(hidden[3 : 3 + rows]), whole[3 : 3 + rows])


# int8 activations round: where two instruction sets differ in a float's last bit, some fall the other way
@pytest.mark.parametrize(
    "name, recipe, most", [("qwen3", "bf16", 0.03), ("gemma3", "bf16", 0.1), ("qwen3", "w4", 0.2)]
)
def test_instruction_sets_agree(
    load: Callable[..., LanguageModel], name: str, recipe: str, most: float
) -> None:
    before, logits = _native.isa(), []
    for isa in twin.ISAS:
        _native.use_isa(isa)
        logits.append(load(name, recipe).logits(TEXT))
    _native.use_isa(before)
    for other in logits[1:]:
        assert np.abs(other - logits[0]).max() < most * logits[0].std()
        assert (other.argmax(-1) == logits[0].argmax(-1)).mean() > 0.95
