"""A tokenizer with its grammar compiler, and answers drawn from masks."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from hasten.engine.grammar import Grammar
from hasten.engine.grammar_compiler import GrammarCompiler, GrammarState
from hasten.models.tokenizer import Tokenizer

PADDING = 45  # rows of the head that no token has


class Vocabulary:
    """A tokenizer with its compiler; words and text of token ids."""

    def __init__(self, tokenizer: Tokenizer, padding: int = PADDING) -> None:
        self.tokenizer = tokenizer
        self.values = tokenizer.token_bytes().values
        self.size = tokenizer.vocab_size + padding
        self.compiler = GrammarCompiler(tokenizer, self.size)
        self.ends = set(tokenizer.eos_ids)

    def start(self, kind: Any, source: Any = "") -> GrammarState:
        text = source if isinstance(source, str) else json.dumps(source)
        return self.compiler.compile(Grammar(kind, text)).start()

    def text(self, ids: list[int]) -> str:
        return b"".join(self.values[i] for i in ids if i not in self.ends).decode()

    def ids(self, text: str) -> list[int]:
        """One token a byte where no longer one is needed: every text can be spelled so."""
        return [self.values.index(bytes([byte])) for byte in text.encode()]

    def draw(self, state: GrammarState, rng: random.Random, most: int = 600) -> list[int]:
        """Tokens drawn evenly from the masks until an end token; ends early in one of three chances."""
        out: list[int] = []
        while len(out) < most:
            allowed = bits(state.masks(())[0])
            assert max(allowed) < self.tokenizer.vocab_size, "a padding id is allowed"
            ends = [token for token in allowed if token in self.ends]
            assert not ends or set(ends) == self.ends
            assert state.finished == (set(allowed) == self.ends)
            token = rng.choice(ends if ends and rng.random() < 0.3 else allowed)
            state.accept([token])
            out.append(token)
            if token in self.ends:
                return out
        raise AssertionError("no end")


def bits(row: Any) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
