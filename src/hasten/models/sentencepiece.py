"""SentencePiece vocabularies (Kudo and Richardson 2018) as `tokenizers` objects: unigram and BPE."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hasten.cache.reading import read_file
from hasten.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder
    from tokenizers.models import Model
    from tokenizers.normalizers import Normalizer

SPACE = "\u2581"


class PieceType(IntEnum):
    """Kinds of vocabulary entries; SentencePiece's and GGUF's numbers are the same."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_TEXTUAL = (PieceType.NORMAL, PieceType.USER_DEFINED)


@dataclass(frozen=True)
class SentencePieceVocabulary:
    """What a SentencePiece model file or its GGUF copy says.

    `prefix` says when a space goes before the text: `always` before every stretch of text (SentencePiece
    itself), `unless_space` only at the start and not where a space is already, or `never`.
    """

    kind: Literal["unigram", "bpe"]
    tokens: list[str]
    scores: list[float]
    types: list[int]  # PieceType of each token
    unk_id: int | None
    prefix: Literal["always", "unless_space", "never"]
    byte_fallback: bool
    collapse_spaces: bool = False  # strip both ends and make one space of many
    charsmap: bytes = b""  # compiled normalisation rules, empty for none
    ranks: Mapping[str, float] | None = None  # what orders merges, highest first, where it is not the score


def merges_by_rank(vocabulary: Mapping[str, int], ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a token out of two, best token first: what BPE by scores does, written as merges.

    Ties go to the longer left half, then to the halves with the lower ids (the order `transformers` uses).
    """
    found: list[tuple[float, int, int, str, str]] = []
    for token, rank in ranks.items():
        halves = [
            (vocabulary[token[:cut]], vocabulary[token[cut:]], cut)
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        ]
        found += [(rank, cut, len(token) - cut, token[:cut], token[cut:]) for _, _, cut in sorted(halves)]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def build(vocabulary: SentencePieceVocabulary) -> Tokenizer:
    """A `tokenizers.Tokenizer` that encodes and decodes as the vocabulary's own program does.

    Raises:
        TokenizerError: the vocabulary contradicts itself.
    """
    import tokenizers

    if not len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types):
        raise TokenizerError(
            f"the vocabulary has {len(vocabulary.tokens)} tokens, {len(vocabulary.scores)} scores and "
            f"{len(vocabulary.types)} types",
            hint="download the model again: the three must be equal",
        )
    try:
        backend = tokenizers.Tokenizer(_model(vocabulary))
        normalizer = _normalizer(vocabulary)
        if normalizer is not None:
            backend.normalizer = normalizer
            normalizer.normalize_str("a b")  # damaged rules panic, which is no Exception
    except (TokenizerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise TokenizerError(
            f"the SentencePiece vocabulary cannot be used: {error}", hint="download the model again"
        ) from error
    if vocabulary.prefix == "unless_space":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first", split=False
        )
    backend.decoder = _decoder(vocabulary)
    return backend


def _model(vocabulary: SentencePieceVocabulary) -> Model:
    from tokenizers.models import BPE, Unigram

    if vocabulary.kind == "unigram":
        if vocabulary.unk_id is None:
            raise TokenizerError(
                "a unigram vocabulary needs an unknown token", hint="download the model again"
            )
        return Unigram(_unigram_pieces(vocabulary), vocabulary.unk_id, vocabulary.byte_fallback)
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    ranks = vocabulary.ranks or dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    mergeable = {
        token: ranks[token]
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in _TEXTUAL
    }
    unknown = None if vocabulary.unk_id is None else vocabulary.tokens[vocabulary.unk_id]
    return BPE(
        ids,
        merges_by_rank(ids, mergeable),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=vocabulary.byte_fallback,
    )


def _unigram_pieces(vocabulary: SentencePieceVocabulary) -> list[tuple[str, float]]:
    """Pieces and scores; what no text may match (bytes, control) scores below any path of others."""
    usable = [kind in _TEXTUAL for kind in vocabulary.types]
    worst = min((s for s, use in zip(vocabulary.scores, usable, strict=True) if use), default=0.0)
    longest = max(len(token) for token in vocabulary.tokens)
    never = (worst - 10.0) * (longest + 1)
    rows = zip(vocabulary.tokens, vocabulary.scores, usable, vocabulary.types, strict=True)
    return [(t, s if use or kind == PieceType.UNKNOWN else min(never, -1.0)) for t, s, use, kind in rows]


def _normalizer(vocabulary: SentencePieceVocabulary) -> Normalizer | None:
    from tokenizers import Regex, normalizers

    steps: list[Normalizer] = []
    if vocabulary.charsmap:
        steps.append(normalizers.Precompiled(vocabulary.charsmap))
    if vocabulary.collapse_spaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if vocabulary.prefix == "always":
        steps.append(normalizers.Prepend(SPACE))
    if vocabulary.prefix != "unless_space":
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps) if steps else None


def _decoder(vocabulary: SentencePieceVocabulary) -> Decoder:
    from tokenizers import decoders

    steps: list[Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.prefix != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


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
    if _TIKTOKEN.match(data):
        raise TokenizerError(
            f"{path} is a vocabulary of tiktoken, in its publisher's own form",
            hint="put the tokenizer.json of the model's Hugging Face form beside it: that is read first",
        )
    try:
        return _parsed(data)
    except (IndexError, ValueError, TypeError, struct.error) as error:
        raise TokenizerError(f"{path} is no SentencePiece model: {error}", hint=hint) from error


_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} 0\r?\n[A-Za-z0-9+/]+={0,2} 1\r?\n")


def _parsed(data: bytes) -> tuple[SentencePieceVocabulary, dict[str, int]]:
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
