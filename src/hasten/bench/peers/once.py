"""Files made once: written beside their place, then renamed, so that a half-made one is never used."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def key_of(source: Path) -> str:
    """Name of a source in the cache: its stem and a hash of path, size and change time."""
    stat = source.stat()
    text = f"{source.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, made by `make(path)` into a temporary neighbour first if it is not there yet.

    An interrupted `make` leaves nothing under `target`; of two processes at once, the first wins.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        make(part)
        try:
            part.rename(target)
        except OSError:
            if not target.exists():
                raise
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
    return target
