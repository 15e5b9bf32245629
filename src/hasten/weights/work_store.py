"""What compressing keeps on disk beside models: to measure nothing twice and to go on where a run stopped.

    compress/statistics/KEY/  second moments of a model on a text, a file a layer
    compress/linears/KEY/     matrices found one by one, for mixtures
    compress/states/KEY/      final hidden states of a source on a text, a file a window, to judge others by
    compress/runs/KEY/        of a run under way: finished layers, the teacher's states, a checkpoint
    compress/.../used.json    in each: of which model; a use sets its time

All share the limit of the cache with packed weights, and what was not used for longest goes first. A running
process touches what it uses, by reading or by writing: what was touched in the last hours stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import cache_dir, read_json, write_atomic, write_record
from hasten.cache.folders import (
    Held,
    clean,
    entries_in,
    last_change,
    limit_bytes,
    make_room,
    tree_bytes,
    vanish,
)
from hasten.cache.reading import open_file, read_array
from hasten.cache.store import is_whole_record

Part = Literal["statistics", "linears", "states", "runs"]
PARTS: tuple[Part, ...] = ("statistics", "linears", "states", "runs")
IN_USE_S = 6 * 3600.0
"""The longest that a process which is using something leaves it untouched: one layer of a large model."""
STALE_S = 7 * 86400.0
"""After so long nobody comes back to a run that was stopped."""
_USED = "used.json"
PACKED_USED = "used"  # in an entry of packed weights: its time is that of the last use
_PIECE = 1 << 22  # bytes that one checksum covers
_SUM = 8  # bytes of the checksum that ends a file

_log = logging.getLogger("hasten.cache")


class WorkStore:
    """Folders of work by part and key.

    Args:
        folder: where; None is its place in the cache folder. Made when something is first kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_dir() / "compress" if folder is None else folder

    def place(self, part: Part, key: str) -> Path:
        """The folder of one piece of work, there or not."""
        return self.folder / part / key

    def make_room(self, entry: Path, need: int) -> None:
        """Before work: drop what is stale, then what was not used for longest until `need` bytes fit.

        What is in use stays, and so does `entry`; work that needs more than the limit gets it, and goes when
        other work wants the room.

        Raises:
            UsageError: HASTEN_CACHE_GB is no number.
        """
        touch(entry)
        for part in PARTS:
            clean(self.folder / part)
        for held in self.held():
            if held.path.parent.name == "runs" and time.time() - held.last_used > STALE_S:
                _drop(held.path)
        together = [*self.held(), *packed_held(self.folder.parent / "packed")]
        limit = limit_bytes(self.folder, sum(one.bytes for one in together))
        make_room(together, min(need, limit), limit, _drop)

    def mark(self, entry: Path, model: str) -> None:
        """Say of a folder, made where it is not there, that it is in use, and for which model.

        Raises:
            DiskError: full, read-only or forbidden disk.
        """
        write_record(entry / _USED, {"part": entry.parent.name, "key": entry.name}, {"model": model})

    def held(self) -> list[Held]:
        """Everything, with sizes and times of last use."""
        now = time.time()
        found = []
        for entry in [entry for part in PARTS for entry in entries_in(self.folder / part)]:
            last = last_change(entry)
            found.append(Held(entry, tree_bytes(entry), last, in_use=now - last < IN_USE_S))
        return found

    def model(self, entry: Path) -> str | None:
        """The model that something belongs to; None where that is not known."""
        record = read_json(entry / _USED)
        value = record.get("value") if isinstance(record, dict) else None
        return str(value["model"]) if isinstance(value, dict) and "model" in value else None

    def verify(self, entry: Path) -> str | None:
        """Read all files of a folder and compare their checksums; what is wrong, None where nothing is.

        Raises:
            OSError: a file cannot be read, or went meanwhile.
        """
        for path in sorted(p for p in entry.rglob("*") if p.is_file() and not p.name.startswith(".")):
            if (wrong := _damage(path)) is not None:
                return wrong
        return None


def packed_held(folder: Path) -> list[Held]:
    """What `PackedStore` keeps in `folder`, with sizes and times of last use: both share one limit."""
    return [Held(entry, tree_bytes(entry), _packed_used(entry)) for entry in entries_in(folder / "models")]


def _packed_used(entry: Path) -> float:
    for file in (entry / PACKED_USED, entry):
        with contextlib.suppress(OSError):
            return file.stat().st_mtime
    return 0.0


def touch(entry: Path) -> None:
    """Say that something is in use. A disk that cannot be written keeps no times."""
    for path in (entry / _USED, entry):
        with contextlib.suppress(OSError):
            os.utime(path)
            return


def _drop(entry: Path) -> None:
    try:
        vanish(entry)
        _log.info("dropped %s", entry)
    except OSError as error:
        _log.warning("%s cannot be removed: %s", entry, error)


def _damage(path: Path) -> str | None:
    if path.suffix in (".pt", ".checkpoint"):
        return state_damage(path)
    if path.suffix == ".json":
        return None if is_whole_record(path) else f"{path} is no record, or its checksum is wrong"
    if path.suffix == ".states":
        return None if is_whole(path) else f"{path}: its checksum differs"
    return f"{path} has no checksum: it is from another version"


def checksum(data: npt.NDArray[Any]) -> bytes:
    """Of contiguous data: 8 bytes."""
    found = np.array(_native.checksums(data, _PIECE, 0), np.uint64)
    return hashlib.sha256(found.tobytes()).digest()[:_SUM]


def write_checked(path: Path, data: npt.NDArray[np.uint8]) -> None:
    """Write a file whole or not at all.

    Raises:
        DiskError: full, read-only or forbidden disk; the file before is untouched.
    """

    def put(file: BinaryIO) -> None:
        file.write(data.data)
        file.write(checksum(data))

    write_atomic(path, put)


def is_whole(path: Path, size: int | None = None) -> bool:
    """Whether a file is as it was written, of `size` bytes before the checksum where that is known."""
    try:
        if size is not None and path.stat().st_size != size + _SUM:
            return False
    except OSError:
        return False
    return read_checked(path) is not None


def read_checked(path: Path) -> npt.NDArray[np.uint8] | None:
    """What `write_checked` wrote; None where there is no such file, or it is not as it was written."""
    try:
        data = read_array(path)
    except OSError:
        return None
    whole = data.size >= _SUM and data[-_SUM:].tobytes() == checksum(data[:-_SUM])
    return data[:-_SUM] if whole else None


def state_damage(path: Path) -> str | None:
    """What is wrong with a file by its checksums; None: nothing. Needs no torch.

    Raises:
        OSError: it cannot be read.
    """
    import zipfile  # few starts need it

    try:
        with open_file(path) as file, zipfile.ZipFile(file) as parts:
            wrong = parts.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError) as error:
        return f"{path} is torn: {error}"
    return None if wrong is None else f"{path}: the checksum of {wrong} differs"
