"""Text of tokens as they come: only whole characters, at a constant cost a token.

Decoding everything again for each token would be quadratic. A decoder of the `tokenizers` library is instead
taken as a chain of small stages that each keep what is not final yet: the bytes of an unfinished character, a
run of byte tokens, the leading space. The pieces joined are exactly what decoding the whole sequence gives.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from hasten.errors import TokenizerError

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


class _ByteLevel:
    """Characters of the byte alphabet to UTF-8; a piece with any other character stands for itself."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._bytes = _alphabet_bytes()

    def push(self, piece: str) -> list[str]:
        try:
            raw = bytes([self._bytes[character] for character in piece])
        except KeyError:
            raw = piece.encode()
        return [self._utf8.decode(raw)]

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
        return "" if token is None else "".join(self._through([token], 0))

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
