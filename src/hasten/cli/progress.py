"""Progress of long work on stderr: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from hasten.cli.console import console, note

if TYPE_CHECKING:
    from rich.status import Status

_QUIET_S = 30.0


class Ticker:
    """Says what is being done: a live line in a terminal, one line a subject elsewhere."""

    def __init__(self) -> None:
        self._console = console()
        self._status: Status | None = None
        self._subject = ""
        self._began = time.monotonic()
        self._noted = self._began

    def __enter__(self) -> Ticker:
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, subject: str) -> None:
        """A new piece of work."""
        self.count(subject, 0, 0)

    def count(
        self, subject: str, done: int, total: int, *, detail: str = "", seconds_left: float | None = None
    ) -> None:
        """So much of it is done; `total` 0: nobody knows. Where lines stay: one a subject and every 30 s."""
        part = f" {done} of {total}" if total else ""
        part += f", {detail}" if detail else ""
        part += f", about {_span(seconds_left)} left" if seconds_left is not None else ""
        if self._status is not None:
            from rich.markup import escape

            self._status.update(f"{escape(subject + part)} [dim]{self._seconds():.0f} s[/dim]")
        elif subject != self._subject:
            self._note(subject)
        elif part and time.monotonic() - self._noted >= _QUIET_S:
            self._note(subject + part)
        self._subject = subject

    def _note(self, text: str) -> None:
        self._noted = time.monotonic()
        note(f"[{self._seconds():5.1f} s] {text}")

    def line(self, text: str) -> None:
        """A result that stays on the screen."""
        if self._status is not None:
            from rich.markup import escape

            self._console.print(escape(text))
        else:
            note(text)

    def _seconds(self) -> float:
        return time.monotonic() - self._began


def _span(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
