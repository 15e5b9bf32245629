"""Tool calls in the answers of the server: what comes of them while an answer is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class CallDelta:
    """A piece of a call: its beginning (id and name) or more of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def chunk(self) -> dict[str, Any]:
        """As an entry of `delta.tool_calls`."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class CallReader(Protocol):
    """Finds calls in the text of one answer, as it comes."""

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        ...

    def push(self, text: str) -> list[str | CallDelta]:
        """What new text means: plain text, and pieces of calls."""
        ...

    def end(self) -> list[str | CallDelta]:
        """What was held back, when no more text comes."""
        ...

    def calls(self) -> list[dict[str, Any]]:
        """All calls, as `message.tool_calls`."""
        ...
