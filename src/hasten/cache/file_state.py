"""What tells an untouched file without reading it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_COARSE_NS = 2_100_000_000  # FAT counts in two seconds
_FINE_NS = 50_000_000  # Linux stamps files with the time of its last timer tick, at most 10 ms ago


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
