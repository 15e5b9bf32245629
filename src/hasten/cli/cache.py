"""`hasten cache`: what is kept on disk, whether it is whole, and how to be rid of it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hasten.cli.console import emit, note
from hasten.cli.flags import JsonOption
from hasten.core import SCHEMA_VERSION, as_json
from hasten.errors import UsageError

KEPT = "What was removed is gone, the rest is as it was."
SUBCOMMANDS = {
    "ls": "hasten.cli.cache:ls",
    "verify": "hasten.cli.cache:verify",
    "clear": "hasten.cli.cache:clear",
    "stats": "hasten.cli.cache:stats",
    "replay": "hasten.cli.cache_replay:replay_command",
}

KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="K",
        help="Only this kind, repeatable: packed, compress, kv, responses, demo, exports or records.",
        show_default=False,
    ),
]
FolderOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--kv-disk",
        metavar="DIR",
        help="A folder of keys and values beside the known ones, repeatable.",
        show_default=False,
    ),
]
AgeOption = Annotated[
    str | None,
    typer.Option(
        "--older-than",
        metavar="AGE",
        help="Only what was not used for so long: 45m, 12h, 30d, 8w.",
        show_default=False,
    ),
]


def command() -> None:
    """See, check and empty what is kept on disk.

    Everything here can be made again: packed weights, what compress measured, keys and values of prompts,
    answers, the demo model. HASTEN_CACHE moves the folder, HASTEN_CACHE_GB limits packed weights and what
    compress keeps, both together, HASTEN_CACHE_PACKED=0 keeps no packed weights.
    """


def ls(kind: KindOption = None, kv_disk: FolderOption = None, json: JsonOption = False) -> None:
    """List what is kept, with its size, last use and source."""
    found = _entries(kind, kv_disk)
    if json:
        emit({"schema_version": SCHEMA_VERSION, "entries": [_document(entry) for entry in found]})
        return
    rows = [
        [e.kind, _size(e.bytes), _ago(e.last_used), e.name, e.source or ""]
        for e in found
        if e.kind != "records"
    ]
    records = [e for e in found if e.kind == "records"]
    if records:
        newest = max(e.last_used for e in records)
        total = sum(e.bytes for e in records)
        rows.append(["records", _size(total), _ago(newest), f"{len(records)} records", ""])
    sys.stdout.write(
        _table(["kind", "size", "last used", "name", "source"], rows) if rows else "nothing is kept\n"
    )


def verify(
    kind: KindOption = None,
    fix: Annotated[bool, typer.Option("--fix", help="Remove what is damaged.", show_default=False)] = False,
    kv_disk: FolderOption = None,
    json: JsonOption = False,
) -> None:
    """Read everything that is kept and compare its checksums.

    Exit code 1 if something is damaged and was not removed. What is damaged would not be used either way: it
    is found out when it is read, dropped, and made anew.
    """
    from hasten.cli.cache_entries import KINDS, UNCHECKED
    from hasten.cli.cache_entries import fix as mend

    results: list[dict[str, Any]] = []
    for entry in _entries(kind, kv_disk):
        try:
            wrong = KINDS[entry.kind].verify(entry)
        except FileNotFoundError:  # another process removed it meanwhile
            continue
        state = "whole" if wrong is None else UNCHECKED if wrong == UNCHECKED else "damaged"
        if state == "damaged" and fix:
            mend(entry)
            state = "removed"
        results.append({**_document(entry), "state": state, "reason": wrong if wrong != UNCHECKED else None})
        if state in ("damaged", "removed") and not json:
            note(f"{state}: {entry.path}: {wrong}")
    count = {s: sum(r["state"] == s for r in results) for s in ("whole", "damaged", "removed", UNCHECKED)}
    if json:
        emit({"schema_version": SCHEMA_VERSION, "count": count, "entries": results})
    else:
        sys.stdout.write(", ".join(f"{number} {state}" for state, number in count.items()) + "\n")
        if count["damaged"]:
            note("hint: hasten cache verify --fix removes what is damaged")
    if count["damaged"]:
        raise typer.Exit(1)


def clear(
    kind: KindOption = None,
    older_than: AgeOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.", show_default=False)] = False,
    kv_disk: FolderOption = None,
    json: JsonOption = False,
) -> None:
    """Remove what is kept, all of it or a part.

    It is made again when it is needed: the demo model from its packages, packed weights from their files.
    """
    from hasten.cli.cache_entries import remove

    age_s = 0.0 if older_than is None else _seconds(older_than)
    found = [e for e in _entries(kind, kv_disk) if time.time() - e.last_used >= age_s]
    total = sum(entry.bytes for entry in found)
    if found and not yes:
        _ask(f"remove {len(found)} entries, {_size(total)}?")
    for entry in found:
        remove(entry)
    if json:
        removed = [_document(entry) for entry in found]
        emit({"schema_version": SCHEMA_VERSION, "removed": removed, "bytes": total})
    else:
        sys.stdout.write(f"removed {len(found)} entries, {_size(total)}\n")


def stats(kv_disk: FolderOption = None, json: JsonOption = False) -> None:
    """Sizes by kind, limits, and how often packed weights were found."""
    from hasten.cache import cache_dir
    from hasten.cache.size_limit import limit_bytes
    from hasten.cache.store import free_bytes
    from hasten.cli.cache_entries import KINDS
    from hasten.compress.packed_store import PackedStore, open_store

    store = PackedStore(cache_dir() / "packed")
    kinds: dict[str, dict[str, Any]] = {}
    for name, kind in KINDS.items():
        found = _entries([name], kv_disk)
        kinds[name] = {"what": kind.what, "entries": len(found), "bytes": sum(e.bytes for e in found)}
    packed = {
        "enabled": open_store() is not None,
        "limit_bytes": limit_bytes(store.folder, sum(one.bytes for one in store.held_together())),
        "hits": store.tally("hits"),
        "misses": store.tally("misses"),
    }
    free = free_bytes(cache_dir())
    document = {
        "schema_version": SCHEMA_VERSION,
        "folder": str(cache_dir()),
        "free_bytes": free,
        "kinds": kinds,
        "packed": packed,
    }
    if json:
        emit(document)
        return
    rows = [[name, str(k["entries"]), _size(k["bytes"]), k["what"]] for name, k in kinds.items()]
    switched = "" if packed["enabled"] else "packed weights: switched off\n"
    sys.stdout.write(
        f"{document['folder']} ({'unknown' if free is None else _size(free)} free on its disk)\n"
        + _table(["kind", "entries", "size", "what"], rows)
        + f"packed and compress together: at most {_size(packed['limit_bytes'])}\n{switched}"
        + f"packed weights: found {packed['hits']} times, not found {packed['misses']} times\n"
    )


def _entries(kinds: Sequence[str] | None, folders: Sequence[Path] | None) -> list[Any]:
    from hasten.cli.cache_entries import KINDS, entries

    for kind in kinds or ():
        if kind not in KINDS:
            raise UsageError(f"there is no kind {kind!r}", hint=f"kinds are {', '.join(KINDS)}")
    return entries(kinds or list(KINDS), folders or ())


def _document(entry: Any) -> dict[str, Any]:
    return {**as_json(entry), "path": str(entry.path)}


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise UsageError("nobody is there to ask: stdin is no terminal", hint="add --yes")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was removed", hint="answer y, or add --yes")


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no age", hint="use minutes, hours, days or weeks: 45m, 12h, 30d, 8w")
    return float(match[1]) * {"m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]


def _size(count: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count} B"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    )
    return "".join(line.rstrip() + "\n" for line in lines)
