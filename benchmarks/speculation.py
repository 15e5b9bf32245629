"""What speculation gains where answers repeat their prompt, and what it costs where they do not.

    python benchmarks/speculation.py --runs 5
    python benchmarks/speculation.py --model demo.hasten --tasks structured

Every task runs with and without speculation, one after the other, on one loaded model; each round begins with
new engines, so that no round drafts from the answers of the round before. Greedy; both must give the same
tokens. Run it on a quiet machine. Exit code 1: a bar was missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import hasten
from bar import Bar, Settings, record, say
from hasten.bench.figures import paired_ratio
from hasten.core import ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import HastenError
from hasten.machine.probe import stat_of
from speculation_tasks import tasks

NEW_TOKENS = 256
LIMITS = {"edit": 1.8, "summarise": 1.8, "structured": 1.8, "chat": 0.98}
RECIPE = "w4"


@dataclass(frozen=True)
class Answer:
    """One answer and what its decoding took."""

    tokens: tuple[int, ...]
    seconds: float  # from the first token to the last
    drafted: int
    accepted: int


def answer(engine: Engine, prompt: list[int]) -> Answer:
    """Ask an engine; greedy."""
    tokens: list[int] = []
    first = last = 0.0
    usage = None
    for output in engine.stream(Request(prompt=tuple(prompt), max_new_tokens=NEW_TOKENS)):
        last = time.perf_counter()
        first = first or last
        tokens += output.token_ids
        usage = output.usage or usage
    drafted, accepted = (usage.drafted_tokens, usage.accepted_tokens) if usage else (0, 0)
    return Answer(tuple(tokens), last - first, drafted, accepted)


def both(engines: tuple[Engine, Engine], prompt: list[int], turn: int) -> tuple[Answer, Answer]:
    """(with speculation, without), in an order that alternates.

    Raises:
        HastenError: the answers differ.
    """
    order = (0, 1) if turn % 2 == 0 else (1, 0)
    answers = {which: answer(engines[which], prompt) for which in order}
    if answers[0].tokens != answers[1].tokens:
        raise HastenError(
            "speculation changed an answer", hint="this is a bug in Hasten: report the prompt and the model"
        )
    return answers[0], answers[1]


def measure_round(
    model: LanguageModel, prompts: dict[str, list[list[int]]], number: int
) -> dict[str, list[tuple[Answer, Answer]]]:
    """Every task once, in new engines."""
    engines = tuple(
        Engine(model, ServingOptions(prefix_cache=False, speculate=speculate)) for speculate in (True, False)
    )
    try:
        return {
            kind: [both((engines[0], engines[1]), prompt, number + at) for at, prompt in enumerate(own)]
            for kind, own in prompts.items()
        }
    finally:
        for engine in engines:
            engine.close()


def measure(settings: Settings, kinds: tuple[str, ...] = tuple(LIMITS)) -> tuple[list[Bar], Any]:
    """Decode with speculation over without, by kind of task."""
    recipe = RECIPE if settings.model == "demo" else None
    model = hasten.load(settings.model, recipe=recipe, threads=settings.threads, context=2048)
    chosen = {kind: messages for kind, messages in tasks().items() if kind in kinds}
    prompts = {
        kind: [model.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in messages]
        for kind, messages in chosen.items()
    }
    rounds = []
    for number in range(settings.runs + 1):
        say("warm-up" if number == 0 else f"round {number} of {settings.runs}")
        rounds.append(measure_round(model, prompts, number))
    model.close()
    bars, details = [], {}
    for kind in chosen:
        bar, details[kind] = judge(kind, [one[kind] for one in rounds[1:]])
        bars.append(bar)
    return bars, {"new_tokens": NEW_TOKENS, "recipe": recipe, "kinds": details}


def judge(kind: str, rounds: list[list[tuple[Answer, Answer]]]) -> tuple[Bar, dict[str, Any]]:
    """One kind's bar: tokens a second of all its answers together, round by round."""
    speeds = [
        [
            sum(len(pair[which].tokens) - 1 for pair in one) / sum(pair[which].seconds for pair in one)
            for one in rounds
        ]
        for which in (0, 1)
    ]
    ratio = paired_ratio(speeds[0], speeds[1])
    with_drafts = [pair[0] for one in rounds for pair in one]
    details = {
        "ratio": ratio,
        "decode_tok_per_s": stat_of(speeds[0]),
        "plain_decode_tok_per_s": stat_of(speeds[1]),
        "answers": len(rounds[0]),
        "tokens": sum(len(one.tokens) for one in with_drafts) // len(rounds),
        "drafted_tokens": sum(one.drafted for one in with_drafts) // len(rounds),
        "accepted_tokens": sum(one.accepted for one in with_drafts) // len(rounds),
        "of_each_answer": [
            sorted(one[at][1].seconds / one[at][0].seconds for one in rounds)[len(rounds) // 2]
            for at in range(len(rounds[0]))
        ],
    }
    return Bar(f"speculation, {kind}: decode over plain", ratio.median, LIMITS[kind], "x"), details


def main() -> int:
    """Measure what was asked for and write results/speculation.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="the model; demo is packed as w4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=[*LIMITS], default=[*LIMITS])
    given = parser.parse_args()
    settings = Settings(given.model, "", given.threads, given.runs, None, None)
    bars, details = measure(settings, tuple(given.tasks))
    say(f"written: {record('speculation', settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
