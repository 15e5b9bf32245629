"""The text a model is calibrated on, in windows of ids: the default, a file of text or rows, a dataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hasten.cache.reading import read_text_stream
from hasten.core import ModelSpec
from hasten.errors import HastenError, MachineError, UsageError
from hasten.models.source import Source
from hasten.quality.text import Encoder, default_text, windows

TOKENS = 16_384
"""Tokens read where nobody says how many."""
LENGTH = 512
"""Tokens a window holds: what evaluation reads at once, too."""
FEWEST = 2_048
"""Below this, second moments of a thousand inputs are mostly chance."""


@dataclass(frozen=True)
class Calibration:
    """Windows of text, each read from an empty cache."""

    name: str
    ids: npt.NDArray[np.int32]  # [B, T]

    @property
    def tokens(self) -> int:
        """All of them."""
        return int(self.ids.size)

    @property
    def sha256(self) -> str:
        """Digest of the ids and their shape: goes into every cache key."""
        return hashlib.sha256(repr(self.ids.shape).encode() + self.ids.tobytes()).hexdigest()


def cut(
    name: str, text: str, tokenizer: Encoder, *, tokens: int = TOKENS, length: int = LENGTH
) -> Calibration:
    """Windows of `length` tokens spread evenly over a text.

    Raises:
        UsageError: the text has too few tokens to calibrate on.
    """
    count = len(tokenizer.encode(text, add_special=False))
    if count < min(FEWEST, tokens):
        raise UsageError(
            f"{name} has {count:,} tokens of calibration text, too few: {FEWEST:,} are the least",
            hint="give --calibration a text of some thousand words, or leave it out for the default text",
        )
    found = windows(
        text, tokenizer, tokens=min(tokens, count // length * length), length=min(length, count - 1)
    )
    return Calibration(name, np.stack([window.inputs for window in found]))


def statistics_bytes(config: ModelSpec) -> int:
    """Of what each group of matrices reads: half of [inputs, inputs] in fp16."""
    read_once = (".q", ".o", ".gate", ".down", "head", "embed")  # q, k and v read the same, gate and up too
    shapes = config.linear_shapes()
    return sum(cols * cols for name, (_, cols) in shapes.items() if name.endswith(read_once))


def work_key(source: Source, calibration: Calibration | None, *how: object) -> str:
    """What kept work belongs to: 32 hexadecimal digits that differ where model, text or `how` do."""
    text = None if calibration is None else calibration.sha256
    return hashlib.sha256(repr((source.content, text, how)).encode()).hexdigest()[:32]


_log = logging.getLogger("hasten.compress")

_LARGEST = 1 << 30  # bytes of a file: all of it is read
_CHARACTERS_A_TOKEN = 64  # text kept for each token wanted; a token of prose is about four characters
_STRETCH = 8192  # characters of a text file that stay together where it is thinned out
_SHARED_LETTERS = 40  # shorter paragraphs ("See also:") stand in many texts
_ROW_HINT = 'a row has "text", or "messages", or "prompt" and "completion"'
_DATASET = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[^:]+))?(?::(?P<column>[^:]+))?"
)


class Chatter(Encoder, Protocol):
    """What is needed of a tokenizer: chats as text, too."""

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str: ...


def calibration_from(
    spec: str | Path | None,
    tokenizer: Chatter,
    tokens: int = TOKENS,
    *,
    said: Callable[[str], object] = _log.warning,
) -> Calibration:
    """Windows of calibration text from what the user names.

    A large file is thinned out evenly; of a dataset the first rows are read. Text that the default evaluation
    text holds too is used, and said.

    Args:
        spec: None is the default text's calibration part. A path: `.jsonl` has a row of JSON a line, anything
            else is UTF-8 text. Else a dataset, `owner/name[/config][:split[:column]]`, through the package
            `datasets`. A row is its `text`, its `messages` through the chat template, or its `prompt` and
            `completion` joined.
        tokens: how many to read, about.
        said: told what is no mistake and yet worth knowing.

    Raises:
        UsageError: text that is missing, not UTF-8, too little, or a row that has none (its number is named).
        MachineError: a dataset without the package `datasets`, or that cannot be had.
        TokenizerError: messages, and the model has no chat template.
    """
    if spec is None:
        default = default_text()
        return cut(default.name, default.calibration, tokenizer, tokens=tokens)
    most = _CHARACTERS_A_TOKEN * max(tokens, 1)
    if _is_file(spec):
        path = Path(spec).expanduser()
        name, parts = path.name, _thinned(_parts_of_file(path, tokenizer), most, path.name, said)
        text = ("\n\n" if _has_rows(path) else "").join(parts)
    else:
        name, text = str(spec), "\n\n".join(_first(_rows_of_dataset(str(spec), tokenizer), most))
    _say_if_shared(name, text, said)
    return cut(name, text, tokenizer, tokens=tokens)


def _is_file(spec: str | Path) -> bool:
    path = Path(spec).expanduser()
    is_dataset = isinstance(spec, str) and _DATASET.fullmatch(spec) and not spec.startswith((".", "~", "/"))
    return path.exists() or not is_dataset or path.suffix.lower() in (".txt", ".md", ".jsonl", ".json")


def _has_rows(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _parts_of_file(path: Path, tokenizer: Chatter) -> list[str]:
    """Rows of JSON lines, or stretches of a text that end where a line does."""
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size > _LARGEST:
            raise UsageError(
                f"calibration text {path} has {path.stat().st_size / 1e9:.1f} GB; a thousandth is enough",
                hint=f"take a part of it: head -c 50000000 {path} > part{path.suffix}",
            )
    hint = "give --calibration a readable UTF-8 text, a .jsonl file or a dataset such as owner/name"
    text = read_text_stream(path, _LARGEST, "calibration text", hint)
    if _has_rows(path):
        return list(_rows_of_lines(text, str(path), tokenizer))
    return re.findall(rf"(?s).{{1,{_STRETCH}}}[^\n]*\n?", text)


def _rows_of_lines(text: str, where: str, tokenizer: Chatter) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON may hold U+2028
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as wrong:
            reason = getattr(wrong, "msg", None) or "cannot be read"
            raise UsageError(
                f"{place} is no JSON: {reason}", hint=f"one object a line; {_ROW_HINT}"
            ) from None
        if not isinstance(row, dict):
            raise UsageError(f"{place} is no JSON object", hint=_ROW_HINT)
        yield _row_text(row, place, tokenizer)


def _row_text(row: Mapping[str, Any], place: str, tokenizer: Chatter) -> str:
    """One row as text.

    Raises:
        UsageError: it has none of the known fields, or one of a wrong type.
        TokenizerError: messages that the chat template refuses.
    """
    if "text" in row:
        return _text(row["text"], "text", place)
    if "messages" in row:
        return _chat(row["messages"], place, tokenizer)
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _chat([*prompt, *completion], place, tokenizer)
        return _text(prompt, "prompt", place) + _text(completion, "completion", place)
    found = ", ".join(map(repr, list(row)[:4])) or "nothing"
    raise UsageError(f"{place} has no text: it has {found}", hint=_ROW_HINT)


def _chat(messages: Any, place: str, tokenizer: Chatter) -> str:
    try:
        return tokenizer.apply_chat(messages, add_generation_prompt=False)
    except HastenError as wrong:
        raise type(wrong)(f"{place}: {wrong.message}", hint=wrong.hint) from None


def _text(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{place}: {field!r} must be text, got {type(value).__name__}", hint=_ROW_HINT)
    try:
        value.encode()
    except UnicodeEncodeError as wrong:
        raise UsageError(
            f"{place}: {field!r} is no Unicode: lone surrogate at character {wrong.start}",
            hint="leave the row out",
        ) from None
    return value


def _rows_of_dataset(spec: str, tokenizer: Chatter) -> Iterator[str]:
    """Rows of a Hugging Face dataset, streamed: no more is downloaded than is read."""
    if find_spec("datasets") is None:
        raise MachineError(
            f"there is no file {spec}, and a Hugging Face dataset needs the package datasets",
            hint="pip install datasets, or give --calibration a text file",
        )
    parts = _DATASET.fullmatch(spec)
    assert parts is not None, spec
    column = parts["column"]
    try:
        import datasets

        rows = datasets.load_dataset(
            parts["name"], parts["config"], split=parts["split"] or "train", streaming=True
        )
        for number, row in enumerate(rows, start=1):
            place = f"{spec}, row {number}"
            if column is None:
                yield _row_text(row, place, tokenizer)
            elif column in row:
                yield _text(row[column], column, place)
            else:
                raise UsageError(
                    f"{place} has no column {column!r}", hint=f"columns are {', '.join(map(str, row))}"
                )
    except HastenError:
        raise
    except Exception as wrong:  # the library's own errors share no base
        reason = " ".join(str(wrong).split())[:300] or type(wrong).__name__
        raise MachineError(
            f"dataset {spec} cannot be read: {reason}",
            hint="check its name, split and the network, or give --calibration a text file",
        ) from wrong


def _first(rows: Iterable[str], most: int) -> list[str]:
    found, letters = [], 0
    for row in rows:
        found.append(row)
        letters += len(row)
        if letters >= most:
            break
    return found


def _thinned(parts: list[str], most: int, name: str, said: Callable[[str], object]) -> list[str]:
    """Every n-th part, so that about `most` characters are left."""
    step = sum(map(len, parts)) // most + 1
    if step > 1 and len(parts) > step:
        said(f"{name} is longer than needed: every {step}th part of it is read")
        return parts[::step]
    return parts


def _say_if_shared(name: str, text: str, said: Callable[[str], object]) -> None:
    """Evaluation text seen in calibration makes quality look better than it is."""
    held_out = _paragraphs(default_text().evaluation)
    mine = _paragraphs(text)
    shared = mine & held_out
    if shared:
        said(
            f"{len(shared)} of {len(mine)} paragraphs of {name} are in the default evaluation text, too: "
            "what `hasten eval` measures on it will look better than it is (judge with --text another file)"
        )


def _paragraphs(text: str) -> set[str]:
    """Paragraphs worth comparing; indentation and line breaks do not count."""
    found = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return {part for part in found if len(part) >= _SHARED_LETTERS}
