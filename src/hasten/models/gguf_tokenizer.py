"""Tokenizers out of GGUF metadata: byte-level BPE ("gpt2"), SentencePiece BPE ("llama") and unigram ("t5").

Where the metadata is silent, the model's original tokenizer decides, which is also what llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from hasten.errors import TokenizerError
from hasten.models import pre_tokenizer, sentencepiece_tokenizer
from hasten.models.gguf_vocabulary import AGAIN, KEY, GgufVocabulary
from hasten.models.sentencepiece_tokenizer import SPACE, PieceType, SentencePieceVocabulary
from hasten.models.text_stream import byte_alphabet
from hasten.models.tokenizer_fields import TokenizerFields

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What ends a turn in the chat formats in use; files often name only one of the tokens their model ends with.
_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<|return|>", "<|call|>", "<end_of_turn>", "<end_of_utterance>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
)


def from_gguf(metadata: Mapping[str, object]) -> tuple[Tokenizer, TokenizerFields]:
    """The tokenizer a GGUF file describes.

    Args:
        metadata: the file's key-value pairs, see `GgufVocabulary.read`.

    Raises:
        TokenizerError: a key is missing or contradicts another, or the kind of tokenizer is not supported.
    """
    vocabulary = GgufVocabulary.read(metadata)
    if vocabulary.model == "gpt2":
        backend, add_bos = _byte_level(vocabulary), pre_tokenizer.kind_of(vocabulary.pre).add_bos
    elif vocabulary.model in ("llama", "t5"):
        backend, add_bos = _sentencepiece(vocabulary), vocabulary.model == "llama"
    else:
        raise TokenizerError(
            f"the file's tokenizer is of kind {vocabulary.model!r}; supported are gpt2, llama and t5",
            hint="open the model's Hugging Face folder instead",
        )
    _add_special_tokens(backend, vocabulary)
    add_bos = vocabulary.flags.get("add_bos_token", add_bos)
    add_eos = vocabulary.flags.get("add_eos_token", vocabulary.model == "t5")
    frame(
        backend,
        bos=vocabulary.ids.get("bos") if add_bos else None,
        eos=vocabulary.ids.get("eos") if add_eos else None,
    )
    return backend, _fields(backend, vocabulary)


def frame(backend: Tokenizer, bos: int | None, eos: int | None) -> None:
    """Make `encode` put these ids before and after a text that asks for special tokens; None for nothing."""
    from tokenizers.processors import TemplateProcessing

    before = [] if bos is None else [(backend.id_to_token(bos), bos)]
    after = [] if eos is None else [(backend.id_to_token(eos), eos)]
    single = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=[*before, *after])


def _byte_level(vocabulary: GgufVocabulary) -> Tokenizer:
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE

    if vocabulary.merges is None:
        raise TokenizerError(f"the file has no {KEY}merges, which a gpt2 tokenizer needs", hint=AGAIN)
    kind = pre_tokenizer.kind_of(vocabulary.pre)
    merges = [tuple(merge.split(" ", 1)) for merge in vocabulary.merges]
    try:
        model = BPE(_spelled(vocabulary), merges, ignore_merges=kind.whole_words)  # type: ignore[arg-type]
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{KEY}merges do not fit the tokens: {error}", hint=AGAIN) from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer.byte_level(kind)
    backend.decoder = decoders.ByteLevel()
    return backend


def _spelled(vocabulary: GgufVocabulary) -> dict[str, int]:
    """Token to id. Text tokens outside the byte alphabet (some files spell them out) are put into it."""
    ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    spelling = byte_alphabet()
    foreign = set("".join(vocabulary.tokens)).difference(spelling.values())
    if not foreign:
        return ids
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind == PieceType.NORMAL and not foreign.isdisjoint(token):
            spelled = "".join(spelling[byte] for byte in token.encode())
            if spelled not in ids and ids.pop(token, None) is not None:
                ids[spelled] = index
    return ids


def _sentencepiece(vocabulary: GgufVocabulary) -> Tokenizer:
    tokens, ranks = vocabulary.tokens, None
    gemma = vocabulary.architecture.startswith("gemma")
    if gemma:
        # Runs of spaces are written with real spaces, and merges go by the order of the tokens, not by score.
        tokens = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
        ranks = {token: -float(index) for index, token in enumerate(tokens)}
    prefix: Literal["always", "unless_space", "never"] = "unless_space"
    if not vocabulary.flags.get("add_space_prefix", not gemma):
        prefix = "never"
    elif vocabulary.architecture == "phi3" or vocabulary.model == "t5":
        prefix = "always"
    unk_id = vocabulary.ids.get("unknown")
    if unk_id is None and PieceType.UNKNOWN in vocabulary.types:
        unk_id = vocabulary.types.index(PieceType.UNKNOWN)
    return sentencepiece_tokenizer.build(
        SentencePieceVocabulary(
            kind="unigram" if vocabulary.model == "t5" else "bpe",
            tokens=tokens,
            scores=vocabulary.scores,
            types=vocabulary.types,
            unk_id=unk_id,
            prefix=prefix,
            byte_fallback=PieceType.BYTE in vocabulary.types,
            collapse_spaces=vocabulary.flags.get("remove_extra_whitespaces", vocabulary.model == "t5"),
            charsmap=vocabulary.charsmap,
            ranks=ranks,
        )
    )


def _add_special_tokens(backend: Tokenizer, vocabulary: GgufVocabulary) -> None:
    """Tokens that are found whole in any text: control and named ones give no text, user-defined ones do."""
    from tokenizers import AddedToken

    named = frozenset(vocabulary.ids.values())
    # Phi-3's own tokenizer swallows white space after its control tokens, and its template relies on that.
    swallows = vocabulary.architecture == "phi3" and vocabulary.model == "llama"
    special: list[AddedToken] = []
    plain: list[AddedToken] = []
    for index in vocabulary.marked:
        token, kind = vocabulary.tokens[index], vocabulary.types[index]
        if backend.token_to_id(token) != index:
            continue  # a second spelling of another token: adding it would give it a new id
        if kind in (PieceType.CONTROL, PieceType.UNKNOWN) or index in named:
            strip = swallows and token not in ("<unk>", "<s>", "<|endoftext|>")
            special.append(AddedToken(token, rstrip=strip, normalized=False, special=True))
        elif kind == PieceType.USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _fields(backend: Tokenizer, vocabulary: GgufVocabulary) -> TokenizerFields:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = {
        name: vocabulary.tokens[vocabulary.ids[key]] for name, key in names.items() if key in vocabulary.ids
    }
    ends = [vocabulary.ids[key] for key in ("eos", "eot", "eom") if key in vocabulary.ids]
    ends += [
        index
        for index in vocabulary.marked
        if vocabulary.types[index] == PieceType.CONTROL and vocabulary.tokens[index] in _ENDS
    ]
    return TokenizerFields(
        bos_id=vocabulary.ids.get("bos"),
        eos_ids=tuple(dict.fromkeys(ends)),
        vocab_size=backend.get_vocab_size(),
        special_tokens=MappingProxyType(tokens),
        chat_templates=MappingProxyType(dict(vocabulary.chat_templates)),
    )
