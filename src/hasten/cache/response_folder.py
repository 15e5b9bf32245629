"""Answers kept in files over restarts: one a request, with a checksum and the time it was made."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import struct
import time
from pathlib import Path

from hasten.cache.reading import read_file
from hasten.cache.size_limit import Held, make_room
from hasten.cache.stage import clean
from hasten.cache.store import beside

_HEAD = struct.Struct("<8s32sd")  # magic, SHA-256 of what follows, seconds since 1970
_MAGIC = b"HASTENR1"

_log = logging.getLogger("hasten.cache")


class ResponseFolder:
    """Answers by key below a folder, which other processes may use too.

    Files are renamed into place but not flushed: what a power cut tears fails its checksum and is a miss.
    A disk that refuses costs one warning, then answers are kept in memory alone.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._refused = False

    def read(self, key: str, ttl_s: float) -> tuple[float, bytes] | None:
        """(age in seconds, answer); None where there is none, or one too old or damaged: it is dropped."""
        path = self.folder / key
        try:
            data = read_file(path)
        except OSError:
            return None
        wrong = damage(data)
        if wrong is not None:
            _log.warning("an answer in the cache is damaged and dropped: %s %s", path, wrong)
            _unlink(path)
            return None
        age = time.time() - _HEAD.unpack_from(data)[2]
        if not 0 <= age < ttl_s:
            _unlink(path)
            return None
        return age, data[_HEAD.size :]

    def write(self, key: str, answer: bytes, limit_bytes: int) -> None:
        """Keep an answer; those made first go where all together take more than `limit_bytes`."""
        if self._refused:
            return
        made = struct.pack("<d", time.time())
        path = self.folder / key
        fresh = beside(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean(self.folder)
            make_room(self.held(), len(answer) + _HEAD.size, limit_bytes, _unlink)
            fresh.write_bytes(_MAGIC + hashlib.sha256(made + answer).digest() + made + answer)
            fresh.replace(path)
        except OSError as error:
            self._refused = True
            _log.warning("answers are not kept on disk: cannot write %s: %s", path, error.strerror)
            _unlink(fresh)

    def held(self) -> list[Held]:
        """All answers with their sizes and times."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if not path.name.startswith("."):
                    status = path.stat()
                    found.append(Held(path, status.st_size, status.st_mtime))
        return found


def damage(data: bytes) -> str | None:
    """What is wrong with the bytes of a kept answer; None where nothing is."""
    if len(data) < _HEAD.size or data[:8] != _MAGIC:
        return "is cut short or no answer"
    if hashlib.sha256(data[40:]).digest() != data[8:40]:
        return "has a wrong checksum"
    return None


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
