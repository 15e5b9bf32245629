"""Memory that a model takes while it runs, by what takes it."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.core import ModelSpec, Recipe
from hasten.speed.cost import page_bytes, stored_bytes
from hasten.speed.forecast import CHUNK, Case

PAGE = 32
"""Tokens of a page of keys and values (native/kv_cache.h)."""
_PROCESS_BYTES, _TOKEN_BYTES = 98_000_000, 420
"""Of a process with Python, NumPy, the engine and no model, and of a token of the vocabulary: measured on the
CPU with a tiny model of 263 tokens and with the demo's 151,936."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak."""

    weights: int  # every matrix as stored, the embedding table too
    keys_and_values: int  # pages of all sequences at their full length
    activations: int  # of the largest step, logits included
    overhead: int  # of the process

    @property
    def total(self) -> int:
        return self.weights + self.keys_and_values + self.activations + self.overhead


def memory_of(config: ModelSpec, recipe: Recipe, case: Case, *, chunk: int = CHUNK) -> Memory:
    """What a case takes on the CPU engine.

    Raises:
        UsageError: the recipe keeps the source's values, so only the opened file knows.
    """
    work = case.workload
    pages = work.batch * -(-(work.prompt + work.output) // PAGE)
    return Memory(
        weights=stored_bytes(config, recipe),
        keys_and_values=pages * page_bytes(config, recipe.kv != "bf16", PAGE),
        activations=_activations(
            config, min(chunk, work.batch * work.prompt), work.batch * (1 + case.drafts)
        ),
        overhead=_PROCESS_BYTES + _TOKEN_BYTES * config.vocab,
    )


def _activations(config: ModelSpec, rows: int, drawn: int) -> int:
    """Buffers of a step (`Decoder::reserve`): floats between layers, and what products read as bf16."""
    widest = 0
    for block in dict.fromkeys(config.blocks):
        mixer, ways = block.mixer, block.feed_forward
        inner, keys = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
        floats = 4 * (config.width + max(config.width, inner) + inner + 2 * keys)
        widest = max(widest, floats + 2 * (max(config.width, inner) + ways.width))
    return rows * widest + 4 * drawn * (config.vocab + config.width)
