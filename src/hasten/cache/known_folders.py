"""Folders outside the cache folder that hold cached things, remembered so that `hasten cache` finds them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from hasten.cache.record import read_record, write_record
from hasten.cache.store import cache_dir, read_json
from hasten.errors import DiskError


def remember_folder(kind: str, folder: Path) -> None:
    """Remember that `folder` holds things of a kind ("kv"); a cache folder that refuses costs nothing."""
    key = {"kind": kind, "path": str(folder.absolute())}
    name = hashlib.sha256(os.fsencode(f"{kind}\0{folder.absolute()}")).hexdigest()[:32]
    with contextlib.suppress(DiskError, OSError):
        path = cache_dir() / "folders" / f"{name}.json"
        if read_record(path, key) is None:
            write_record(path, key, True)


def known_folders(kind: str) -> list[Path]:
    """The remembered folders of a kind that are there.

    Raises:
        DiskError: no cache folder is known.
    """
    found = []
    for path in sorted((cache_dir() / "folders").glob("*.json")):
        record = read_json(path)
        key = record.get("key") if isinstance(record, dict) else None
        if isinstance(key, dict) and key.get("kind") == kind and read_record(path, key) is True:
            found.append(Path(str(key.get("path"))))
    return [folder for folder in found if folder.is_dir()]
