"""Progress of long work on stderr: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from hasten.cli.console import console, note

if TYPE_CHECKING:
    from rich.status import Status


class Ticker:
    """Says what is being done: a live line in a terminal, one line a subject elsewhere."""

    def __init__(self) -> None:
        self._console = console()
        self._status: Status | None = None
        self._subject = ""
        self._began = time.monotonic()

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

    def count(self, subject: str, done: int, total: int) -> None:
        """So much of it is done; `total` 0: nobody knows."""
        if self._status is not None:
            from rich.markup import escape

            part = f" {done} of {total}" if total else ""
            self._status.update(f"{escape(subject)}{part} [dim]{self._seconds():.0f} s[/dim]")
        elif subject != self._subject:
            note(f"[{self._seconds():5.1f} s] {subject}")
        self._subject = subject

    def line(self, text: str) -> None:
        """A result that stays on the screen."""
        if self._status is not None:
            from rich.markup import escape

            self._console.print(escape(text))
        else:
            note(text)

    def _seconds(self) -> float:
        return time.monotonic() - self._began
