"""What every token of a vocabulary adds to a text, as bytes: what a grammar needs to know of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.models.text_stream import BYTE_TOKEN, byte_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Rows that fill an embedding up: llama.cpp's converter names them [PAD<id>]; Gemma's have no meaning either.
_FILLER = re.compile(r"\[PAD(\d+)\]|<unused\d+>")


@dataclass(frozen=True)
class TokenBytes:
    """One entry an id. Special tokens have their own name as bytes; ids that mean nothing have none."""

    values: list[bytes]
    special: tuple[int, ...]  # ids that decode leaves out, ascending


def token_bytes(backend: Backend, decoder: Mapping[str, Any], eos_ids: tuple[int, ...]) -> TokenBytes:
    """Bytes of every token, taken from the vocabulary and the decoder's own rules.

    A SentencePiece decoder drops one space before the first token of a text; the bytes here keep it.

    Args:
        backend: the vocabulary.
        decoder: its decoder as tokenizer.json spells it.
        eos_ids: taken as special even where the tokenizer does not mark them.
    """
    vocabulary = backend.get_vocab(with_added_tokens=True)
    spell = _speller(decoder)
    values = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = backend.get_added_tokens_decoder()
    for text, index in vocabulary.items():
        if index not in added:
            values[index] = spell(text)
    special = {index for index in eos_ids if index < len(values)}
    for index, token in added.items():
        # The byte-level decoder reads these as bytes too where they are of its alphabet.
        values[index] = token.content.encode() if token.special else spell(token.content)
        if token.special:
            special.add(index)
    for text, index in vocabulary.items():
        filler = _FILLER.fullmatch(text) if text[:1] in "[<" else None
        if filler and index not in special and filler.group(1) in (None, str(index)):
            values[index] = b""
    return TokenBytes(values, tuple(sorted(special)))


def _speller(decoder: Mapping[str, Any]) -> Callable[[str], bytes]:
    specs = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = {spec.get("type") for spec in specs}
    replaced = [
        (spec["pattern"]["String"], spec["content"])
        for spec in specs
        if spec.get("type") == "Replace" and "String" in spec.get("pattern", {})
    ]
    replaced += [(spec["replacement"], " ") for spec in specs if spec.get("type") == "Metaspace"]

    def from_pieces(text: str) -> bytes:
        match = BYTE_TOKEN.fullmatch(text) if "ByteFallback" in kinds else None
        if match:
            return bytes([int(match.group(1), 16)])
        for old, new in replaced:
            text = text.replace(old, new)
        return text.encode()

    return _from_alphabet if "ByteLevel" in kinds else from_pieces


_TABLE = {ord(character): byte for byte, character in byte_alphabet().items()}
_BEYOND = re.compile("[^" + re.escape("".join(byte_alphabet().values())) + "]")


def _from_alphabet(text: str) -> bytes:
    if _BEYOND.search(text):
        return text.encode()
    return text.translate(_TABLE).encode("latin-1")
