"""The bytes of every token, joined, are the text that the tokens decode to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.models import gguf_tokenizer
from hasten.models.tokenizer import Tokenizer
from text_samples import samples
from tiny_tokenizers import (
    CONTROL,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
    sentencepiece_model,
)

PLAIN = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})


def of_bytes(pre: str) -> Tokenizer:
    """Byte-level BPE with one padding row named as llama.cpp's converter names it."""
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.GPT2), pre)
    metadata["tokens"][-1] = f"[PAD{len(metadata['tokens']) - 1}]"
    return from_gguf(metadata)


def of_pieces(kind: str, folder: Path | None = None) -> Tokenizer:
    model = sentencepiece_model(kind, vocab_size=1000, **PLAIN)
    if folder is None:
        return from_gguf(sentencepiece_metadata(model))
    (folder / "tokenizer.model").write_bytes(model)
    return Tokenizer.from_folder(folder)


# Qwen, Llama 3, SmolLM, OLMo 2, later Mistral and Phi-4 spell bytes; Gemma, Phi-3 and early Mistral pieces.
MAKERS = {
    **{
        pre: lambda _, pre=pre: of_bytes(pre)
        for pre in ("qwen2", "llama-bpe", "smollm", "dbrx", "tekken", "gpt-4o")
    },
    "pieces-gguf": lambda _: of_pieces("bpe"),
    "pieces-folder": lambda folder: of_pieces("bpe", folder),
    "unigram": lambda folder: of_pieces("unigram", folder),
}


@pytest.mark.parametrize("name", MAKERS)
def test_bytes_are_what_decode_gives(name: str, tmp_path: Path) -> None:
    tokenizer = MAKERS[name](tmp_path)
    values = tokenizer.token_bytes().values
    pieces = name in ("pieces-gguf", "pieces-folder", "unigram")
    assert len(values) == tokenizer.vocab_size
    for text in samples(count=300):
        ids = tokenizer.encode(text, add_special=False)
        raw = b"".join(values[i] for i in ids)
        wanted = text.encode()
        if pieces:  # a space before the text; the symbol for a space is one
            wanted = text.replace("\u2581", " ").encode()
            assert raw in (wanted, b" " + wanted)
        else:
            assert raw == wanted
    letter = tokenizer.encode("a", add_special=False)[-1]
    special = tokenizer.token_bytes().special
    whole = 0
    for index, value in enumerate(values):
        if index in special or not value or not is_utf8(value):
            continue
        assert tokenizer.decode([letter, index]) == tokenizer.decode([letter]) + value.decode()
        whole += 1
    assert whole > 0.5 * len(values)


def is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_special_and_padding_ids() -> None:
    tokenizer = of_bytes("qwen2")
    tokens = tokenizer.token_bytes()
    ids = [tokenizer.encode(token)[0] for token in CONTROL]
    assert list(tokens.special) == sorted(ids) and set(tokens.special) >= set(tokenizer.eos_ids)
    assert tokens.values[-1] == b"", "a padding row spells nothing"
    assert tokens.values[tokenizer.encode("<tool_call>")[0]] == b"<tool_call>"


def test_streams_keep_the_special_tokens_they_are_told_to() -> None:
    tokenizer = of_bytes("qwen2")
    ids = tokenizer.encode("<|im_start|>a<|im_end|>")
    stream = tokenizer.stream(keep=[ids[0]])
    assert "".join(map(stream.push, ids)) == "<|im_start|>a"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == "a"
