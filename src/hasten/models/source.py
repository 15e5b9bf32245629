"""An opened model: its configuration, tensors as the files hold them, tokenizer and the files themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cache import digest
from hasten.core import ModelSpec
from hasten.weights.tensors import SourceTensor

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class SourceFile:
    """A file the model was read from. `sha256` is None until someone needs it: see `sha256_of`."""

    path: Path
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened model. Tensors are views of mapped files: nothing is read until it is used.

    `unused` lists the tensors of the files that the decoder has no use for (stored rotary frequencies, the
    vision half of Gemma 3, a head that is tied). All others were matched, name for name and shape for shape.
    """

    name: str
    config: ModelSpec
    tensors: dict[str, SourceTensor]
    files: tuple[SourceFile, ...]
    unused: tuple[str, ...]
    load_tokenizer: Callable[[], Tokenizer] = field(repr=False, compare=False)  # `tokenizer` calls it once
    metadata: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # general.* of GGUF

    @cached_property
    def content(self) -> str:
        """Digest of the configuration and all tensors, 64 hexadecimal digits: what kept work belongs to.

        Reads each tensor once in its life (two cores: 0.15 s a GB that is in memory). The files' own digests
        would not do: a source may hold other values than the files it came from. The name does not count.
        """
        state = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name}\0".encode() + tensor.content)
        return state.hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built at the first call.

        Raises:
            TokenizerError: its files or metadata are missing or of a kind that is not supported.
        """
        return self.load_tokenizer()


def once(load: Callable[[], Tokenizer]) -> Callable[[], Tokenizer]:
    """`load`, called the first time only; later calls return what it gave."""
    return lru_cache(maxsize=1)(load)


def sha256_of(file: SourceFile) -> str:
    """SHA-256 of a source file as 64 hexadecimal digits; reads the file unless the digest is known.

    Raises:
        OSError: the file cannot be read any more.
    """
    return file.sha256 if file.sha256 is not None else digest(file.path)
