"""What the prefix cache saves in a conversation: from memory, and from disk after a restart."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import serving_contenders as contenders
from bar import Bar, Settings, say
from chat_workloads import Conversation, Message
from hasten.bench.figures import Answer, percentile
from hasten.errors import PeerError
from hasten.machine.probe import stat_of

FIRST_TOKENS = 4
"""Tokens asked for where only the first is timed."""

THINK_S = 1.0
"""Pause between an answer and the next question: somebody reads. In it our server computes the answer once
more the way prompts are computed, on machines where that differs, so that the next turn finds it."""


@dataclass
class Waits:
    """Times to first token of the last turn, ms, and how much of its prompt the cache held."""

    hot_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    prompt_tokens: list[int | None] = field(default_factory=list)
    cached_tokens: list[int | None] = field(default_factory=list)

    def add(self, hot: Answer, cold: Answer) -> None:
        """One more conversation."""
        self.hot_ms.append(_ttft_ms(hot))
        self.cold_ms.append(_ttft_ms(cold))
        self.prompt_tokens.append(hot.prompt_tokens)
        self.cached_tokens.append(hot.cached_tokens)
        say(
            f"conversation {len(self.hot_ms)}: last turn {self.hot_ms[-1]:.1f} ms "
            f"({hot.cached_tokens} of {hot.prompt_tokens} tokens cached), "
            f"cold {self.cold_ms[-1]:.0f} ms ({cold.cached_tokens} cached)"
        )

    @property
    def ratio(self) -> float:
        """Median over median."""
        return percentile(self.hot_ms, 0.5) / percentile(self.cold_ms, 0.5)

    def details(self) -> dict[str, Any]:
        """For the record."""
        return {
            "hot_ms": stat_of(self.hot_ms),
            "cold_ms": stat_of(self.cold_ms),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "ratio": self.ratio,
        }


def from_memory(settings: Settings) -> tuple[list[Bar], Any]:
    """Turn 6 of a conversation about a text, asked after a time to read; and asked at once, without a bar."""
    plan = _conversation(settings)
    kinds = {"after_reading": (THINK_S, Waits()), "at_once": (0.0, Waits())}
    with contenders.our_server(settings) as served:
        _warm_up(served)
        for number in range(settings.runs):
            for place, (think_s, waits) in enumerate(kinds.values()):
                messages = talk(served, plan, number + 500 * place, think_s)
                hot = one(served, messages, FIRST_TOKENS)
                served.server.settle()
                waits.add(hot, one(served, renamed(messages, f"cold {number}"), FIRST_TOKENS))
    ratio = kinds["after_reading"][1].ratio
    bars = [Bar("TTFT of turn 6 at 2,000 tokens / cold prefill", ratio, 0.06, "x", at_least=False)]
    return bars, {name: waits.details() for name, (_, waits) in kinds.items()}


def from_disk(settings: Settings) -> tuple[list[Bar], Any]:
    """The same, with the server ended (SIGTERM) before turn 6 and started anew on the same folder."""
    plan = _conversation(settings)
    waits = Waits()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(settings.runs):
            with contenders.our_server(settings, "--kv-disk", folder) as served:
                messages = talk(served, plan, number, THINK_S)
                served.server.terminate()
            with contenders.our_server(settings, "--kv-disk", folder) as served:
                _warm_up(served)
                hot = one(served, messages, FIRST_TOKENS)
                served.server.settle()
                waits.add(hot, one(served, renamed(messages, f"cold {number}"), FIRST_TOKENS))
    name = "TTFT of turn 6 after a restart, from disk / cold prefill"
    return [Bar(name, waits.ratio, 0.20, "x", at_least=False)], waits.details()


def talk(served: contenders.Served, plan: Conversation, number: int, think_s: float) -> list[Message]:
    """Hold a conversation up to the question of its last turn, which is not yet answered."""
    messages = [plan.opening(number)]
    for turn in range(2, plan.turns + 1):
        answer = one(served, messages, plan.answer_tokens)
        time.sleep(think_s)
        messages += [{"role": "assistant", "content": answer.text}, plan.question(turn)]
    return messages


def one(served: contenders.Served, messages: list[Message], output: int) -> Answer:
    """One good answer.

    Raises:
        PeerError: it is none.
    """
    answer = served.ask([messages], output)[0]
    if answer.error:
        raise PeerError(f"{served.name}: {answer.error}")
    return answer


def renamed(messages: list[Message], name: str) -> list[Message]:
    """The same conversation with other first words: nothing of it is cached."""
    first = {**messages[0], "content": f"{name}. " + messages[0]["content"].partition(". ")[2]}
    return [first, *messages[1:]]


def _conversation(settings: Settings) -> Conversation:
    from hasten.models.open import open_model

    return Conversation(open_model(settings.model).tokenizer())


def _warm_up(served: contenders.Served) -> None:
    """A long prompt of its own: weights and buffers are then in memory."""
    one(served, [{"role": "user", "content": "Say something about this list: " + "item, " * 400}], 16)
    served.server.settle()


def _ttft_ms(answer: Answer) -> float:
    if answer.first_s is None:
        raise PeerError(f"an answer without text: {answer}")
    return 1000 * answer.first_s
