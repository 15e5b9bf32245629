"""The disk store: where it is, writes that never tear, digests, records that know when they are stale."""

from hasten.cache.folders import new_folder
from hasten.cache.store import (
    cache_dir,
    digest,
    read_json,
    read_record,
    write_atomic,
    write_json,
    write_record,
)

__all__ = [
    "cache_dir",
    "digest",
    "new_folder",
    "read_json",
    "read_record",
    "write_atomic",
    "write_json",
    "write_record",
]
