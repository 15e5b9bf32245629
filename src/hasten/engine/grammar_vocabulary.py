"""A model's vocabulary as llguidance wants it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from hasten.models.tokenizer import Tokenizer

_APART = "\x02"


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer:
    """Build the trie over all tokens.

    Args:
        tokenizer: gives the bytes of its tokens.
        vocab_size: V; ids from the tokenizer's own size on have no bytes and are never allowed.
    """
    from llguidance import LLTokenizer

    tokens = tokenizer.token_bytes()
    values = (tokens.values + [b""] * (vocab_size - len(tokens.values)))[:vocab_size]
    ends = [index for index in tokenizer.eos_ids if index < vocab_size]
    special = [index for index in tokens.special if index < vocab_size]
    wrapper: Any = _Vocabulary(tokenizer, values, special, ends)
    return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=ends or None)


class _Vocabulary:
    """The attributes that llguidance reads of a `TokenizerWrapper`."""

    is_tokenizer_wrapper = True

    def __init__(
        self, tokenizer: Tokenizer, values: Sequence[bytes], special: Sequence[int], ends: Sequence[int]
    ) -> None:
        self.tokens = values
        self.special_token_ids = special
        self.eos_token_id = ends[0] if ends else 0
        self.bos_token_id = tokenizer.bos_id
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """Ids that spell exactly this text, as inside an answer: llguidance breaks where bytes are added."""
        ids = self._tokenizer.encode(text, add_special=False)
        if self._spells(ids, text):
            return ids
        # SentencePiece puts a space before a text. A control character, which joins no other, takes it.
        ids = self._tokenizer.encode(_APART + text, add_special=False)
        for start, index in enumerate(ids):
            if self.tokens[index].endswith(_APART.encode()):
                ids = ids[start + 1 :]
                break
        return ids if self._spells(ids, text) else self._longest(text.encode())

    def _spells(self, ids: Sequence[int], text: str) -> bool:
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens)) == text.encode()

    def _longest(self, raw: bytes) -> list[int]:
        """Longest tokens first, for tokenizers that change what they encode; stops where none fits."""
        ids: list[int] = []
        while raw:
            for size in range(min(len(raw), self._most), 0, -1):
                if raw[:size] in self._by_bytes:
                    ids.append(self._by_bytes[raw[:size]])
                    raw = raw[size:]
                    break
            else:
                return ids
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = frozenset(self.special_token_ids)
        return {value: i for i, value in enumerate(self.tokens) if value and i not in special}

    @cached_property
    def _most(self) -> int:
        return max(map(len, self._by_bytes), default=0)
