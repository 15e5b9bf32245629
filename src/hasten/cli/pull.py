"""`hasten pull`: a model from the hub into the hub's own cache, where every verb finds it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from hasten.cli.console import Ticker, aligned, emit
from hasten.cli.flags import JsonOption, argument, optional
from hasten.core import SCHEMA_VERSION

if TYPE_CHECKING:
    from hasten.models.hub import Pulled

KEPT = "What is complete is kept; the same command goes on where this one stopped."
IdArgument = Annotated[str, argument("ID", "OWNER/NAME, OWNER/NAME:Q4_K_M or OWNER/NAME/FILE.gguf.")]
INCLUDE = "Take the files whose name has this text in it, such as Q4_K_M, alone; repeatable."
IncludeOption = Annotated[list[str] | None, optional("--include", "TEXT", INCLUDE)]


def command(model: IdArgument, include: IncludeOption = None, json: JsonOption = False) -> None:
    """Download a model from the hub, and check every file's digest.

    A download that was cut goes on where it stopped. Of a folder of safetensors everything that running it
    needs is taken; of a hub id of GGUF files the one that is named (--include, or :Q4_K_M behind the id).
    The files lie in the hub's own cache: later verbs find them by the same id, without a network too.
    """
    from hasten.models.hub import pull

    with Ticker() as ticker:
        found = pull(model, tuple(include or ()), lambda name, done, total: _tell(ticker, name, done, total))
    if json:
        emit(_document(model, found))
        return
    rows = [(f.name, f"{f.bytes / 1e6:,.1f} MB", f"{f.kind} {f.digest[:16]}") for f in found.files]
    total = sum(f.bytes for f in found.files)
    sys.stdout.write(aligned(rows) + f"{len(rows)} files, {total / 1e9:,.2f} GB, all digests are right\n")
    sys.stdout.write(f"run it: hasten generate {found.ref} -p TEXT\n")


def _tell(ticker: Ticker, name: str, done: int, total: int) -> None:
    ticker.count(f"downloading {name}", done >> 20, total >> 20, detail="MB")


def _document(model: str, found: Pulled) -> dict[str, object]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "ref": found.ref,
        "revision": found.revision,
        "folder": str(found.folder),
        "files": [
            {"name": f.name, "path": str(f.path), "bytes": f.bytes, f.kind: f.digest} for f in found.files
        ],
    }
