"""A JSON value kept under a key: stale or damaged is a miss, never a wrong answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.cache.store import read_json, write_json
from hasten.core import SCHEMA_VERSION, as_json


def write_record(path: str | Path, key: Mapping[str, Any], value: Any) -> Path:
    """Keep `value` with what it was made from (`key`) and a checksum of both.

    Raises:
        DiskError: the disk is full, read-only or not ours; an older record is as it was.
    """
    kept = {"schema_version": SCHEMA_VERSION, "key": as_json(key), "value": as_json(value)}
    return write_json(path, {**kept, "sha256": _checksum(kept)})


def read_record(path: str | Path, key: Mapping[str, Any]) -> Any | None:
    """The value kept under exactly this `key`, or None: missing, torn, altered, other key or version."""
    record = _whole(path)
    return record.get("value") if record is not None and record.get("key") == _plain(key) else None


def is_whole_record(path: str | Path) -> bool:
    """Whether a file is a record as it was written, whatever its key."""
    return _whole(path) is not None


def _whole(path: str | Path) -> dict[str, Any] | None:
    record = read_json(path)
    if not isinstance(record, dict):
        return None
    found = record.pop("sha256", None)
    if record.get("schema_version") != SCHEMA_VERSION or found != _checksum(record):
        return None
    return record


def _plain(key: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(as_json(key)))


def _checksum(kept: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
