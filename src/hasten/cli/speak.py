"""Writes a token stream to stdout as it comes, and times it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hasten.cli.console import shown

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer


@dataclass
class Answer:
    """What came out of one stream. Times are seconds; an answer that Ctrl-C cut has `stopped` set."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float | None = None
    decode_s: float = 0.0
    stopped: bool = False
    ended: bool = False  # by an end-of-text token

    @property
    def finish_reason(self) -> Literal["stop", "length", "interrupted"]:
        """Why the answer ends where it does."""
        if self.stopped:
            return "interrupted"
        return "stop" if self.ended else "length"

    @property
    def decode_tok_per_s(self) -> float | None:
        """Tokens a second after the first one; None with fewer than two tokens."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else None

    @property
    def ttft_ms(self) -> float | None:
        """Milliseconds from asking to the first token; None if there was none."""
        return None if self.first_token_s is None else self.first_token_s * 1000

    def line(self) -> str:
        """The speed line for a human."""
        return (
            f"{len(self.token_ids)} tokens, first after {shown(self.ttft_ms, 'ms')}, "
            f"then {shown(self.decode_tok_per_s, 'tok/s')}"
        )


def speak(
    tokens: Iterable[int], tokenizer: Tokenizer, *, aloud: bool = True, patient: bool = False
) -> Answer:
    """Write the text of `tokens` to stdout as they come.

    Args:
        tokens: token ids, computed as they are asked for.
        tokenizer: turns them into text; only whole characters are written.
        aloud: False collects the text without writing it.
        patient: Ctrl-C ends the answer instead of the program.
    """
    answer = Answer()
    text = tokenizer.stream()
    start = time.perf_counter()
    try:
        for token in tokens:
            now = time.perf_counter() - start
            if answer.first_token_s is None:
                answer.first_token_s = now
            answer.decode_s = now - answer.first_token_s
            answer.token_ids.append(token)
            answer.ended = token in tokenizer.eos_ids
            _write(answer, "" if answer.ended else text.push(token), aloud)
    except KeyboardInterrupt:
        if not patient:
            raise
        answer.stopped = True
    _write(answer, text.flush(), aloud)
    return answer


def _write(answer: Answer, piece: str, aloud: bool) -> None:
    answer.text += piece
    if aloud and piece:
        sys.stdout.write(piece)
        sys.stdout.flush()
