"""Text of tokens as they come: only whole characters, at a constant cost a token.

Decoding everything again for each token would be quadratic. A decoder of the `tokenizers` library is instead
taken as a chain of small stages that each keep what is not final yet: the bytes of an unfinished character, a
run of byte tokens, the leading space. The pieces joined are exactly what decoding the whole sequence gives.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from hasten.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class _Stage(Protocol):
    def push(self, piece: str) -> list[str]: ...

    def flush(self) -> list[str]: ...


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes as visible characters (Radford et al. 2019, `bytes_to_unicode`)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spelling = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        spelling.setdefault(byte, chr(256 + len(spelling) - len(visible)))
    return spelling


@functools.cache
def _alphabet_bytes() -> dict[str, int]:
    return {character: byte for byte, character in byte_alphabet().items()}


@functools.lru_cache(1 << 16)
def _raw(piece: str) -> bytes:
    """The bytes of a piece; kept, as texts use few tokens often."""
    spelling = _alphabet_bytes()
    try:
        return bytes([spelling[character] for character in piece])
    except KeyError:
        return piece.encode()


class _ByteLevel:
    """Characters of the byte alphabet to UTF-8; a piece with any other character stands for itself."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        return [self._utf8.decode(_raw(piece))]

    def flush(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """Runs of `<0xE2>` tokens to text.

    A run that is not UTF-8 as a whole gives one U+FFFD a byte, so it is final when another token ends it.
    """

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        match = BYTE_TOKEN.fullmatch(piece)
        if match:
            self._run.append(int(match.group(1), 16))
            return []
        return [*self.flush(), piece]

    def flush(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        if not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _Map:
    """Each piece by itself."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def push(self, piece: str) -> list[str]:
        return [self._function(piece)]

    def flush(self) -> list[str]:
        return []


class _Metaspace:
    """The space symbol to a space; dropped in the first piece where encoding had put it there."""

    def __init__(self, symbol: str, prefixed: bool) -> None:
        self._symbol = symbol
        self._drop = prefixed

    def push(self, piece: str) -> list[str]:
        replacement = "" if self._drop else " "
        self._drop = False
        return [piece.replace(self._symbol, replacement)]

    def flush(self) -> list[str]:
        return []


class _StripStart:
    """At most `count` leading characters of the whole text, where they are `content`."""

    def __init__(self, content: str, count: int) -> None:
        self._content = content
        self._left = count

    def push(self, piece: str) -> list[str]:
        while self._left and piece:
            if not piece.startswith(self._content):
                self._left = 0
                break
            piece = piece[len(self._content) :]
            self._left -= 1
        return [piece]

    def flush(self) -> list[str]:
        return []


def _stage(spec: Mapping[str, Any], fused: bool) -> _Stage | None:
    """One stage of a decoder as tokenizer.json spells it; None where it changes nothing."""
    match spec:
        case {"type": "ByteLevel"}:
            return _ByteLevel()
        case {"type": "ByteFallback"}:
            return _ByteFallback()
        case {"type": "Fuse"}:
            return None
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return _Map(lambda piece: piece.replace(old, new))
        case {"type": "Metaspace", "replacement": str(symbol)}:
            return _Metaspace(symbol, spec.get("prepend_scheme", "always") != "never")
        case {"type": "Strip", "content": str(content), "start": int(start), "stop": 0} if fused:
            return _StripStart(content, start)
    raise TokenizerError(
        f"text cannot be streamed through this tokenizer's decoder: no rule for {dict(spec)}",
        hint="use a tokenizer with a byte-level or SentencePiece decoder, or decode the whole at once",
    )


def _stages(decoder: Mapping[str, Any]) -> list[_Stage]:
    specs = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    stages: list[_Stage] = []
    fused = False
    for spec in specs:
        fused = fused or spec.get("type") in ("Fuse", "ByteLevel")
        stage = _stage(spec, fused)
        if stage is not None:
            stages.append(stage)
    return stages


class TextStream:
    """Turns token ids into text piece by piece.

    Args:
        token_of: the token string of an id, None where the id has none (such ids give no text).
        decoder: the decoder as tokenizer.json spells it.
        skip: ids that give no text, the special ones.

    Raises:
        TokenizerError: the decoder has a part that cannot be streamed.
    """

    def __init__(
        self,
        token_of: Callable[[int], str | None],
        decoder: Mapping[str, Any],
        skip: Collection[int] = frozenset(),
    ) -> None:
        self._token_of = token_of
        self._skip = skip
        self._stages = _stages(decoder)

    def push(self, token_id: int) -> str:
        """The text that this token makes final; empty while a character is unfinished."""
        if token_id in self._skip:
            return ""
        token = self._token_of(token_id)
        if token is None:
            return ""
        if len(self._stages) == 1:  # byte-level decoders are one stage
            return "".join(self._stages[0].push(token))
        return "".join(self._through([token], 0))

    def flush(self) -> str:
        """The text still held back; what is no UTF-8 comes as U+FFFD."""
        return "".join(
            piece
            for index, stage in enumerate(self._stages)
            for piece in self._through(stage.flush(), index + 1)
        )

    def _through(self, pieces: list[str], first: int) -> list[str]:
        for stage in self._stages[first:]:
            pieces = [out for piece in pieces for out in stage.push(piece)]
        return pieces


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


def cutter(backend: Backend) -> Callable[[str], list[str]] | None:
    """A function that cuts a text behind special tokens so that each piece encodes on its own.

    The `tokenizers` library takes added tokens out first (those that no normalizer changes) and then treats
    what is between them piece by piece (AddedVocabulary.extract_and_normalize), so a cut behind one changes
    nothing; unless the token takes blanks beside it with it, or the parts that follow treat the first piece
    in another way (Metaspace, prefix spaces, normalizers that prepend).

    Returns:
        None where that may not hold.
    """
    tokens = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized]
    if not tokens or any(t.lstrip or t.rstrip or t.single_word for t in tokens):
        return None
    if not (_is_local(backend.pre_tokenizer) and _is_local(backend.normalizer)):
        return None
    texts = sorted(
        {t.content for t in tokens if t.content}, key=len, reverse=True
    )  # the longest that matches wins
    behind = re.compile("|".join(map(re.escape, texts)))

    def cut(text: str) -> list[str]:
        ends = [match.end() for match in behind.finditer(text)]
        starts = [0, *(end for end in ends if end < len(text))]
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]

    return cut


_LOCAL = {"ByteLevel", "Split", "Digits", "Punctuation", "Sequence", "NFC", "NFKC", "NFD", "NFKD"}


def _is_local(part: Any) -> bool:
    """Whether a pre-tokenizer or normalizer treats a piece the same wherever it stands."""
    if part is None:
        return True
    found = json.loads(part.__getstate__())
    inner = found.get("pretokenizers", found.get("normalizers", []))
    return all(p.get("type") in _LOCAL and not p.get("add_prefix_space") for p in [found, *inner])


NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFields:
    """The small part of a tokenizer, known before its vocabulary is parsed.

    `special_tokens` maps the names that chat templates use (`bos_token`, `eos_token` ...) to token text;
    `chat_templates` maps `default` and further names (`tool_use`) to Jinja source. `sampling` is how the
    model's authors advise to sample, by the names of `SamplingOptions`; empty where they say nothing.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # generation stops at any of these; the tokenizer's own eos first
    vocab_size: int = 0  # tokens that have an id, added ones included
    special_tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    chat_templates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    sampling: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


_SAMPLING: dict[str, tuple[float, float]] = {  # what generation_config.json and GGUF may say, and its range
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "top_k": (0.0, 2**31 - 1),
    "repetition_penalty": (1e-6, 100.0),
}


def advised_sampling(found: Mapping[str, Any]) -> Mapping[str, float]:
    """The sampling that a model's authors advise, out of generation_config.json or keys of these names.

    `do_sample: false` is greedy. Numbers out of their range, and null, count as not given.
    """
    kept = {
        name: float(value)
        for name, (low, high) in _SAMPLING.items()
        if isinstance(value := found.get(name), (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
    }
    if found.get("do_sample") is False:
        kept = {name: value for name, value in kept.items() if name == "repetition_penalty"}
        kept["temperature"] = 0.0
        return MappingProxyType(kept)
    if found.get("do_sample") and "temperature" not in kept:
        kept["temperature"] = 1.0
    return MappingProxyType(kept)
