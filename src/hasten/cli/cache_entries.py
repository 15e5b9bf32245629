"""What is kept on disk, by kind: for `hasten cache`."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hasten.cache import cache_dir, digest
from hasten.cache.known_folders import known_folders
from hasten.cache.reading import read_file
from hasten.cache.record import is_whole_record
from hasten.cache.response_folder import damage
from hasten.cache.size_limit import last_change, tree_bytes
from hasten.cache.stage import vanish

_KV_MODEL = re.compile(r"\d{1,6}-[A-Za-z0-9_-]{1,200}")  # as in hasten.cache.kv_folder
_KV_PAGE = re.compile(r"[0-9a-f]{2}/(?:[0-9a-f]{2}){1,32}")

UNCHECKED = "unchecked"
"""What `verify` says of something that carries no checksum."""


@dataclass(frozen=True)
class Entry:
    """One thing that is kept."""

    kind: str
    name: str
    path: Path
    bytes: int
    last_used: float  # seconds since 1970; where uses are not recorded, when it was written
    source: str | None = None  # what it was made from


@dataclass(frozen=True)
class Kind:
    """A kind of things that are kept."""

    what: str
    entries: Callable[[Sequence[Path]], Iterator[Entry]]  # of folders named by the user
    verify: Callable[[Entry], str | None]  # what is wrong; None: nothing


def entries(kinds: Iterable[str], folders: Sequence[Path] = ()) -> list[Entry]:
    """All entries of these kinds, the last used first within each.

    Args:
        kinds: keys of `KINDS`.
        folders: KV folders beside those that are known.

    Raises:
        DiskError: no cache folder is known.
    """
    found: list[Entry] = []
    for kind in kinds:
        found += sorted(KINDS[kind].entries(folders), key=lambda entry: -entry.last_used)
    return found


def remove(entry: Entry) -> None:
    """Delete an entry.

    Raises:
        OSError: it may not be removed.
    """
    if entry.kind in ("packed", "compress"):
        vanish(entry.path)
    elif entry.kind == "kv":
        _remove_pages(entry.path, lambda page: True)
    elif entry.path.is_dir():
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink(missing_ok=True)


def _packed(folders: Sequence[Path]) -> Iterator[Entry]:
    from hasten.compress.packed_store import PackedStore

    store = PackedStore(cache_dir() / "packed")
    for held in store.held():
        about = store.about(held.path)
        name = f"{about.get('name', 'unreadable')} {about.get('recipe', '')}".strip()
        files = about.get("files") or [None]
        yield Entry("packed", name, held.path, held.bytes, held.last_used, files[0])


def _verify_packed(entry: Entry) -> str | None:
    from hasten.compress.packed_store import PackedStore

    return PackedStore(cache_dir() / "packed").verify(entry.path)


def _compress(folders: Sequence[Path]) -> Iterator[Entry]:
    from hasten.compress.work_store import WorkStore

    store = WorkStore()
    for held in store.held():
        part = {"statistics": "statistics", "linears": "matrices", "runs": "unfinished run"}
        name = f"{part[held.path.parent.name]} {held.path.name}"
        yield Entry("compress", name, held.path, held.bytes, held.last_used, store.model(held.path))


def _verify_compress(entry: Entry) -> str | None:
    from hasten.compress.work_store import WorkStore

    return WorkStore().verify(entry.path)


def _demo(folders: Sequence[Path]) -> Iterator[Entry]:
    for path in sorted((cache_dir() / "demo").glob("*.gguf")):
        yield _entry("demo", path.name, path)


def _verify_demo(entry: Entry) -> str | None:
    from hasten.models.locate import DEMO_SHA256

    return None if digest(entry.path) == DEMO_SHA256 else "its SHA-256 is not the demo model's"


def _exports(folders: Sequence[Path]) -> Iterator[Entry]:
    for path in _inside(cache_dir() / "bench"):
        yield _entry("exports", path.name, path)


def _records(folders: Sequence[Path]) -> Iterator[Entry]:
    for part in ("machine", "optimize", "packed/sources", "demo", "folders"):
        for path in sorted((cache_dir() / part).glob("*.json")):
            yield _entry("records", f"{part}/{path.name}", path)


def _verify_record(entry: Entry) -> str | None:
    return None if is_whole_record(entry.path) else "is no record, or its checksum is wrong"


def _responses(folders: Sequence[Path]) -> Iterator[Entry]:
    for path in _inside(cache_dir() / "responses"):
        if path.is_file():
            yield _entry("responses", path.name, path)


def _verify_response(entry: Entry) -> str | None:
    return damage(read_file(entry.path))


def _kv(folders: Sequence[Path]) -> Iterator[Entry]:
    """One entry a model in each folder."""
    named = [folder.absolute() for folder in folders]
    for folder in dict.fromkeys([*named, *known_folders("kv")]):
        for path in _inside(folder):
            if path.is_dir() and _KV_MODEL.fullmatch(path.name):
                yield _entry("kv", path.name, path, str(folder))


def _verify_kv(entry: Entry) -> str | None:
    bad = [path for path in _pages(entry.path) if _page_damage(path) is not None]
    return f"{len(bad)} pages are damaged, the first is {bad[0]}: {_page_damage(bad[0])}" if bad else None


def _pages(folder: Path) -> Iterator[Path]:
    """Files of keys and values; what looks otherwise is not ours to touch."""
    return (p for p in sorted(folder.glob("??/*")) if _KV_PAGE.fullmatch(f"{p.parent.name}/{p.name}"))


def _remove_pages(folder: Path, which: Callable[[Path], bool]) -> None:
    for page in _pages(folder):
        if which(page):
            page.unlink(missing_ok=True)
    for empty in [*folder.glob("??"), folder]:
        with contextlib.suppress(OSError):
            empty.rmdir()


def _page_damage(path: Path) -> str | None:
    from hasten.cache.kv_entry import BadEntry, read_entry, read_header

    try:
        header = read_header(path)
        read_entry(path, header.fingerprint, header.key, np.empty(header.payload_bytes, np.uint8))
    except BadEntry as bad:
        return str(bad)
    return None if path.name == header.key.hex() else "it holds another page"


def fix(entry: Entry) -> None:
    """Remove what is damaged of an entry: all of it, or of keys and values the damaged pages.

    Raises:
        OSError: it may not be removed.
    """
    if entry.kind == "kv":
        _remove_pages(entry.path, lambda page: _page_damage(page) is not None)
    else:
        remove(entry)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _entry(kind: str, name: str, path: Path, source: str | None = None) -> Entry:
    return Entry(kind, name, path, tree_bytes(path), last_change(path), source)


KINDS = {
    "packed": Kind("weights packed from GGUF files and safetensors folders", _packed, _verify_packed),
    "compress": Kind(
        "statistics, single matrices and unfinished runs of compress", _compress, _verify_compress
    ),
    "kv": Kind("keys and values of computed prompts (--kv-disk)", _kv, _verify_kv),
    "responses": Kind("answers to deterministic requests", _responses, _verify_response),
    "demo": Kind("the demo model", _demo, _verify_demo),
    "exports": Kind("models written for other engines by bench", _exports, lambda entry: UNCHECKED),
    "records": Kind("measured ceilings, judged recipes, digests of files", _records, _verify_record),
}
