"""SentencePiece model files (`tokenizer.model`): the few protobuf fields a tokenizer needs.

Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto. Wire format:
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from hasten.cache.reading import read_file
from hasten.errors import TokenizerError
from hasten.models.sentencepiece_tokenizer import PieceType, SentencePieceVocabulary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_Value = int | bytes


def read_sentencepiece(path: Path) -> tuple[SentencePieceVocabulary, dict[str, int]]:
    """A model file's vocabulary, and the ids of its unk, bos, eos and pad tokens (only those that exist).

    Raises:
        TokenizerError: the file is no SentencePiece model, or of a kind other than unigram and BPE.
    """
    hint = "download tokenizer.model again"
    try:
        data = read_file(path)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    try:
        return _model(data)
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise TokenizerError(f"{path} is no SentencePiece model: {error}", hint=hint) from error


def _model(data: bytes) -> tuple[SentencePieceVocabulary, dict[str, int]]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, _Value] = {}
    normalizer: dict[int, _Value] = {}
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        if number == 1:
            piece = dict(_fields(_as_bytes(value)))
            tokens.append(_as_bytes(piece.get(1, b"")).decode())
            scores.append(struct.unpack("<f", _as_bytes(piece.get(2, bytes(4))))[0])
            types.append(_as_int(piece.get(3, PieceType.NORMAL)))
        elif number == 2:
            trainer = dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_as_bytes(value)))
    if not tokens:
        raise ValueError("it has no pieces")
    kind = _KINDS.get(_as_int(trainer.get(3, 1)), "unknown")
    if kind not in ("unigram", "bpe"):
        raise ValueError(f"its kind is {kind}; unigram and BPE are supported")
    ids = {
        name: _signed(trainer.get(field, default))
        for name, field, default in (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))
    }
    ids = {name: index for name, index in ids.items() if 0 <= index < len(tokens)}
    vocabulary = SentencePieceVocabulary(
        kind="bpe" if kind == "bpe" else "unigram",
        tokens=tokens,
        scores=scores,
        types=types,
        unk_id=ids.get("unk"),
        prefix="always" if normalizer.get(3, 1) else "never",
        byte_fallback=bool(trainer.get(35, 0)),
        collapse_spaces=bool(normalizer.get(4, 1)),
        charsmap=_as_bytes(normalizer.get(2, b"")),
    )
    return vocabulary, ids


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Field numbers and values of one message; 32- and 64-bit values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"field {number} ends after the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits at byte {at}")


def _signed(value: _Value) -> int:
    """int32 fields come as 64-bit two's complement."""
    number = _as_int(value)
    return number - (1 << 64) if number >= 1 << 63 else number


def _as_int(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number must be")
    return value


def _as_bytes(value: _Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes must be")
    return value
