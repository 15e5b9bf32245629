"""Chats for a server: the same for every engine, none twice in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hasten.bench.measure import PromptRing, default_text

Message = dict[str, str]

INTRODUCTION = (
    "You answer questions about Python for our customers. This is the part of the manual you have:\n"
)

TOPICS = (
    *("list comprehensions", "context managers", "decorators", "generators", "the import system"),
    *("exception handling", "dataclasses", "asyncio", "regular expressions", "string formatting"),
    *("metaclasses", "type hints", "the garbage collector", "threads and locks", "file handling"),
    *("sorting with keys", "dictionaries and hashing", "closures", "iterators", "unit tests"),
    *("sockets", "packaging", "logging", "descriptors"),
)

WISHES = (
    "to a beginner: write at least ten numbered points, two sentences each, then a long example",
    "by what goes wrong most often: list twelve mistakes, each with the wrong and the right code",
    "as the chapter of a textbook, with an introduction, five sections and exercises",
    "to somebody who knows C++ well: compare every part with how C++ does it, in detail",
    "as a conversation of a teacher and a student who asks at least ten questions",
    "in the order in which it came into the language, with the reason for every change",
    "for a code review: give fifteen rules, each with a reason and a short example",
    "by writing a complete program that uses it, then explain the program line by line",
    "to a manager who has never programmed, with everyday comparisons, in at least ten paragraphs",
    "as an interview: fifteen questions from easy to hard, each with a full answer",
)
"""Each takes a long answer. With TOPICS they make 240 questions, so that no round asks what another asked:
drafts from earlier requests would find the answer there."""


class Encoder(Protocol):
    """What the workloads need of a tokenizer."""

    def encode(self, text: str, add_special: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode_chat(self, messages: Any) -> list[int]:
        """Token ids of a conversation, ready for the answer."""
        ...


def _default_ring(tokenizer: Encoder) -> PromptRing:
    return PromptRing(tokenizer.encode(default_text(), add_special=False))


@dataclass(frozen=True)
class SharedChats:
    """`clients` chats a round. Rounds 2k and 2k + 1 have one system prompt; no question comes twice.

    The first round of a system prompt is cold: nobody has seen it. The second is warm.
    """

    tokenizer: Encoder
    clients: int = 8
    system_tokens: int = 512

    def round(self, number: int) -> list[list[Message]]:
        """The conversations of one round."""
        system = {"role": "system", "content": self.system(number // 2)}
        return [
            [system, {"role": "user", "content": self.question(number * self.clients + client)}]
            for client in range(self.clients)
        ]

    def system(self, number: int) -> str:
        """System prompt number `number`: about `system_tokens` tokens, introduction included."""
        length = self.system_tokens - len(self.tokenizer.encode(INTRODUCTION, add_special=False))
        ring = _default_ring(self.tokenizer)
        return f"{number}. {INTRODUCTION}" + self.tokenizer.decode(ring.prompt(number, length))

    def question(self, number: int) -> str:
        """Question number `number`; the first 240 differ."""
        topic, wish = TOPICS[number % len(TOPICS)], WISHES[number // len(TOPICS) % len(WISHES)]
        return f"Leave the manual aside and explain {topic} in Python {wish}."


@dataclass(frozen=True)
class Conversation:
    """A conversation that reaches `tokens` tokens when its last question is asked.

    The first turn brings a text, as a chat about a document does; each question after it is short.
    """

    tokenizer: Encoder
    tokens: int = 2000  # of the prompt of the last turn
    turns: int = 6
    answer_tokens: int = 64
    question_tokens: int = 24  # what a short question takes with its marks, about

    def opening(self, number: int) -> Message:
        """The first turn. Conversations of different numbers differ from their first words on."""
        rest = (self.turns - 1) * (self.answer_tokens + self.question_tokens)
        ring = _default_ring(self.tokenizer)
        head = f"{number}. Read this and then tell me what it is about:\n"
        length = self.tokens - rest - len(self.tokenizer.encode(head, add_special=False)) - 32
        text = self.tokenizer.decode(ring.prompt(number, max(1, length)))
        return {"role": "user", "content": head + text}

    def question(self, turn: int) -> Message:
        """The question of turn 2 and later."""
        return {
            "role": "user",
            "content": f"Now say more about point {turn}, and why it matters in practice.",
        }
