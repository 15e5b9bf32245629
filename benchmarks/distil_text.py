"""Text that every machine with a Python carries, to distil on: source files and docstrings.

The standard library's own source, the docstrings of whatever packages are installed, and the calibration half
of the default text. What judges later (`default_text().evaluation`) is kept out: no paragraph that occurs
there, and none that shares 13 words in a row with it (the rule of Brown et al. 2020, arXiv:2005.14165,
appendix C).
"""

from __future__ import annotations

import ast
import multiprocessing
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bar import say
from hasten.models.open import open_model
from hasten.quality.text import default_text

RUN = 13  # words in a row that may not occur in the evaluation text
SKIPPED = {"pydoc_data", "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SHORTEST = 200  # characters of a docstring worth reading
_FILE_BYTES = 2_000_000
_state: dict[str, Any] = {}


@dataclass(frozen=True)
class Forbidden:
    """What must not be trained on."""

    paragraphs: frozenset[str]
    runs: frozenset[int]  # hashes of 13 words in a row

    @classmethod
    def of(cls, text: str) -> Forbidden:
        """Everything in a text."""
        paragraphs = frozenset(" ".join(part.split()) for part in text.split("\n\n"))
        return cls(paragraphs, frozenset(_runs(text)))

    def clean(self, text: str) -> str:
        """The paragraphs of a text that may be read."""
        kept = [part for part in text.split("\n\n") if not self._holds(part)]
        return "\n\n".join(kept).strip()

    def _holds(self, paragraph: str) -> bool:
        words = " ".join(paragraph.split())
        if not words:
            return False
        return (len(words) > 20 and words in self.paragraphs) or any(
            run in self.runs for run in _runs(paragraph)
        )


def _runs(text: str) -> Iterator[int]:
    words = text.lower().split()
    return (hash(tuple(words[at : at + RUN])) for at in range(len(words) - RUN + 1))


def source_files() -> list[Path]:
    """The standard library's own, tests left out."""
    top = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(top.rglob("*.py")) if not SKIPPED & set(path.relative_to(top).parts)]


def package_files() -> list[Path]:
    """Python files of installed packages, tests left out."""
    top = Path(sysconfig.get_paths()["purelib"])
    skipped = SKIPPED - {"site-packages", "dist-packages"}
    return [path for path in sorted(top.rglob("*.py")) if not skipped & set(path.relative_to(top).parts)]


def docstrings(source: str) -> str:
    """All docstrings of a file that are long enough, one after another."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) >= SHORTEST)


def _prepare(model: str, forbidden: Forbidden) -> None:
    _state["tokenizer"] = open_model(model).tokenizer()
    _state["forbidden"] = forbidden


def _read(job: tuple[Path, bool]) -> npt.NDArray[np.int32]:
    path, is_source = job
    try:
        if path.stat().st_size > _FILE_BYTES:
            return np.zeros(0, np.int32)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return np.zeros(0, np.int32)
    return _encoded(text if is_source else docstrings(text))


def _encoded(text: str) -> npt.NDArray[np.int32]:
    text = _state["forbidden"].clean(text)
    found = _state["tokenizer"].encode(text, add_special=False) if text else []
    return np.asarray(found, np.int32)


def windows(
    model: str, *, tokens: int, length: int, cores: int, seed: int = 0
) -> dict[str, npt.NDArray[np.int32]]:
    """Windows of ids by kind of text, int32 [N, length].

    Args:
        model: whose tokenizer.
        tokens: most of installed packages' docstrings; all else is read whole.
        length: of a window.
        cores: processes that read and encode.
        seed: of which package files are read.
    """
    text = default_text()
    forbidden = Forbidden.of(text.evaluation)
    packages = package_files()
    np.random.default_rng(seed).shuffle(packages)  # type: ignore[arg-type]
    end = open_model(model).config.eos_token_ids[:1]
    # fork: hashes of words must be the same in all processes
    with multiprocessing.get_context("fork").Pool(cores, _prepare, (model, forbidden)) as pool:
        sources = list(pool.imap(_read, [(path, True) for path in source_files()], chunksize=8))
        say(f"standard library: {sum(map(len, sources)):,} tokens")
        kept, count = [], 0
        for found in pool.imap(_read, [(path, False) for path in packages], chunksize=16):
            kept.append(found)
            count += len(found)
            if count >= tokens:
                break
        say(f"docstrings of packages: {count:,} tokens")
        pool.terminate()
    _prepare(model, Forbidden(frozenset(), frozenset()))  # the split itself keeps these apart
    topics = [_encoded(text.calibration)]
    found = {"topics": topics, "sources": sources, "docstrings": kept}
    return {name: _cut(parts, end, length) for name, parts in found.items()}


def _is_clean(row: npt.NDArray[np.int32]) -> bool:
    text = _state["tokenizer"].decode(row.tolist())
    return not any(run in _state["forbidden"].runs for run in _runs(text))


def clean(model: str, ids: npt.NDArray[np.int32], cores: int) -> npt.NDArray[np.int32]:
    """The windows [N, T] that share no 13 words in a row with the evaluation text: a model quotes, too."""
    forbidden = Forbidden.of(default_text().evaluation)
    with multiprocessing.get_context("fork").Pool(cores, _prepare, (model, forbidden)) as pool:
        flags = np.asarray(pool.map(_is_clean, ids, chunksize=256), np.bool_)
    return ids[flags]


def _cut(parts: Sequence[npt.NDArray[np.int32]], end: Sequence[int], length: int) -> npt.NDArray[np.int32]:
    stop = np.asarray(end, np.int32)
    joined = np.concatenate([piece for part in parts if len(part) for piece in (part, stop)] or [stop])
    count = len(joined) // length
    return joined[: count * length].reshape(count, length)
