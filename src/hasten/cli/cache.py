"""`hasten cache`: what is kept on disk, whether it is whole, how to be rid of it, and what it would save."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from hasten.cache import cache_dir, digest, write_atomic
from hasten.cache.folders import known_folders, last_change, limit_bytes, tree_bytes, vanish
from hasten.cache.store import free_bytes, is_whole_record
from hasten.cli.console import aligned, emit, note, print_table
from hasten.cli.flags import JsonOption, argument, given, optional
from hasten.core import SCHEMA_VERSION, CachePolicy, as_json
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.engine.trace import ReplayResult, Trace
    from hasten.weights.packed_store import PackedStore
    from hasten.weights.work_store import WorkStore

KEPT = "What was removed is gone, the rest is as it was."
KIND = "Only this kind, repeatable: packed, compress, kv, demo, exports or records."
TraceArgument = Annotated[Path, argument("TRACE", "A file that hasten serve --record wrote.")]
PolicyOption = Annotated[
    str, given("--policy", "P,...", "Which page goes first: lru, lfu, s3fifo, cost, or several.")
]
RAM = "Memory for keys and values, GB, one or several. Default: what the server had."
RamOption = Annotated[str | None, optional("--ram-gb", "N,...", RAM)]
DiskOption = Annotated[str, given("--disk-gb", "N,...", "Limit of the disk tier, GB; 0 is none.")]
TracedOption = Annotated[
    str | None, optional("--model", "NAME", "Whose requests. Default: the model that got most.")
]
PlotOption = Annotated[Path | None, optional("--plot", "FILE", "Draw hit ratios into an SVG file.")]
KindOption = Annotated[list[str] | None, optional("--kind", "K", KIND)]
FolderOption = Annotated[
    list[Path] | None,
    optional("--kv-disk", "DIR", "A folder of keys and values beside the known ones, repeatable."),
]
AgeOption = Annotated[
    str | None, optional("--older-than", "AGE", "Only what was not used for so long: 45m, 12h, 30d, 8w.")
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
        aligned([["kind", "size", "last used", "name", "source"], *rows]) if rows else "nothing is kept\n"
    )


def verify(
    kind: KindOption = None,
    fix: Annotated[bool, optional("--fix", None, "Remove what is damaged.")] = False,
    kv_disk: FolderOption = None,
    json: JsonOption = False,
) -> None:
    """Read everything that is kept and compare its checksums.

    Exit code 1 if something is damaged and was not removed. What is damaged would not be used either way: it
    is found out when it is read, dropped, and made anew.
    """
    results: list[dict[str, Any]] = []
    for entry in _entries(kind, kv_disk):
        try:
            wrong = KINDS[entry.kind].verify(entry)
        except FileNotFoundError:  # another process removed it meanwhile
            continue
        state = "whole" if wrong is None else UNCHECKED if wrong == UNCHECKED else "damaged"
        if state == "damaged" and fix:
            _mend(entry)
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
    age_s = 0.0 if older_than is None else _seconds(older_than)
    found = [e for e in _entries(kind, kv_disk) if time.time() - e.last_used >= age_s]
    total = sum(entry.bytes for entry in found)
    if found and not yes:
        _ask(f"remove {len(found)} entries, {_size(total)}?")
    for entry in found:
        _remove(entry)
    if json:
        removed = [_document(entry) for entry in found]
        emit({"schema_version": SCHEMA_VERSION, "removed": removed, "bytes": total})
    else:
        sys.stdout.write(f"removed {len(found)} entries, {_size(total)}\n")


def stats(kv_disk: FolderOption = None, json: JsonOption = False) -> None:
    """Sizes by kind, limits, and how often packed weights were found."""
    from hasten.weights.packed_store import open_store

    store = _packed_store()
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
    folder = str(cache_dir())
    if json:
        sizes = {"folder": folder, "free_bytes": free, "kinds": kinds, "packed": packed}
        emit({"schema_version": SCHEMA_VERSION, **sizes})
        return
    rows = [[name, str(k["entries"]), _size(k["bytes"]), k["what"]] for name, k in kinds.items()]
    switched = "" if packed["enabled"] else "packed weights: switched off\n"
    sys.stdout.write(
        f"{folder} ({'unknown' if free is None else _size(free)} free on its disk)\n"
        + aligned([["kind", "entries", "size", "what"], *rows])
        + f"packed and compress together: at most {_size(packed['limit_bytes'])}\n{switched}"
        + f"packed weights: found {packed['hits']} times, not found {packed['misses']} times\n"
    )


def _entries(kinds: Sequence[str] | None, folders: Sequence[Path] | None) -> list[Entry]:
    """All entries of these kinds, the last used first within each; `folders`: more of keys and values."""
    found: list[Entry] = []
    for kind in kinds or list(KINDS):
        if kind not in KINDS:
            raise UsageError(f"there is no kind {kind!r}", hint=f"kinds are {', '.join(KINDS)}")
        found += sorted(KINDS[kind].entries(folders or ()), key=lambda entry: -entry.last_used)
    return found


def _document(entry: Entry) -> dict[str, Any]:
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


_KV_MODEL = re.compile(r"\d{1,6}-[A-Za-z0-9_-]{1,200}")  # as in hasten.cache.kv_folder
_KV_PAGE = re.compile(r"[0-9a-f]{2}/(?:[0-9a-f]{2}){1,32}")

UNCHECKED = "unchecked"
"""What `verify` says of something that carries no checksum."""


@dataclass(frozen=True)
class Entry:
    kind: str
    name: str
    path: Path
    bytes: int
    last_used: float  # seconds since 1970; where uses are not recorded, when it was written
    source: str | None = None  # what it was made from


@dataclass(frozen=True)
class Kind:
    what: str
    entries: Callable[[Sequence[Path]], Iterator[Entry]]  # of folders named by the user
    verify: Callable[[Entry], str | None]  # what is wrong; None: nothing


def _remove(entry: Entry) -> None:
    if entry.kind in ("packed", "compress"):
        vanish(entry.path)
    elif entry.kind == "kv":
        _remove_pages(entry.path, lambda page: True)
    elif entry.path.is_dir():
        shutil.rmtree(entry.path)
    else:
        entry.path.unlink(missing_ok=True)


def _packed_store() -> PackedStore:
    from hasten.weights.packed_store import PackedStore

    return PackedStore(cache_dir() / "packed")


def _work_store() -> WorkStore:
    from hasten.weights.work_store import WorkStore

    return WorkStore()


def _packed(folders: Sequence[Path]) -> Iterator[Entry]:
    store = _packed_store()
    for held in store.held():
        about = store.about(held.path)
        name = f"{about.get('name', 'unreadable')} {about.get('recipe', '')}".strip()
        files = about.get("files") or [None]
        yield Entry("packed", name, held.path, held.bytes, held.last_used, files[0])


def _compress(folders: Sequence[Path]) -> Iterator[Entry]:
    store = _work_store()
    for held in store.held():
        part = {"statistics": "statistics", "linears": "matrices", "states": "source states"}
        part["runs"] = "unfinished run"
        name = f"{part[held.path.parent.name]} {held.path.name}"
        yield Entry("compress", name, held.path, held.bytes, held.last_used, store.model(held.path))


def _demo(folders: Sequence[Path]) -> Iterator[Entry]:
    for path in sorted((cache_dir() / "demo").glob("*.gguf")):
        yield _entry("demo", path.name, path)


def _verify_demo(entry: Entry) -> str | None:
    from hasten.models.source import DEMO_SHA256

    return None if digest(entry.path) == DEMO_SHA256 else "its SHA-256 is not the demo model's"


def _exports(folders: Sequence[Path]) -> Iterator[Entry]:
    for path in _inside(cache_dir() / "bench"):
        yield _entry("exports", path.name, path)


def _records(folders: Sequence[Path]) -> Iterator[Entry]:
    for part in ("machine", "optimize", "answers", "packed/sources", "demo", "folders"):
        for path in sorted((cache_dir() / part).glob("*.json")):
            yield _entry("records", f"{part}/{path.name}", path)


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
    import numpy as np

    from hasten.cache.kv_folder import BadEntry, read_entry, read_header

    try:
        header = read_header(path)
        read_entry(path, header.fingerprint, header.key, np.empty(header.payload_bytes, np.uint8))
    except BadEntry as bad:
        return str(bad)
    return None if path.name == header.key.hex() else "it holds another page"


def _mend(entry: Entry) -> None:
    """Remove what is damaged of an entry: all of it, or of keys and values the damaged pages."""
    if entry.kind == "kv":
        _remove_pages(entry.path, lambda page: _page_damage(page) is not None)
    else:
        _remove(entry)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _entry(kind: str, name: str, path: Path, source: str | None = None) -> Entry:
    return Entry(kind, name, path, tree_bytes(path), last_change(path), source)


KINDS = {
    "packed": Kind(
        "weights packed from GGUF files and safetensors folders",
        _packed,
        lambda entry: _packed_store().verify(entry.path),
    ),
    "compress": Kind(
        "statistics, single matrices and unfinished runs of compress, states of sources",
        _compress,
        lambda entry: _work_store().verify(entry.path),
    ),
    "kv": Kind("keys and values of computed prompts (--kv-disk)", _kv, _verify_kv),
    "demo": Kind("the demo model", _demo, _verify_demo),
    "exports": Kind("models written for other engines by bench", _exports, lambda entry: UNCHECKED),
    "records": Kind(
        "measured ceilings, judged recipes, digests of files",
        _records,
        lambda entry: None if is_whole_record(entry.path) else "is no record, or its checksum is wrong",
    ),
}


def replay(
    trace: TraceArgument,
    policy: PolicyOption = "lru,lfu,s3fifo,cost",
    ram_gb: RamOption = None,
    disk_gb: DiskOption = "0",
    model: TracedOption = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Say what a prefix cache of each policy and size would have saved on recorded requests.

    Runs the engine's own bookkeeping of pages without a model. Tokens found are counted; the time to first
    token they save is predicted from what a prompt token took in the recording.
    """
    from hasten.engine import trace as engine

    policies = _policies(policy)
    disks = [int(size * 1e9) for size in _sizes(disk_gb, "--disk-gb")]
    found = engine.read_trace(trace, model)
    ram = [int(size * 1e9) for size in _sizes(ram_gb, "--ram-gb")] if ram_gb is not None else []
    ram = ram or [found.model.kv_pages * found.model.page_bytes]
    each = [(name, memory, disk) for disk in disks for memory in ram for name in policies]
    results = [engine.replay(found, *one) for one in each]
    if plot is not None:
        _draw(plot, results, found)
    if json:
        emit(_replayed(found, results))
    else:
        _show(found, results)


def _replayed(trace: Trace, results: Sequence[ReplayResult]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": as_json(trace.model),
        "recorded_hit_ratio": _recorded_hit_ratio(trace),
        "seconds_per_token": trace.seconds_per_token,
        "results": [as_json(result) for result in results],
    }


def _recorded_hit_ratio(trace: Trace) -> float:
    """Share of prompt tokens that the cache of the recording found."""
    tokens = sum(len(request.prompt) for request in trace.requests)
    return sum(request.cached_tokens for request in trace.requests) / max(1, tokens)


def _policies(text: str) -> list[CachePolicy]:
    known = {str(name): name for name in get_args(CachePolicy)}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown cache policy {name!r}", hint=f"use some of {','.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _sizes(text: str, flag: str) -> list[float]:
    sizes = []
    for part in text.split(","):
        try:
            sizes.append(float(part))
        except ValueError:
            raise UsageError(f"{flag} {text}: {part!r} is no number", hint=f"{flag} 1,2,4") from None
    if not all(0 <= size < 1e6 for size in sizes):
        raise UsageError(f"{flag} {text}: sizes go from 0 to a million GB", hint=f"{flag} 1,2,4")
    return list(dict.fromkeys(sizes))


def _draw(path: Path, results: Sequence[ReplayResult], trace: Trace) -> None:
    from hasten.report import replay_chart

    title = f"{trace.model.model}: {len(trace.requests):,} recorded requests"
    write_atomic(path, replay_chart(results, title).encode())
    note(f"wrote {path}")


def _show(trace: Trace, results: Sequence[ReplayResult]) -> None:
    first, unknown = results[0], trace.seconds_per_token is None
    print_table(
        f"{trace.model.model}: {first.requests:,} requests, {first.prompt_tokens:,} prompt tokens",
        ["policy", "memory\nGB", "disk\nGB", "found", "of it\non disk", "first token sooner\npredicted, ms"],
        [
            [
                result.policy,
                f"{result.ram_gb:.3g}",
                f"{result.disk_gb:.3g}" if result.disk_gb else "",
                f"{100 * result.hit_ratio:.1f} %",
                f"{100 * result.disk_hit_ratio:.1f} %" if result.disk_gb else "",
                "unknown" if unknown else f"{result.ttft_saved_ms:,.1f}",
            ]
            for result in results
        ],
    )
    note(f"the cache of the recording found {100 * _recorded_hit_ratio(trace):.1f} %")


SUBCOMMANDS: dict[str, Callable[..., object]] = {
    "ls": ls,
    "verify": verify,
    "clear": clear,
    "stats": stats,
    "replay": replay,
}
