"""What a search has found so far, on disk, so that one that was stopped goes on where it was.

Quality and sensitivity do not change with the day: they are kept, under a key of the source's bytes, the
recipe, the text and this program's version. Speed does: it is kept for a search that is going on, and dropped
when that ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import hasten
from hasten.cache import cache_dir, read_record, write_record
from hasten.core import as_json
from hasten.errors import DiskError
from hasten.weights.packed_store import warn_once


class SearchMemory:
    """Records of one search. `fresh` reads none of the old ones."""

    def __init__(self, key: Mapping[str, Any], *, fresh: bool = False) -> None:
        self._key = {**key, "version": hasten.__version__}
        self._fresh = fresh
        self._written: set[Path] = set()
        self._speeds: list[Path] = []
        self._unkept: dict[Path, Any] = {}  # what the disk did not take

    def read(self, kind: str, **key: Any) -> Any | None:
        """What was kept, or None."""
        path, whole = self._place(kind, key)
        if self._fresh and path not in self._written:
            return None
        if kind == "speed":
            self._speeds.append(path)
        return self._unkept[path] if path in self._unkept else read_record(path, whole)

    def write(self, kind: str, value: Any, **key: Any) -> None:
        """Keeps a finding: for later searches too, where the cache can be written."""
        path, whole = self._place(kind, key)
        try:
            write_record(path, whole, value)
            self._unkept.pop(path, None)
        except (DiskError, OSError) as error:
            warn_once("search", f"what the search finds is not kept: {error}")
            self._unkept[path] = as_json(value)
        self._written.add(path)
        if kind == "speed":
            self._speeds.append(path)

    def finish(self) -> None:
        """The search is done: its speeds are of the past."""
        for path in self._speeds:
            with suppress(OSError):
                path.unlink()

    def _place(self, kind: str, key: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
        whole = {**self._key, "kind": kind, **as_json(key)}
        name = hashlib.sha256(json.dumps(as_json(whole), sort_keys=True).encode()).hexdigest()[:32]
        return cache_dir() / "optimize" / f"{name}.json", whole
