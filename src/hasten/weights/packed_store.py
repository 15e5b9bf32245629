"""Packed weights kept on disk: the second start of a model neither opens nor packs its source.

    packed/models/KEY/      an artifact, and entry.json: the whole key, the source, plan.json's digest
    packed/models/KEY/used  a byte a use; its time is that of the last one
    packed/sources/X.json   the content digest of a model's files, for the size, times and inode they had
    packed/hits, misses     a byte each

KEY is a digest of the files' content, the recipe, the layout version and the version of this program, so an
entry is never changed, only written whole or dropped. Whatever is wrong with one makes it a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import hasten
from hasten.cache import cache_dir, digest, read_json, read_record, write_record
from hasten.cache.folders import Held, chosen_limit, clean, entries_in, limit_bytes, make_room, stage, vanish
from hasten.cache.reading import FileStates, add_byte, look
from hasten.cache.store import why_not_writable
from hasten.core import Recipe, as_json
from hasten.errors import ArtifactError, DiskError
from hasten.weights.artifact import verify_files
from hasten.weights.plan import LAYOUT_VERSION, PLAN_VERSION, format_digest
from hasten.weights.work_store import PACKED_USED, WorkStore, packed_held

T = TypeVar("T")
Files = Callable[[], Iterable[Path]]
SWITCH = "HASTEN_CACHE_PACKED"
_ENTRY, _PLAN = "entry.json", "plan.json"

_ELSEWHERE = "HASTEN_CACHE=DIR names another folder, HASTEN_CACHE_PACKED=0 keeps none"

_log = logging.getLogger("hasten.cache")
_said: set[str] = set()


def open_store() -> PackedStore | None:
    """The store in the cache folder; None where it is switched off or no folder is known.

    Raises:
        UsageError: HASTEN_CACHE_GB is no number.
    """
    if os.environ.get(SWITCH, "").strip().lower() in ("0", "off", "no", "false") or chosen_limit() == 0:
        return None
    try:
        return PackedStore(cache_dir() / "packed")
    except DiskError as error:
        warn_once("folder", f"packed weights are not kept: {error.message}")
        return None


def warn_once(what: str, text: str) -> None:
    """Log a warning about `what`, the first time in this process."""
    if what not in _said:
        _said.add(what)
        _log.warning(text)


@dataclass(frozen=True)
class Origin:
    """A model's files as they were before anything was read from them."""

    states: FileStates
    content: str | None = None  # their digest, where they had to be read already

    @classmethod
    def of(cls, files: Files) -> Origin | None:
        """None where a file cannot be looked at: opening the model will say why."""
        try:
            states = look(files())
        except OSError:
            return None
        return cls(states) if states is not None and states.files else None


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
        value = read_record(self._record(states), _states_key(states))
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
                write_record(self._record(states), _states_key(states), content)

    def _record(self, states: FileStates) -> Path:
        paths = "\0".join(file.path for file in states.files)
        return self.folder / f"{hashlib.sha256(os.fsencode(paths)).hexdigest()[:32]}.json"


def _states_key(states: FileStates) -> dict[str, Any]:
    return {"files": [as_json(file) for file in states.files]}


class PackedStore:
    """Artifacts by what they were made from.

    Args:
        folder: where; made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.index = ContentIndex(folder / "sources")

    def find(
        self,
        files: Files,
        recipe: Recipe,
        read: Callable[[Path], T],
        made_with: Mapping[str, Any] | None = None,
    ) -> tuple[T | None, Origin | None]:
        """What is kept of a model by a recipe, and the origin to keep it under where that is nothing.

        Looks at the files' sizes and times. Reads them only where those are new and something of the same
        size is kept (the file was copied, moved or touched), or where a file is so young that its times
        prove nothing.

        Args:
            files: lists the model's files.
            recipe: what was asked for.
            read: makes what is wanted of the entry's folder. An ArtifactError or OSError of it is a miss, and
                the entry is dropped.
            made_with: what else the weights depend on: text, versions.
        """
        origin, content = self._looked_at(files)
        if origin is None:
            return None, None
        found = None if content is None else self._read(_key(content, recipe, made_with), read)
        self._count(found is not None)
        return found, origin

    def _looked_at(self, files: Files) -> tuple[Origin | None, str | None]:
        """A model's origin, and its content where that is remembered or had to be read."""
        origin = Origin.of(files)
        if origin is None:
            return None, None
        content = self.index.remembered(origin.states)
        if content is None and (not origin.states.is_settled or self._knows_size(origin.states.bytes)):
            content = self.index.read(origin.states)
            origin = replace(origin, content=content)
        return origin, content

    def _count(self, is_hit: bool) -> None:
        if self.folder.is_dir():
            add_byte(self.folder / ("hits" if is_hit else "misses"))

    def keep(
        self,
        origin: Origin,
        recipe: Recipe,
        name: str,
        need: int,
        write: Callable[[Path, Mapping[str, str]], Mapping[str, Any]],
        made_with: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """Write an entry, crash-safe; one that is there already stays.

        Args:
            origin: of the model's files, before they were read.
            recipe: what was asked for.
            name: of the model, for messages.
            need: bytes it will take.
            write: writes the artifact to a folder, given the SHA-256 of the model's files by path; gives what
                `about` shall say of it.
            made_with: what else the weights depend on.

        Returns:
            Its folder; None where the files changed since `origin`, or it is larger than the store may be.

        Raises:
            DiskError: full, read-only or forbidden disk.
        """
        clean(self.models)
        clean(self.index.folder)
        content = Content.read(origin.states)
        is_sure = origin.content is not None or origin.states.is_settled
        if content is None or not is_sure or origin.content not in (None, content.digest):
            _log.warning("%s changed while it was read: its packed weights are not kept", name)
            return None
        self.index.remember(origin.states, content.digest)
        key = _key(content.digest, recipe, made_with)
        folder = self.models / _name(key)
        if folder.exists() and self._read(key, Path.exists) is not None:
            return folder
        if not self._make_room(need, name):
            return None
        with stage(self.models) as fresh:
            made = fresh / folder.name
            about = {**write(made, content.files), "made": time.time(), "plan_sha256": digest(made / _PLAN)}
            write_record(made / _ENTRY, key, about)
            (made / PACKED_USED).touch()
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker, and its entry is as good
                    raise
        _log.info("kept the packed weights of %s in %s", name, folder)
        return folder

    def _make_room(self, need: int, name: str) -> bool:
        if (why := why_not_writable(self.models)) is not None:
            warn_once("disk", f"the packed weights of {name} are not kept: {why} ({_ELSEWHERE})")
            return False
        held = self.held_together()
        limit = limit_bytes(self.folder, sum(one.bytes for one in held))
        if need > limit:
            warn_once(
                "large",
                f"the packed weights of {name} take {need / 1e6:,.0f} MB, and the cache may hold "
                f"{limit / 1e6:,.0f} MB (HASTEN_CACHE_GB): they are not kept",
            )
            return False
        for gone in make_room(held, need, limit, vanish):
            _log.info("dropped %s, last used %s", gone.path, time.ctime(gone.last_used))
        return True

    def entries(self) -> list[Path]:
        """The folders of all entries, damaged ones included."""
        return entries_in(self.models)

    def held(self) -> list[Held]:
        """All entries with their sizes and times of last use."""
        return packed_held(self.folder)

    def held_together(self) -> list[Held]:
        """All that shares the limit: the entries, and what compressing keeps beside them."""
        return [*self.held(), *WorkStore(self.folder.parent / "compress").held()]

    def about(self, entry: Path) -> dict[str, Any]:
        """What an entry's record says of it: name, recipe, files, made; empty where it cannot be read."""
        record = read_json(entry / _ENTRY)
        value = record.get("value") if isinstance(record, dict) else None
        return dict(value) if isinstance(value, dict) else {}

    def verify(self, entry: Path) -> str | None:
        """Read an entry whole and compare every checksum; what is wrong with it, None where nothing is."""
        record = read_json(entry / _ENTRY)
        key = record.get("key") if isinstance(record, dict) else None
        if not isinstance(key, dict):
            return f"{entry / _ENTRY} is missing or no record"
        try:
            _check(entry, key)
            verify_files(entry)
        except (ArtifactError, OSError) as wrong:
            return str(wrong)
        return None

    def drop(self, entry: Path) -> None:
        """Remove an entry at once.

        Raises:
            OSError: it may not be removed.
        """
        vanish(entry)

    def tally(self, what: str) -> int:
        """How many "hits" or "misses" there were."""
        try:
            return (self.folder / what).stat().st_size
        except OSError:
            return 0

    def _read(self, key: Mapping[str, Any], read: Callable[[Path], T]) -> T | None:
        """What `read` makes of an entry; one that is damaged is dropped."""
        entry = self.models / _name(key)
        if not entry.is_dir():
            return None
        seen = _identity(entry)
        try:
            _check(entry, key)
            found = read(entry)
        except (ArtifactError, OSError) as wrong:
            _drop_damaged(entry, seen, wrong)
            return None
        add_byte(entry / PACKED_USED)
        return found

    def _knows_size(self, size: int) -> bool:
        """Whether an entry was made from files of so many bytes together."""
        for entry in self.entries():
            record = read_json(entry / _ENTRY)
            key = record.get("key") if isinstance(record, dict) else None
            if isinstance(key, dict) and str(key.get("content", "")).startswith(f"{size}-"):
                return True
        return False


def _identity(entry: Path) -> tuple[int, int] | None:
    try:
        status = entry.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _drop_damaged(entry: Path, seen: tuple[int, int] | None, wrong: Exception) -> None:
    """Drop what was found wrong, unless another process dropped it, or made it anew, while we read."""
    if seen is not None and seen == _identity(entry):
        _log.warning("packed weights in the cache are damaged, dropped and made anew: %s", wrong)
        with contextlib.suppress(OSError):
            vanish(entry)


def _check(entry: Path, key: Mapping[str, Any]) -> None:
    """An entry must be of this key, its plan what was written; the plan vouches for all other files."""
    value = read_record(entry / _ENTRY, key)
    if not isinstance(value, dict) or entry.name != _name(key):
        raise ArtifactError(f"{entry / _ENTRY} is missing, damaged or of another model")
    if digest(entry / _PLAN) != value.get("plan_sha256"):
        raise ArtifactError(f"{entry / _PLAN} is damaged: its checksum differs")


def _key(content: str, recipe: Recipe, made_with: Mapping[str, Any] | None = None) -> dict[str, Any]:
    parts = as_json(recipe)
    del parts["name"]  # what it is called changes no byte
    return {
        **({"made_with": dict(made_with)} if made_with else {}),
        "content": content,
        "recipe": parts,
        "layout_version": LAYOUT_VERSION,
        "schema_version": PLAN_VERSION,
        "format": format_digest(),
        "hasten": hasten.__version__,
    }


def _name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
