"""The prompt cache gives exactly what encoding gives, and stays within its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.cache.requests import PromptCache
from hasten.models.tokenizer import Tokenizer


class Counting:
    """Encodes a character as its code; cuts behind every "|"."""

    def __init__(self, wrong: bool = False) -> None:
        self.encoded: list[str] = []
        self.wrong = wrong

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        assert not add_special
        self.encoded.append(text)
        return [ord(c) for c in text] + ([0] if self.wrong else [])

    def pieces(self, text: str) -> list[str]:
        parts = text.split("|")
        return [part + "|" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def turn(*parts: str) -> str:
    return "".join(part + "|" for part in parts)


def test_a_known_piece_is_not_encoded_again() -> None:
    coder = Counting()
    cache = PromptCache(coder)
    for count in range(20):
        text = turn("s" * 500, f"question {count} " * 20)
        assert cache.get_or_encode(text) == [ord(c) for c in text]
    assert sum(part == "s" * 500 + "|" for part in coder.encoded) == 1


def test_a_tokenizer_for_which_cutting_is_wrong_is_found_out() -> None:
    coder = Counting(wrong=True)
    cache = PromptCache(coder)
    text = turn("a" * 100, "b" * 100)
    for _ in range(3):
        assert cache.get_or_encode(text) == coder.encode(text, add_special=False)


def test_bounded_in_bytes() -> None:
    cache = PromptCache(Counting(), limit_bytes=20_000)
    for i in range(100):
        cache.get_or_encode(f"{i:03d}" + "x" * 500)
        assert cache.bytes <= 20_000
    held = cache.bytes
    assert held > 10_000
    cache.get_or_encode("y" * 100_000)
    assert cache.bytes == held  # one that is too large drops nobody


def test_many_threads() -> None:
    cache = PromptCache(Counting(), limit_bytes=15_000)
    wrong: list[str] = []

    def ask(seed: int) -> None:
        for i in range(200):
            text = turn(f"{(i * seed) % 7}" * 300, "z" * 80)
            if cache.get_or_encode(text) != [ord(c) for c in text]:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.bytes <= 15_000


@pytest.mark.parametrize(
    "text", ["the cat", "<|end|>", "a<|end|>", "<|end|> the<|end|> <|end|>the", "<|en<|end|>|>", ""]
)
def test_pieces_of_a_real_tokenizer(tiny_folder: Callable[..., Path], text: str) -> None:
    tokenizer = Tokenizer.from_folder(tiny_folder("qwen3"))
    text = text.replace("the", "the " * 40)
    pieces = tokenizer.pieces(text)
    assert "".join(pieces) == text
    joined = [i for piece in pieces for i in tokenizer.encode(piece, add_special=False)]
    assert joined == tokenizer.encode(text, add_special=False)
    assert len(pieces) == max(1, text.rstrip().count("<|end|>") + (not text.endswith("<|end|>")))
    cache = PromptCache(tokenizer)
    for _ in range(12):
        assert cache.get_or_encode(text) == joined


def test_kinds_that_treat_the_first_piece_otherwise_are_not_cut(tiny_folder: Callable[..., Path]) -> None:
    from tokenizers import AddedToken, pre_tokenizers

    from hasten.models.text_stream import cutter

    backend = Tokenizer.from_folder(tiny_folder("qwen3"))._backend
    assert cutter(backend) is not None
    for part in (
        pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=True)]),
    ):
        backend.pre_tokenizer = part
        assert cutter(backend) is None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert cutter(backend) is not None
    backend.add_special_tokens([AddedToken("<|x|>", special=True, normalized=False, lstrip=True)])
    assert cutter(backend) is None


@pytest.mark.demo
def test_pieces_of_the_demo() -> None:
    from hasten.models.open import open_model

    tokenizer = open_model("demo").tokenizer()
    messages = [{"role": "system", "content": "Be brief. 简短。 " * 60}]
    cache = PromptCache(tokenizer)
    for count in range(12):
        messages.append({"role": "user", "content": f"What is {count}?  <|im_start|> \n\n"})
        text = tokenizer.apply_chat(messages)
        assert len(tokenizer.pieces(text)) > 2
        assert cache.get_or_encode(text) == tokenizer.encode(text, add_special=False)
    assert cache.bytes > 0
