"""The `tokenizer.ggml.*` metadata of a GGUF file, checked.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hasten.errors import TokenizerError
from hasten.models.sentencepiece_tokenizer import PieceType

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
        return cls(
            model=text_of(metadata, KEY + "model") or "",
            pre=text_of(metadata, KEY + "pre") or "default",
            architecture=text_of(metadata, "general.architecture") or "",
            tokens=tokens,
            scores=_numbers(metadata, "scores", len(tokens), 0.0),
            types=_types(metadata, len(tokens)),
            merges=_strings(metadata, "merges"),
            ids={name: found for name, found in ids.items() if found is not None},
            flags={name: bool(metadata[KEY + name]) for name in _FLAGS if KEY + name in metadata},
            charsmap=_bytes(metadata, "precompiled_charsmap"),
            chat_templates=_templates(metadata),
        )

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
    if value is None or value == _NO_TOKEN:
        return None
    if not hasattr(value, "__index__") or not 0 <= (number := int(value)) < count:
        raise TokenizerError(f"{KEY}{name} is {value!r}, which is no id of the {count} tokens", hint=AGAIN)
    return number


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
