"""Who has had how much: clients that ask for more do not get more while others wait.

Source: Sheng et al., Fairness in serving large language models (OSDI 2024): virtual token counters.
"""

from __future__ import annotations

from collections.abc import Iterable

PROMPT_WEIGHT = 1.0
ANSWER_WEIGHT = 2.0  # the paper's weights: an answer's token costs more than a prompt's
_MOST_DEBT = 2048.0  # weighted tokens others may get before a client that had much once gets anything
_MOST_CLIENTS = 4096  # counters kept of clients that have nothing in the engine


class FairShare:
    """Weighted tokens computed for each client; the one with the least goes first."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._last = ""  # who was served last: what a new client begins with when nobody else is there

    def join(self, client: str, active: Iterable[str]) -> None:
        """A client asks again: no credit for silent times, and a bounded debt for what it had."""
        floor = min((self.of(one) for one in active), default=self.of(self._last))
        self._served[client] = min(max(self._served.pop(client, 0.0), floor), floor + _MOST_DEBT)
        if len(self._served) > _MOST_CLIENTS:
            del self._served[next(iter(self._served))]

    def serve(self, client: str, prompt: int, answer: int) -> None:
        """So many tokens were computed for a client."""
        self._last = client
        cost = PROMPT_WEIGHT * prompt + ANSWER_WEIGHT * answer
        self._served[client] = self._served.get(client, 0.0) + cost

    def of(self, client: str) -> float:
        """A client's counter."""
        return self._served.get(client, 0.0)
