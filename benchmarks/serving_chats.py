"""Eight chats with one system prompt at once: against OpenVINO GenAI and against llama_cpp.server."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import serving_contenders as contenders
from bar import Bar, Settings, say
from chat_workloads import SharedChats
from hasten.bench.figures import Answer, Ratio, paired_ratio, percentile
from hasten.bench.load import LoadFigures, figures

CLIENTS, OUTPUT = 8, 128
PHASES = ("cold", "warm")
"""cold: nobody has seen the system prompt. warm: it was the round's before, the questions are new."""

AGAINST = (  # ours, peer, tokens a second at least
    ("hasten engine", "openvino:int4", 2.0),
    ("hasten serve", "openvino:int4", 2.0),
    ("hasten serve", "llama_cpp.server:q4_0", 3.0),
)


@dataclass
class Record:
    """One contender's rounds of one phase."""

    rounds: list[LoadFigures] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)  # of all clients of all rounds
    finish_reasons: dict[str, int] = field(default_factory=dict)
    cached_tokens: list[int | None] = field(default_factory=list)

    def add(self, answers: Sequence[Answer]) -> None:
        """One more round."""
        self.rounds.append(figures(answers))
        self.ttft_ms += [1000 * answer.first_s for answer in answers if answer.first_s is not None]
        self.cached_tokens += [answer.cached_tokens for answer in answers]
        for answer in answers:
            key = answer.error or str(answer.finish_reason)
            self.finish_reasons[key] = self.finish_reasons.get(key, 0) + 1

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of every round."""
        return [one.tok_per_s for one in self.rounds]

    @property
    def p95_ms(self) -> float:
        """95th percentile of the time to first token over all clients and rounds."""
        return percentile(self.ttft_ms, 0.95)


Records = dict[str, dict[str, Record]]  # contender -> phase -> rounds


def measure(settings: Settings) -> tuple[list[Bar], Any]:
    """Every contender answers the same rounds in turn."""
    from hasten.models.open import open_model

    tokenizer = open_model(settings.model).tokenizer()
    chats = SharedChats(tokenizer, CLIENTS)
    with contextlib.ExitStack() as stack:
        running: list[contenders.Contender] = []
        for start in (
            lambda: contenders.our_engine(settings, tokenizer),
            lambda: contenders.our_server(settings),
            lambda: contenders.openvino(settings, tokenizer),
            lambda: contenders.llama_cpp_served(settings, chats.round(28)[0]),
        ):
            running.append(stack.enter_context(start()))
            running[-1].ask(chats.round(29)[:2], 16)  # warm-up
            running[-1].pause()
        records = _rounds(running, chats, settings.runs)
    return _bars(records), _details(records, chats)


def _rounds(running: Sequence[contenders.Contender], chats: SharedChats, runs: int) -> Records:
    records: Records = {one.name: {phase: Record() for phase in PHASES} for one in running}
    for number in range(2 * runs):
        phase = PHASES[number % 2]
        conversations = chats.round(number)
        for place in range(len(running)):
            one = running[(place + number // 2) % len(running)]
            record = records[one.name][phase]
            record.add(one.ask(conversations, OUTPUT))
            one.pause()
            say(
                f"round {number // 2 + 1} of {runs}, {phase}: {one.name} {record.speeds[-1]:.1f} tok/s, "
                f"p95 TTFT {record.rounds[-1].ttft_p95_ms or 0.0:.0f} ms"
            )
    return records


def _bars(records: Records) -> list[Bar]:
    bars = []
    for ours, peer, limit in AGAINST:
        for phase in PHASES:
            mine, theirs = records[ours][phase], records[peer][phase]
            speed = paired_ratio(mine.speeds, theirs.speeds).median
            bars.append(Bar(f"8 chats, {phase}: {ours} / {peer}: tokens a second", speed, limit, "x"))
            wait = mine.p95_ms / theirs.p95_ms
            bars.append(Bar(f"8 chats, {phase}: {ours} / {peer}: p95 TTFT", wait, 1.0, "x", at_least=False))
    failed = sum(one.failed for phases in records.values() for r in phases.values() for one in r.rounds)
    bars.append(Bar("8 chats: failed answers of all contenders", float(failed), 0.0, "", at_least=False))
    return bars


def _details(records: Records, chats: SharedChats) -> dict[str, Any]:
    ratios: dict[str, Ratio] = {
        f"{ours} / {peer}, {phase}": paired_ratio(records[ours][phase].speeds, records[peer][phase].speeds)
        for ours, peer, _ in AGAINST
        for phase in PHASES
    }
    lengths = [len(chats.tokenizer.encode_chat(chat)) for chat in chats.round(0)]
    return {
        "workload": {"clients": CLIENTS, "output": OUTPUT, "prompt_tokens_of_round_0": lengths},
        "speed_ratios": ratios,
        "contenders": {
            name: {
                phase: {
                    "tok_per_s": record.speeds,
                    "ttft_p50_ms": percentile(record.ttft_ms, 0.5),
                    "ttft_p95_ms": record.p95_ms,
                    "tpot_p50_ms": [one.tpot_p50_ms for one in record.rounds],
                    "finish_reasons": record.finish_reasons,
                    "cached_tokens": record.cached_tokens,
                }
                for phase, record in phases.items()
            }
            for name, phases in records.items()
        },
    }
