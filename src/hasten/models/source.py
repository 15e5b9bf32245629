"""An opened model: its configuration, tensors as the files hold them, tokenizer and the files themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import digest
from hasten.core import ModelConfig
from hasten.models.tensor_type import TYPES

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


Bytes = npt.NDArray[np.uint8]
_PIECE_BYTES = 1 << 22  # threads share the work by pieces


class _Data:
    """The bytes of a tensor, or the function that makes them, called anew each time they are read."""

    def __set__(self, tensor: object, value: Bytes | Callable[[], Bytes]) -> None:
        vars(tensor)["_data"] = value

    def __get__(self, tensor: object | None, owner: type) -> Bytes:
        if tensor is None:
            raise AttributeError("data")  # tells dataclass that the field has no default
        value: Bytes | Callable[[], Bytes] = vars(tensor)["_data"]
        return value() if callable(value) else value


@dataclass(frozen=True)
class SourceTensor:
    """One tensor, not converted: a view of the mapped file and what its bytes mean.

    A matrix of a GPTQ, AWQ or compressed-tensors checkpoint is no view: it is made with a function, and
    reading `data` unpacks the file's integers, each time anew, so that an opened model holds nothing twice.
    """

    name: str  # canonical name; in a file reader's hands the file's own name
    shape: tuple[int, ...]  # outermost first: [rows, cols] for matrices
    dtype: str  # a key of hasten.models.tensor_type.TYPES
    data: _Data = _Data()  # uint8 [nbytes], C-contiguous, rows in file order; not to be written to
    row_order: npt.NDArray[np.int64] | None = None  # [rows]: row r of the tensor is row row_order[r] of data
    offset: float = 0.0  # added to every value (Gemma's 1 + weight when the file lacks it)

    @property
    def rows(self) -> int:
        """Rows of a matrix; elements of a vector."""
        return self.shape[0]

    def part(self, name: str, first: int, count: int) -> SourceTensor:
        """`count` rows from `first` under another name, sharing the bytes; before a row order is set."""
        assert self.row_order is None and first >= 0 and first + count <= self.rows
        row_bytes = TYPES[self.dtype].bytes_of(self.shape) // self.rows
        cut = slice(first * row_bytes, (first + count) * row_bytes)
        data = (lambda: self.data[cut]) if self.is_made else self.data[cut]
        return SourceTensor(name, (count, *self.shape[1:]), self.dtype, data, offset=self.offset)

    @cached_property
    def content(self) -> bytes:
        """Digest of type, shape and every byte, 32 bytes: XXH64 of each 4 MiB at memory speed, computed once.

        Of a sample of the bytes it would not do: half the bytes of an F32 tensor that was bf16 are 0.
        """
        data = np.ascontiguousarray(self.data)
        order = b"" if self.row_order is None else self.row_order.tobytes()
        state = hashlib.sha256(f"{self.shape} {self.dtype} {self.offset} {len(order)}".encode() + order)
        sums = _native.checksums(data, _PIECE_BYTES, 0) if data.size else []
        state.update(np.array(sums, np.uint64).tobytes())
        return state.digest()

    @property
    def is_made(self) -> bool:
        """Whether `data` is made when it is read."""
        return callable(vars(self)["_data"])

    def __post_init__(self) -> None:
        assert self.is_made or len(self.data) == TYPES[self.dtype].bytes_of(self.shape), self.name


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
    config: ModelConfig
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
