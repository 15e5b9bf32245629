"""Against other engines, and against the machine's ceilings: two interleaved comparisons."""

from __future__ import annotations

from typing import Any

from bar import Bar, Settings, say
from hasten.bench.compare import Request, bout
from hasten.cli.bench import document
from hasten.core import Workload

WORKLOAD = Workload(prompt=512, output=128)

FOUR_BIT = {"llama.cpp:q4_0": (1.7, 2.5), "openvino:int4": (2.5, 1.4)}
"""Peer -> bars for decode and prefill of the w4 recipe."""

CHOSEN = {"llama.cpp:q8_0": (2.2, 4.0), "openvino:int8": (1.9, 1.25), "transformers": (8.0, 2.2)}
"""The same for the recipe that `optimize` chose within +1 % perplexity."""


def measure(settings: Settings) -> tuple[list[Bar], Any]:
    """Both comparisons; the ceilings come with the first."""
    w4 = compared(settings, settings.model, "w4", list(FOUR_BIT))
    chosen = compared(settings, settings.artifact, None, list(CHOSEN))
    subject = w4["subject"]
    bars = [
        *_bars("w4", w4, FOUR_BIT),
        *_bars("chosen", chosen, CHOSEN),
        Bar("w4 decode: read rate / measured ceiling", subject["fraction_of_read_ceiling"], 0.80, ""),
        Bar("w4 prefill: int8 rate / measured ceiling", subject["fraction_of_int8_ceiling"], 0.60, ""),
    ]
    return bars, {"w4": w4, "chosen": chosen}


def compared(settings: Settings, model: str, recipe: str | None, against: list[str]) -> dict[str, Any]:
    """One interleaved comparison, as `hasten bench --json` prints it."""
    comparison, machine = bout(request(settings, model, recipe, against), say)
    for name, error in comparison.failed.items():
        say(f"{name} failed: {error.message}")
    return document(comparison, machine)


def request(settings: Settings, model: str, recipe: str | None, against: list[str]) -> Request:
    """What is compared, and how: WORKLOAD, on the settings' threads."""
    return Request(
        model=model,
        workload=WORKLOAD,
        recipe=recipe,
        against=tuple(against),
        source=settings.model,
        threads=settings.threads,
        runs=settings.runs,
        peer_python=settings.peer_python,
    )


def _bars(subject: str, record: dict[str, Any], limits: dict[str, tuple[float, float]]) -> list[Bar]:
    bars = []
    for peer, (decode, prefill) in limits.items():
        ratios = record["ratios"].get(peer, {})
        bars.append(Bar(f"{subject} / {peer}: decode", ratios.get("decode"), decode, "x"))
        bars.append(Bar(f"{subject} / {peer}: prefill", ratios.get("prefill"), prefill, "x"))
    return bars
