"""The text a model is judged on, cut into windows.

Default: the prose and code of `pydoc_data.topics`, the language reference every CPython carries (about 106
thousand tokens). Its wording differs a little between Python versions, so every result records the sha256 of
the text it was measured on. Calibration (layer sensitivity) and evaluation never share a topic.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hasten.cache.reading import read_text_stream
from hasten.errors import UsageError

WINDOW = 512
"""Predictions a window holds: the model reads this many tokens from an empty cache."""

_CALIBRATION_EVERY = 5  # every fifth topic calibrates: a fifth of the text is far more than sensitivity needs
_SMALLEST_WINDOW = 16
_LARGEST = 1 << 30  # bytes of a file: all of it is read


class Encoder(Protocol):
    """What a text needs of a tokenizer."""

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


@dataclass(frozen=True)
class Text:
    """Two texts without overlap: one to decide on, one to judge by."""

    name: str
    calibration: str
    evaluation: str

    @property
    def sha256(self) -> str:
        """Digest of both parts, in UTF-8; it goes into every result and cache key."""
        digest = hashlib.sha256(self.evaluation.encode())
        digest.update(b"\0")
        digest.update(self.calibration.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Window:
    """One stretch of text: `inputs` are read from an empty cache, `targets` come next at each place."""

    inputs: npt.NDArray[np.int32]  # [T]
    targets: npt.NDArray[np.int32]  # [T]


def default_text() -> Text:
    """Topics of `pydoc_data.topics` in alphabetical order, every fifth one for calibration.

    Topics quote one another: a paragraph counts where it comes first, so that no topic repeats another's.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    parts: tuple[list[str], list[str]] = ([], [])
    for number, name in enumerate(sorted(topics)):
        own = _unseen(topics[name], seen)
        if own:
            parts[number % _CALIBRATION_EVERY == 0].append(own)
    evaluation, calibration = ("\n\n".join(part) for part in parts)
    return Text(name="pydoc_data.topics", calibration=calibration, evaluation=evaluation)


def _unseen(topic: str, seen: set[str]) -> str:
    """The paragraphs of a topic that came in none before; indentation and line breaks do not count."""
    own = []
    for paragraph in topic.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if words not in seen:
            own.append(paragraph)
            seen.add(words)
    return "\n\n".join(own)


def text_from_file(path: str | Path) -> Text:
    """The user's own text: the last fifth calibrates, the rest judges, cut at a line end.

    Raises:
        UsageError: the file cannot be read, is not UTF-8 or holds no text.
    """
    path = Path(path)
    content = read_text_stream(path, _LARGEST, "text file", "give --text a readable UTF-8 file")
    if not content.strip():
        raise UsageError(f"text file {path} is empty", hint="give --text a file of some thousand words")
    cut = content.rfind("\n", 0, len(content) * (_CALIBRATION_EVERY - 1) // _CALIBRATION_EVERY) + 1
    cut = cut or len(content) * (_CALIBRATION_EVERY - 1) // _CALIBRATION_EVERY
    return Text(name=path.name, calibration=content[cut:], evaluation=content[:cut])


def windows(text: str, tokenizer: Encoder, *, tokens: int, length: int = WINDOW) -> tuple[Window, ...]:
    """Windows of `length` predictions, about `tokens` of them together, spread over the whole text.

    The first windows of a longer list are those of a shorter one, and any first few are spread evenly
    (bit-reversed order), so that screening on a few windows and judging on all of them reads the same text.

    Args:
        text: what to cut.
        tokenizer: of the model; where it opens a text with a special token, every window opens with it.
        tokens: predictions wanted; fewer come back where the text is shorter.
        length: predictions a window holds.

    Raises:
        UsageError: the text is shorter than 16 tokens, or `tokens` is below 1.
    """
    if tokens < 1:
        raise UsageError(f"cannot judge on {tokens} tokens", hint="give --tokens 8192")
    ids = np.asarray(tokenizer.encode(text, add_special=False), dtype=np.int32)
    start = _opening(tokenizer)
    stretch = length + 1 - start.size  # the first token is read but never predicted
    if ids.size < min(stretch, _SMALLEST_WINDOW):
        raise UsageError(
            f"the text has {ids.size} tokens, too few to judge on",
            hint="give --text a file of some thousand words",
        )
    cuts = [ids[at : at + stretch] for at in range(0, max(ids.size - stretch + 1, 1), length)]
    wanted = -(-tokens // length)
    picked = [np.concatenate([start, cuts[i]]) for i in _spread(len(cuts))[:wanted]]
    return tuple(Window(inputs=cut[:-1], targets=cut[1:]) for cut in picked)


def _opening(tokenizer: Encoder) -> npt.NDArray[np.int32]:
    """The special token a text opens with, [1], or [0] for models trained without one."""
    plain = tokenizer.encode("a", add_special=False)
    opened = tokenizer.encode("a", add_special=True)
    ours = opened[:1] if len(opened) > len(plain) and opened[:1] != plain[:1] else []
    return np.asarray(ours, dtype=np.int32)


def _spread(count: int) -> list[int]:
    """0..count-1 in bit-reversed order: every prefix is spread over the range (van der Corput, 1935)."""
    bits = max(count - 1, 1).bit_length()
    order = (int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits))
    return [i for i in order if i < count]
