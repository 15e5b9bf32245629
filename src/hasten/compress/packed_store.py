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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hasten
from hasten.cache import cache_dir, digest, read_json, read_record, write_record
from hasten.cache.deferred import Deferred
from hasten.cache.reading import add_byte
from hasten.cache.size_limit import Held, chosen_limit, limit_bytes, make_room, tree_bytes
from hasten.cache.stage import clean, stage, vanish
from hasten.cache.store import why_not_writable
from hasten.compress.artifact import Artifact, load_artifact, save, verify_files
from hasten.compress.artifact_plan import LAYOUT_VERSION, PLAN_VERSION, format_digest
from hasten.compress.origin import Content, ContentIndex, Origin
from hasten.compress.pack import PackedModel
from hasten.compress.work_store import WorkStore
from hasten.core import Recipe, as_json
from hasten.errors import ArtifactError, DiskError
from hasten.models.locate import Place
from hasten.models.source import Source, SourceFile

SWITCH = "HASTEN_CACHE_PACKED"
_ENTRY, _USED, _PLAN = "entry.json", "used", "plan.json"

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


def keep_later(
    store: PackedStore, origin: Origin, packed: PackedModel, source: Source, owner: object
) -> Deferred:
    """Keep a model when `owner`, which runs it, is gone; see `Deferred`.

    A disk that refuses costs one warning. What is kept is the model as it is now: matrices replaced later do
    not count.
    """
    now = replace(packed, linears=dict(packed.linears), vectors=dict(packed.vectors))

    def work() -> None:
        try:
            store.keep(origin, now.recipe, now, source)
        except (DiskError, OSError) as error:
            warn_once("disk", f"packed weights are not kept: {error}")

    return Deferred(work, owner)


def warn_once(what: str, text: str) -> None:
    """Log a warning about `what`, the first time in this process."""
    if what not in _said:
        _said.add(what)
        _log.warning(text)


class PackedStore:
    """Artifacts by what they were made from.

    Args:
        folder: where; made when something is first kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.index = ContentIndex(folder / "sources")

    def find(self, place: Place, recipe: Recipe) -> tuple[Artifact | None, Origin | None]:
        """What is kept of a model by a recipe, and the origin to keep it under where that is nothing.

        Looks at the files' sizes and times. Reads them only where those are new and something of the same
        size is kept (the file was copied, moved or touched), or where a file is so young that its times
        prove nothing.
        """
        origin, content = self._looked_at(place)
        if origin is None:
            return None, None
        artifact = None if content is None else self._read(_key(content, recipe), recipe)
        self._count(artifact is not None)
        return artifact, origin

    def find_folder(
        self, place: Place, recipe: Recipe, made_with: Mapping[str, Any]
    ) -> tuple[Path | None, Origin | None]:
        """As `find`, for what was compressed: the entry's folder, its weights not read yet.

        Args:
            place: where the model lies.
            recipe: what was asked for.
            made_with: what else the weights depend on: text, versions.
        """
        origin, content = self._looked_at(place)
        if origin is None:
            return None, None
        folder = None
        if content is not None:
            key = _key(content, recipe, made_with)
            folder = self.models / _name(key)
            folder = folder if folder.is_dir() and self._is_sound(folder, key) else None
        self._count(folder is not None)
        if folder is not None:
            add_byte(folder / _USED)
        return folder, origin

    def _looked_at(self, place: Place) -> tuple[Origin | None, str | None]:
        """A model's origin, and its content where that is remembered or had to be read."""
        origin = Origin.of(place)
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
        packed: PackedModel,
        source: Source,
        *,
        made_with: Mapping[str, Any] | None = None,
        plan: Mapping[str, Any] | None = None,
    ) -> Path | None:
        """Write an entry, crash-safe; one that is there already stays.

        Args:
            origin: of the model's files, before they were read.
            recipe: what was asked for; `packed.recipe` may say more.
            packed: the model.
            source: its tokenizer goes along.
            made_with: what else the weights depend on.
            plan: goes into plan.json.

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
            _log.warning("%s changed while it was read: its packed weights are not kept", source.name)
            return None
        self.index.remember(origin.states, content.digest)
        key = _key(content.digest, recipe, made_with)
        folder = self.models / _name(key)
        if folder.exists() and self._is_sound(folder, key):
            return folder
        if not self._make_room(sum(linear.bytes for linear in packed.linears.values()), source.name):
            return None
        hashed = [_with_digest(file, content) for file in source.files]
        return self._write(key, folder, packed, replace(source, files=tuple(hashed)), plan or {})

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

    def _write(
        self,
        key: Mapping[str, Any],
        folder: Path,
        packed: PackedModel,
        source: Source,
        plan: Mapping[str, Any],
    ) -> Path:
        with stage(self.models) as fresh:
            made = save(fresh / folder.name, packed, source, plan, threads=1)
            about = {
                "name": source.name,
                "recipe": packed.recipe.name,
                "files": [str(file.path.absolute()) for file in source.files],
                "made": time.time(),
                "plan_sha256": digest(made / _PLAN),
            }
            write_record(made / _ENTRY, key, about)
            (made / _USED).touch()
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was quicker, and its entry is as good
                    raise
        _log.info("kept the packed weights of %s in %s", source.name, folder)
        return folder

    def entries(self) -> list[Path]:
        """The folders of all entries, damaged ones included."""
        try:
            return sorted(p for p in self.models.iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError:
            return []

    def held(self) -> list[Held]:
        """All entries with their sizes and times of last use."""
        return [Held(entry, tree_bytes(entry), _last_used(entry)) for entry in self.entries()]

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

    def _read(self, key: Mapping[str, Any], recipe: Recipe) -> Artifact | None:
        entry = self.models / _name(key)
        if not entry.is_dir():
            return None
        seen = _identity(entry)
        try:
            _check(entry, key)
            artifact = load_artifact(entry)
        except (ArtifactError, OSError) as wrong:
            _drop_damaged(entry, seen, wrong)
            return None
        add_byte(entry / _USED)
        return replace(artifact, packed=replace(artifact.packed, recipe=recipe))

    def _is_sound(self, entry: Path, key: Mapping[str, Any]) -> bool:
        """Whether an entry looks whole; one that does not is dropped."""
        seen = _identity(entry)
        try:
            _check(entry, key)
        except (ArtifactError, OSError) as wrong:
            _drop_damaged(entry, seen, wrong)
            return False
        return True

    def _knows_size(self, size: int) -> bool:
        """Whether an entry was made from files of so many bytes together."""
        for entry in self.entries():
            record = read_json(entry / _ENTRY)
            key = record.get("key") if isinstance(record, dict) else None
            if isinstance(key, dict) and str(key.get("content", "")).startswith(f"{size}-"):
                return True
        return False


def _with_digest(file: SourceFile, content: Content) -> SourceFile:
    return replace(file, sha256=content.files.get(str(file.path.absolute()), file.sha256))


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


def _last_used(entry: Path) -> float:
    for file in (entry / _USED, entry):
        with contextlib.suppress(OSError):
            return file.stat().st_mtime
    return 0.0
