"""Stop texts in a stream: found across token borders, never shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes text on, holds back what may still become a stop text, and ends at the first one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """New text -> (what may be shown, the stop text that ended it or None)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda one: (one[0], -len(one[1])))
            self._held = ""
            return text[:at], stop
        keep = self._possible(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _possible(self, text: str) -> int:
        """Length of the longest end of `text` that some stop text begins with."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0

    def flush(self) -> str:
        """What was held back when the text ended another way."""
        held, self._held = self._held, ""
        return held
