"""What a packed model was made from, told by looking at the files instead of reading them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hasten.cache import digest, read_record, write_record
from hasten.cache.file_state import FileStates, look
from hasten.core import as_json
from hasten.errors import DiskError
from hasten.models.locate import Place


@dataclass(frozen=True)
class Origin:
    """A model's files as they were before anything was read from them."""

    place: Place
    states: FileStates
    content: str | None = None  # their digest, where they had to be read already

    @classmethod
    def of(cls, place: Place) -> Origin | None:
        """None where a file cannot be looked at: opening the model will say why."""
        try:
            states = look(place.files())
        except OSError:
            return None
        return cls(place, states) if states is not None and states.files else None


@dataclass(frozen=True)
class Content:
    """What files hold and, in a folder, how they are called there."""

    digest: str  # "BYTES-SHA256"
    files: Mapping[str, str]  # absolute path -> SHA-256

    @classmethod
    def read(cls, states: FileStates) -> Content | None:
        """Reads every file, 1 to 2 GB a second; None if one is not as it was looked at, before or after."""
        try:
            files = {file.path: digest(file.path) for file in states.files}
        except OSError:
            return None
        if not states.is_unchanged():
            return None
        top = os.path.commonpath(list(files))
        named = sorted([os.path.relpath(path, top), sha256] for path, sha256 in files.items())
        whole = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        return cls(f"{states.bytes}-{whole}", files)


class ContentIndex:
    """The content digest of files for the sizes, times and inodes they had when they were read.

    Args:
        folder: one record a set of paths is kept there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remembered(self, states: FileStates) -> str | None:
        """The digest of files that look as they did when they were read, else None."""
        value = read_record(self._record(states), _key(states))
        return value if isinstance(value, str) else None

    def read(self, states: FileStates) -> str | None:
        """The digest, read from the files and remembered; None if they change meanwhile."""
        content = Content.read(states)
        if content is not None:
            self.remember(states, content.digest)
        return None if content is None else content.digest

    def remember(self, states: FileStates, content: str) -> None:
        """Keep a digest, unless the files are so young that they could change and look the same.

        A disk that cannot be written is no harm: the files are read again then.
        """
        if states.is_settled:
            with contextlib.suppress(DiskError, OSError):
                write_record(self._record(states), _key(states), content)

    def _record(self, states: FileStates) -> Path:
        paths = "\0".join(file.path for file in states.files)
        return self.folder / f"{hashlib.sha256(os.fsencode(paths)).hexdigest()[:32]}.json"


def _key(states: FileStates) -> dict[str, Any]:
    return {"files": [as_json(file) for file in states.files]}
