"""How every file is opened for reading: a file and nothing else, so that no named pipe makes a program wait.

Opening a named pipe waits for a writer, and a device may have no end. Where one stands in place of a model's
file, the user must get an error and not a program that hangs. Texts that a user hands over once
(calibration text, a recipe, a trace) may come through a pipe: `read_stream` is for them.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK_BYTES = 1 << 20
_COARSE_NS = 2_100_000_000  # FAT counts in two seconds
_FINE_NS = 50_000_000  # Linux stamps files with the time of its last timer tick, at most 10 ms ago
PATIENCE_S = 10.0
"""How long a named pipe may have nobody who writes into it."""


class NotAFile(OSError):
    """Something else stands where a file belongs; `strerror` says what. Handlers of OSError cover it."""


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading bytes; links are followed. Never waits.

    Raises:
        NotAFile: a named pipe, a socket or a device is there.
        IsADirectoryError: a folder is there.
        OSError: it is missing or may not be read.
    """
    return io.BufferedReader(open_raw(path))


def open_raw(path: str | Path) -> io.FileIO:
    """As `open_file`, without a buffer: reads straight into the caller's memory.

    Raises:
        OSError: as `open_file`.
    """
    _refuse(os.stat(path).st_mode, path)  # before opening: opening alone moves some devices  # noqa: PTH116
    descriptor = os.open(path, _FLAGS)
    try:
        _refuse(os.fstat(descriptor).st_mode, path)  # it may have been put in the file's place just now
        return io.FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | Path, most: int | None = None) -> bytes:
    """All bytes of a regular file.

    Args:
        path: the file.
        most: bytes it may have; None is any number.

    Raises:
        OSError: as `open_file`; EFBIG where it has more than `most` bytes.
    """
    with open_raw(path) as file:
        if most is not None and os.fstat(file.fileno()).st_size > most:
            raise _too_large(path, most)
        return file.read()


_BEGINNINGS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, the file itself was not fetched", "git lfs pull"),
    (b"<!doctype html", "a web page", "download the file itself; a page often asks to log in or to agree"),
    (b"<html", "a web page", "download the file itself; a page often asks to log in or to agree"),
    (b"<?xml", "an answer of a server (XML), perhaps an error", "read it, and download the file again"),
    (b"gguf", "a GGUF file", "rename it to .gguf and open it"),
    (b"pk\x03\x04", "a zip archive, perhaps a pickle of PyTorch", "unpack it, or take safetensors or GGUF"),
    (b"\x80\x02", "a pickle of Python, which may run any program", "take safetensors or GGUF"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it: gunzip"),
    (b"\xfd7zxz", "compressed by xz", "unpack it: unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it: unzstd"),
    *(
        (magic, "a file for llama.cpp from before GGUF", "convert the original model again: GGUF is read")
        for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
    ),
)


def known_content(data: bytes | memoryview) -> tuple[str, str] | None:
    """What a file that is not what its name says is instead, and what to do; None: unknown.

    Args:
        data: the file, or at least its first 64 bytes.
    """
    if not data:
        return "an empty file", "download it again: the transfer was cut off"
    first = bytes(data[:64]).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for begins, what, hint in _BEGINNINGS:
        if first.startswith(begins):
            return what, hint
    if int.from_bytes(data[:8], "little") < 100_000_000 and bytes(data[8:9]) == b"{":
        return "a safetensors file", "rename it to .safetensors, and put its config.json beside it"
    if not first.strip(b"\0"):
        return "nothing but zeros where its beginning belongs", "download it again: the transfer was cut off"
    return None


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a regular file, line ends as \\n.

    Raises:
        OSError: as `open_file`.
        UnicodeDecodeError: it is no UTF-8.
    """
    return _decoded(read_file(path))


def read_array(path: str | Path) -> npt.NDArray[np.uint8]:
    """The bytes of a regular file in memory: uint8 [bytes].

    Raises:
        OSError: as `open_file`.
    """
    import numpy as np

    with open_raw(path) as file:
        return np.fromfile(file, np.uint8)


def map_array(path: str | Path) -> npt.NDArray[np.uint8]:
    """The bytes of a regular file, mapped and read-only: uint8 [bytes]. An empty file is an empty array.

    Raises:
        OSError: as `open_file`.
    """
    import numpy as np

    with open_raw(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return np.zeros(0, np.uint8)
        mapped: np.memmap[Any, np.dtype[np.uint8]] = np.memmap(file, np.uint8, "r")
        # numpy takes no name from a descriptor, and other processes ask for it to map the file too
        mapped.filename = str(Path(path).resolve())
        return mapped


def read_stream(path: str | Path, most: int) -> bytes:
    """All bytes of what a user hands over: a file, or a pipe such as /dev/stdin or bash's `<(command)`.

    A named pipe into which nobody writes is waited for `PATIENCE_S` seconds.

    Args:
        path: what was named.
        most: bytes it may have.

    Raises:
        NotAFile: a socket or a device that is no terminal, or a named pipe that nobody writes into.
        OSError: it is missing, may not be read, or is a folder; EFBIG where it has more than `most` bytes.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116
    is_terminal = stat.S_ISCHR(mode) and _is_terminal(path)
    if not (stat.S_ISFIFO(mode) or is_terminal or os.path.realpath(path) == os.devnull):
        return read_file(path, most)
    descriptor = os.open(path, _FLAGS)
    try:
        begin = _first_bytes(descriptor, path) if stat.S_ISFIFO(mode) else b""
        os.set_blocking(descriptor, True)
        parts, count = [begin], len(begin)
        while count <= most and (part := os.read(descriptor, _CHUNK_BYTES)):
            parts.append(part)
            count += len(part)
    finally:
        os.close(descriptor)
    if count > most:
        raise _too_large(path, most)
    return b"".join(parts)


def read_text_stream(path: Path, most: int, what: str, hint: str) -> str:
    """As `read_stream`, decoded: UTF-8, line ends as \\n.

    Args:
        what: the text's name in errors, such as "recipe file". hint: what else to give.

    Raises:
        UsageError: it cannot be read, or is no UTF-8.
    """
    try:
        return _decoded(read_stream(path, most))
    except OSError as wrong:
        raise UsageError(f"{what} {path}: {wrong.strerror or 'cannot be read'}", hint=hint) from wrong
    except UnicodeDecodeError as wrong:
        raise UsageError(
            f"{what} {path} is not UTF-8: byte {wrong.start} cannot be decoded",
            hint=f"convert it first: iconv -t utf-8 {path} > {path.stem}-utf8{path.suffix}",
        ) from wrong


def add_byte(path: Path) -> None:
    """One byte more in a file that counts: no lock is needed. A disk that cannot be written keeps no count.

    Nothing is written into what is no file, and nothing waits for a pipe's reader.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.write(descriptor, b".")
        finally:
            os.close(descriptor)


def is_there(path: str | Path) -> bool:
    """Whether anything has this name: a file, a pipe, or a link that leads nowhere.

    Optional files are asked for with it: what is there and cannot be read is an error when it is read, and is
    not passed over as if it were missing.
    """
    return os.path.lexists(path)


def _first_bytes(descriptor: int, path: str | Path) -> bytes:
    """Wait until a pipe has a writer; the first bytes, or none where it closed without a word."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            part = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:  # it has a writer, who is free to take long
            return b""
        if part or not _is_named(path):
            return part
        if time.monotonic() > end:
            raise NotAFile(errno.EINVAL, "a named pipe that nobody writes into", str(path))
        select.select([descriptor], [], [], 0.05)
        time.sleep(0.02)  # a pipe whose writers are gone counts as readable


def _is_named(path: str | Path) -> bool:
    """Whether a pipe has a name in a file system; others, such as `<(command)`, have writers already."""
    return Path(os.path.realpath(path)).exists()


def _is_terminal(path: str | Path) -> bool:
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        return os.isatty(descriptor)
    finally:
        os.close(descriptor)


def _refuse(mode: int, path: str | Path) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise NotAFile(errno.EINVAL, f"{kind} stands where a file belongs", str(path))


def _too_large(path: str | Path, most: int) -> OSError:
    size = f"{most:,} bytes" if most % (1 << 20) else f"{most >> 20:,} MB"
    return OSError(errno.EFBIG, f"more than {size}", str(path))


def _decoded(data: bytes) -> str:
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()


@dataclass(frozen=True)
class FileState:
    """Size, times and place of a file.

    Whoever changes a byte may set the modification time back, not `ctime`: that is the system's own, of the
    last change of content or attributes. A file put in another's place has another inode.
    """

    path: str  # absolute
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class FileStates:
    """Several files as they were at `seen_ns`, nanoseconds since 1970."""

    files: tuple[FileState, ...]
    seen_ns: int

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def is_settled(self) -> bool:
        """Whether a change after `seen_ns` is sure to show in the times.

        A file that was written within the clock's step before it was looked at can be written again within
        that step, and look the same (git calls it "racily clean").
        """
        return all(file.ctime_ns < self.seen_ns - _step_ns(file) for file in self.files)

    def is_unchanged(self) -> bool:
        """Whether the same files are there now, with the same sizes and times."""
        now = look(Path(file.path) for file in self.files)
        return now is not None and now.files == self.files


def look(paths: Iterable[Path]) -> FileStates | None:
    """The files as they are now, links followed; None where one is missing or cannot be looked at."""
    seen = time.time_ns()
    try:
        files = tuple(_state(path.absolute()) for path in paths)
    except OSError:
        return None
    return FileStates(files, seen)


def _state(path: Path) -> FileState:
    status = path.stat()
    return FileState(str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def _step_ns(file: FileState) -> int:
    return _COARSE_NS if file.ctime_ns % 1_000_000_000 == 0 else _FINE_NS
