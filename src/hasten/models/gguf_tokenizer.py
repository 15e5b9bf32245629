# ruff: noqa: RUF001 - the patterns hold characters that look like others
"""Tokenizers out of GGUF metadata: byte-level BPE ("gpt2"), SentencePiece BPE ("llama") and unigram ("t5").

Where the metadata is silent, the model's original tokenizer decides, which is also what llama.cpp does. Keys
and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

A byte-level vocabulary needs to know how text is cut into words before merging: one list of expressions a
`tokenizer.ggml.pre` name. The expressions are those of the models' own tokenizer.json files (Oniguruma
syntax). Each splits what the ones before it left, and keeps matches and the text between them.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from hasten.errors import TokenizerError
from hasten.models import sentencepiece
from hasten.models.sentencepiece import SPACE, PieceType, SentencePieceVocabulary
from hasten.models.text_stream import TokenizerFields, advised_sampling, byte_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

_log = logging.getLogger("hasten.models")
KEY = "tokenizer.ggml."
AGAIN = "download the GGUF file again, or open the model's Hugging Face folder"
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator", "cls", "mask")
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
_NO_TOKEN = 0xFFFFFFFF  # -1 written as unsigned


@dataclass(frozen=True)
class GgufVocabulary:
    """A file's vocabulary; `scores` and `types` have one entry a token, ids are below `len(tokens)`."""

    model: str  # gpt2, llama, t5 ...
    pre: str
    architecture: str
    tokens: list[str]
    scores: list[float]
    types: list[int]  # PieceType
    merges: list[str] | None
    ids: Mapping[str, int]  # bos, eos, unknown ... where the file names one
    flags: Mapping[str, bool]  # add_bos_token ... where the file says
    charsmap: bytes
    chat_templates: Mapping[str, str]

    @classmethod
    def read(cls, metadata: Mapping[str, object]) -> GgufVocabulary:
        """Take the vocabulary out of a file's key-value pairs.

        Args:
            metadata: arrays are sequences, their strings (and all others) str or bytes.

        Raises:
            TokenizerError: a key is missing, of the wrong kind, or contradicts another.
        """
        tokens = _strings(metadata, "tokens")
        if not tokens:
            raise TokenizerError(f"the file has no {KEY}tokens", hint=AGAIN)
        ids = {name: _id(metadata, f"{name}_token_id", len(tokens)) for name in _IDS}
        types = _types(metadata, len(tokens))
        model = text_of(metadata, KEY + "model") or ""
        if model == "llama":
            ids |= {name: known for name, known in _usual_ids(types) if ids[name] is None}
        found = cls(
            model=model,
            pre=text_of(metadata, KEY + "pre") or "",
            architecture=text_of(metadata, "general.architecture") or "",
            tokens=tokens,
            scores=_numbers(metadata, "scores", len(tokens), 0.0),
            types=types,
            merges=_strings(metadata, "merges"),
            ids={name: found for name, found in ids.items() if found is not None},
            flags={name: flag for name in _FLAGS if (flag := _flag(metadata, name)) is not None},
            charsmap=_bytes(metadata, "precompiled_charsmap"),
            chat_templates=_templates(metadata),
        )
        return _retyped(found if found.pre or model != "gpt2" else replace(found, pre=_implied_pre(found)))

    @cached_property
    def marked(self) -> list[int]:
        """Ids of the tokens that are not plain text, ascending."""
        named = frozenset(self.ids.values())
        return [i for i, kind in enumerate(self.types) if kind != PieceType.NORMAL or i in named]


def text_of(metadata: Mapping[str, object], key: str) -> str | None:
    """A text value, None where the key is missing.

    Raises:
        TokenizerError: the value is no text.
    """
    value = metadata.get(key)
    if isinstance(value, bytes):
        return _decoded(value, key)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{key} must be text, got {type(value).__name__}", hint=AGAIN)
    return value


def _decoded(value: bytes, key: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{key} holds bytes that are no UTF-8: {value[:40]!r}", hint=AGAIN) from error


def _kinds(values: Iterable[object]) -> set[type]:
    return set(map(type, values))  # one pass in C: these lists have 150,000 entries


def _strings(metadata: Mapping[str, object], name: str) -> list[str] | None:
    key = KEY + name
    value = metadata.get(key)
    if value is None:
        return None
    if (
        not isinstance(value, Sequence)
        or not _kinds(value) <= {str, bytes}
        or isinstance(value, (str, bytes))
    ):
        raise TokenizerError(f"{key} must be a list of strings", hint=AGAIN)
    if _kinds(value) <= {str}:
        return list(value)
    return [_decoded(item, key) if isinstance(item, bytes) else item for item in value]


def _numbers(metadata: Mapping[str, object], name: str, count: int, default: float) -> list[float]:
    value = metadata.get(KEY + name)
    if value is None:
        return [default] * count
    numbers = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(numbers, Sequence) or len(numbers) != count or not _kinds(numbers) <= {int, float}:
        raise TokenizerError(f"{KEY}{name} must hold {count} numbers, one a token", hint=AGAIN)
    return list(numbers)


def _types(metadata: Mapping[str, object], count: int) -> list[int]:
    numbers = _numbers(metadata, "token_type", count, PieceType.NORMAL)
    types = [number for number in numbers if isinstance(number, int)]
    if len(types) != count:
        raise TokenizerError(f"{KEY}token_type must hold integers", hint=AGAIN)
    return types


def _id(metadata: Mapping[str, object], name: str, count: int) -> int | None:
    value = metadata.get(KEY + name)
    if value is None:
        return None
    try:
        number = operator.index(int(value) if isinstance(value, float) and value.is_integer() else value)  # type: ignore[arg-type]
    except TypeError:
        said = f"{KEY}{name} is {value!r}, which is no id of the {count} tokens"
        raise TokenizerError(said, hint=AGAIN) from None
    if 0 <= number < count:
        return number
    if number not in (-1, _NO_TOKEN):  # llama.cpp goes on without it too
        _log.warning("%s%s is %d, which is none of the %d tokens: it is left out", KEY, name, number, count)
    return None


def _flag(metadata: Mapping[str, object], name: str) -> bool | None:
    value = metadata.get(KEY + name)
    if value is None or isinstance(value, int):
        return None if value is None else bool(value)
    raise TokenizerError(f"{KEY}{name} must be true or false, got {value!r:.60}", hint=AGAIN)


def _usual_ids(types: list[int]) -> list[tuple[str, int]]:
    """What SentencePiece files of Llama's kind have where their ids are not said: unknown 0, bos 1, eos 2."""
    usual = [("unknown", 0), ("bos", 1), ("eos", 2)]
    return [(n, i) for n, i in usual if i < len(types) and types[i] in (PieceType.CONTROL, PieceType.UNKNOWN)]


_PRE_OF = {"qwen2": "qwen2", "qwen3": "qwen2", "smollm3": "llama-bpe", "olmo2": "dbrx"}
_PRE_OF_SIZE = {("phi3", 100_352): "dbrx", ("phi3", 200_064): "gpt-4o"}


def _implied_pre(vocabulary: GgufVocabulary) -> str:
    """The pre-tokenizer of a byte-level file that names none (converted before April 2024), with a warning.

    All models of some architectures have one; of the others llama.cpp's "default" is taken, as it does.
    """
    found = _PRE_OF.get(vocabulary.architecture)
    found = found or _PRE_OF_SIZE.get((vocabulary.architecture, len(vocabulary.tokens)))
    if found is None and vocabulary.architecture == "llama" and "<|begin_of_text|>" in vocabulary.tokens:
        found = "llama-bpe"  # Llama 3
    _log.warning(
        "the file does not say how text is cut into words (%spre is missing): %r is taken, %s. "
        "Answers may be worse than the model's own; a file of a current converter has the key.",
        KEY, found or "default",
        f"which all models of the kind {vocabulary.architecture!r} have" if found else "as llama.cpp does",
    )  # fmt: skip
    return found or "default"


# Tokens that a chat template writes: <|im_start|>, <start_of_turn>, [INST].
_WRITTEN = re.compile(r"<[^<>\s]{2,60}>|\[/?[A-Z_]{3,40}\]")


def _retyped(vocabulary: GgufVocabulary) -> GgufVocabulary:
    """The vocabulary with the types that its tokens must have to be found whole in text.

    Some converters store the token that ends a turn as text: answers then never end. llama.cpp gives such
    tokens the type of control tokens too. What the chat template writes beside it is found whole as well.
    """
    plain = (PieceType.NORMAL, PieceType.USER_DEFINED)
    index = {token: i for i, token in enumerate(vocabulary.tokens) if token[:1] in "<[_\u2581"}
    ends = [i for token, i in index.items() if token in _ENDS and vocabulary.types[i] in plain]
    text = "".join(vocabulary.chat_templates.values())
    written = [i for i in (index.get(token) for token in set(_WRITTEN.findall(text))) if i is not None]
    written = [i for i in written if vocabulary.types[i] == PieceType.NORMAL and i not in ends]
    if not ends and not written:
        return vocabulary
    types = list(vocabulary.types)
    for i in ends:
        types[i] = PieceType.CONTROL
    for i in written:
        types[i] = PieceType.USER_DEFINED
    if ends:
        shown = ", ".join(vocabulary.tokens[i] for i in ends[:4])
        _log.warning("%s stored as text in %stoken_type: taken for control tokens, which end answers",
                     shown + (" is" if len(ends) == 1 else " are"), KEY)  # fmt: skip
    return replace(vocabulary, types=types)


def _bytes(metadata: Mapping[str, object], name: str) -> bytes:
    value = metadata.get(KEY + name, b"")
    values = value.tolist() if hasattr(value, "tolist") else value
    try:
        if isinstance(values, (bytes, list, tuple)):
            return bytes(number & 0xFF for number in values)  # GGUF has signed bytes too
    except TypeError:
        pass
    raise TokenizerError(f"{KEY}{name} must be a list of bytes", hint=AGAIN)


def _templates(metadata: Mapping[str, object]) -> dict[str, str]:
    """`tokenizer.chat_template` is the default one, `tokenizer.chat_template.NAME` are others."""
    prefix = "tokenizer.chat_template"
    return {
        key[len(prefix) + 1 :] or "default": text_of(metadata, key) or ""
        for key in metadata
        if key == prefix or key.startswith(prefix + ".")
    }


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3 = _WORD + r"|\p{N}{1,3}" + _TAIL
QWEN2 = _WORD + r"|\p{N}" + _TAIL
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LOWER_ENDING = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER_START = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASH_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{_LOWER_ENDING}|{_UPPER_START}|\p{{N}}{_SLASH_TAIL}"
GPT4O = rf"{_LOWER_ENDING}{_SUFFIX}|{_UPPER_START}{_SUFFIX}|\p{{N}}{{1,3}}{_SLASH_TAIL}"
_CJK_RUN = "[一-龥ࠀ-一가-퟿]+"
# DeepSeek LLM lists the cased letters of its day, by code point.
_CASED = """
41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a
38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf
1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d
1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4
1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f
2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f
a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3
104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943
"""
_DEEPSEEK_WORD = (
    rf"\s?[{''.join('-'.join(chr(int(c, 16)) for c in part.split('-')) for part in _CASED.split())}]+"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizerKind:
    """One way to cut, and what its models do where the metadata is silent."""

    splits: tuple[str, ...]
    whole_words: bool = False  # a word that is a token as it stands is not merged together (`ignore_merges`)
    add_bos: bool = False


_KINDS = {
    "default": PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),  # llama.cpp's
    "gpt-2 mpt olmo jais phi-2": PreTokenizerKind((GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": PreTokenizerKind((r"\p{N}", GPT2)),
    "qwen2 stablelm2 deepseek-r1-qwen megrez kormo f2llmv2": PreTokenizerKind((QWEN2,)),
    "qwen35": PreTokenizerKind((QWEN35,)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizerKind(
        (LLAMA3,), whole_words=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe glm4": PreTokenizerKind((LLAMA3,)),
    "tekken": PreTokenizerKind((TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizerKind((GPT4O,)),
    "deepseek-llm": PreTokenizerKind(
        (r"[\r\n]", _DEEPSEEK_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK_RUN, r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizerKind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_RUN, r"\p{N}")),
    "deepseek-v3": PreTokenizerKind((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "falcon": PreTokenizerKind((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": PreTokenizerKind((_BLOOM,)),
    "viking": PreTokenizerKind((_BLOOM, r"\p{N}")),
}
KINDS: dict[str, PreTokenizerKind] = {name: kind for names, kind in _KINDS.items() for name in names.split()}


def kind_of(name: str) -> PreTokenizerKind:
    """The kind behind a `tokenizer.ggml.pre` name.

    Raises:
        TokenizerError: the name is not known; guessing would give other tokens than the model was trained on.
    """
    try:
        return KINDS[name]
    except KeyError:
        raise TokenizerError(
            f"this model's pre-tokenizer {name!r} is not known; known are {', '.join(sorted(KINDS))}",
            hint="open the model's Hugging Face folder instead: its tokenizer.json says how to split",
        ) from None


def split_words(kind: PreTokenizerKind, space_first: bool = False) -> PreTokenizer:
    """Split as `kind` says, then spell the words in the byte alphabet.

    `space_first` puts a space before the text, with GPT-2's split alone.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits: list[PreTokenizer] = [Split(Regex(pattern), behavior="isolated") for pattern in kind.splits]
    if space_first and kind.splits == (GPT2,):
        return ByteLevel(add_prefix_space=True, use_regex=True)  # the library's own split is GPT-2's
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


# What ends a turn in the chat formats in use; files often name only one of the tokens their model ends with.
_ENDS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<|return|>", "<|call|>", "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|eot|>"),
        *("<EOT>", "_<EOT>", "\u2581<EOT>", "[EOT]", "<|endofturn|>", "<|END_OF_TURN_TOKEN|>"),
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
        backend, add_bos = _byte_level(vocabulary), kind_of(vocabulary.pre).add_bos
    elif vocabulary.model in ("llama", "t5"):
        backend, add_bos = _sentencepiece(vocabulary), vocabulary.model == "llama"
    else:
        raise TokenizerError(
            f"the file's tokenizer is of kind {vocabulary.model!r}; supported are gpt2, llama and t5",
            hint="open the model's Hugging Face folder instead",
        )
    _add_special_tokens(backend, vocabulary)
    names = {"temp": "temperature", "penalty_repeat": "repetition_penalty"}
    own = {k.rpartition(".")[2]: metadata[k] for k in metadata if k.startswith("general.sampling.")}
    sampling = advised_sampling({names.get(name, name): value for name, value in own.items()})
    add_bos = vocabulary.flags.get("add_bos_token", add_bos)
    add_eos = vocabulary.flags.get("add_eos_token", vocabulary.model == "t5")
    frame(
        backend,
        bos=vocabulary.ids.get("bos") if add_bos else None,
        eos=vocabulary.ids.get("eos") if add_eos else None,
    )
    return backend, replace(_fields(backend, vocabulary), sampling=sampling)


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
    kind = kind_of(vocabulary.pre)
    merges = [_halves(merge) for merge in vocabulary.merges]
    try:
        model = BPE(_spelled(vocabulary), merges, ignore_merges=kind.whole_words)
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{KEY}merges do not fit the tokens: {error}", hint=AGAIN) from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = split_words(kind)
    backend.decoder = decoders.ByteLevel()
    return backend


def _halves(merge: str) -> tuple[str, str]:
    """The two tokens that a merge joins; a blank that begins the first is part of it, as llama.cpp has it."""
    at = merge.find(" ", 1)
    if at < 0 or at == len(merge) - 1:
        raise TokenizerError(f"{KEY}merges: {merge[:60]!r} is no pair of tokens", hint=AGAIN)
    return merge[:at], merge[at + 1 :]


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
    return sentencepiece.build(
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
    if not ends:
        _log.warning("the file names no token that ends a text: answers end where a limit is met")
    return TokenizerFields(
        bos_id=vocabulary.ids.get("bos"),
        eos_ids=tuple(dict.fromkeys(ends)),
        vocab_size=backend.get_vocab_size(),
        special_tokens=MappingProxyType(tokens),
        chat_templates=MappingProxyType(dict(vocabulary.chat_templates)),
    )
