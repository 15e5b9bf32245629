"""Long texts: the library's other calls are used, which let threads run; its panics become errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import TokenizerError
from hasten.models.text_stream import TokenizerFields
from hasten.models.tokenizer import _LONG, Tokenizer

TEXT = "The quick brown fox, it's 12 years old; \u4e2d\u6587 caf\u00e9\n" * 4000


@pytest.fixture
def tokenizer(tiny_folder: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_folder(tiny_folder("qwen2"))


def test_long_and_short_texts_are_encoded_alike(tokenizer: Tokenizer) -> None:
    lines = TEXT.splitlines(keepends=True)
    assert len(lines[0]) < _LONG < len(TEXT)
    for special in (True, False):
        whole = tokenizer.encode(TEXT, special)
        assert whole == tokenizer._backend.encode(TEXT, add_special_tokens=special).ids
        assert tokenizer.count(TEXT, special) == len(whole)
        assert tokenizer.decode(whole) == tokenizer._backend.decode(whole, skip_special_tokens=True)


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    turns, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            turns[0] += 1
            time.sleep(0.001)

    text = TEXT * 5
    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = turns[0]
        tokenizer.count(text)
        during = turns[0] - before
    finally:
        done.set()
        counter.join()
    assert during > 20  # at most 2 where the library holds the interpreter


@pytest.mark.parametrize("text", ["short", "long" * _LONG])
def test_a_panic_is_a_tokenizer_error(text: str) -> None:
    panic = type("PanicException", (BaseException,), {})

    class Backend:
        def __getattr__(self, name: str) -> Any:
            raise panic("retry-limit-in-match over")

    tokenizer = Tokenizer(Backend, TokenizerFields())  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"gave up .* retry-limit"):
        tokenizer.encode(text)
    with pytest.raises(TokenizerError, match=r"gave up .* retry-limit"):
        tokenizer.decode([1] * len(text))


def test_what_is_no_panic_passes() -> None:
    class Backend:
        def encode(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer(Backend, TokenizerFields()).encode("a")  # type: ignore[arg-type]


def test_the_longest_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.longest_token == max(map(len, tokenizer._backend.get_vocab()))
