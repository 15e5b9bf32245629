"""SentencePiece vocabularies (Kudo and Richardson 2018) as `tokenizers` objects: unigram and BPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

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
    except TokenizerError:
        raise
    except Exception as error:
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
