"""Where a command writes: the one document or the text on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from hasten.core import as_json
from hasten.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


def console() -> Console:
    """A rich console on stderr, for tables and progress. Imported here: rich costs start-up time."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def emit(document: Any) -> None:
    """Write one JSON document to stdout; dataclasses of `hasten.core` become objects, None stays null."""
    sys.stdout.write(json.dumps(as_json(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line for the human on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def shown(value: float | None, unit: str = "", digits: int = 1) -> str:
    """A figure with its unit; None is `unknown`."""
    if value is None:
        return "unknown"
    return f"{value:,.{digits}f}" + (f" {unit}" if unit else "")


def read_stdin() -> str:
    """All of stdin as text.

    Raises:
        UsageError: it holds bytes that are no UTF-8.
    """
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"stdin is not valid UTF-8: byte {data[error.start]:#04x} at offset {error.start}",
            hint="convert it first, for example: iconv -f LATIN1 -t UTF-8",
        ) from None
