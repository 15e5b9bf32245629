"""What serving costs: the prefix cache where it never hits, the server over the engine, the start."""

from __future__ import annotations

from typing import Any

import serving_contenders as contenders
from bar import Bar, Settings, say
from chat_workloads import SharedChats
from hasten.bench.figures import Answer, paired_ratio, percentile
from hasten.bench.load import Address, figures
from hasten.bench.measure import PromptRing, default_text
from hasten.bench.process import ServerProcess, free_port
from hasten.errors import PeerError
from hasten.machine.probe import stat_of

ZERO_HIT_ROUNDS = 5  # times --runs
CLIENTS, PROMPT, OUTPUT = 8, 256, 64
OVERHEAD_ROUNDS = 8  # times --runs
OVERHEAD_OUTPUT = 64


def zero_hit(settings: Settings) -> tuple[list[Bar], Any]:
    """Prompts that share nothing, cache on over off; memory is small, so pages are evicted all along."""
    from hasten.models.open import open_model

    tokenizer = open_model(settings.model).tokenizer()
    ring = PromptRing(tokenizer.encode(default_text(), add_special=False))
    speeds: dict[str, list[float]] = {"on": [], "off": []}
    cached = 0
    with (
        contenders.our_engine(settings, tokenizer, "prefix_cache=on", context=512, name="cache on") as on,
        contenders.our_engine(settings, tokenizer, "prefix_cache=off", context=512, name="cache off") as off,
    ):
        for number in range(ZERO_HIT_ROUNDS * settings.runs + 1):
            prompts = [ring.prompt(number * CLIENTS + i, PROMPT) for i in range(CLIENTS)]
            pair = [("on", on), ("off", off)]
            for key, engine in pair if number % 2 else reversed(pair):
                answers = engine.ask_ids(prompts, OUTPUT)
                engine.pause()
                cached += sum(answer.cached_tokens or 0 for answer in answers)
                if number:  # the first round warms up
                    speeds[key].append(figures(answers).tok_per_s)
    ratio = paired_ratio(speeds["on"], speeds["off"])
    on, off = (percentile(speeds[cache], 0.5) for cache in ("on", "off"))
    say(f"cache on {on:.1f}, off {off:.1f} tok/s, hits {cached}")
    bar = Bar("zero-hit load: prefix cache on / off", ratio.median, 0.99, "x")
    return [bar], {"ratio": ratio, "tok_per_s": speeds, "hit_tokens": cached}


def overhead(settings: Settings) -> tuple[list[Bar], Any]:
    """One chat at a time, through the server and on the engine itself, the same prompts in turn.

    Each prompt is asked twice and the second time counts: computing it, whose time varies by more than what
    is looked for here, is then left to the prefix cache of both. Without speculation: how much is drafted
    depends on measured times, and would differ between the two.
    """
    from hasten.models.open import open_model

    tokenizer = open_model(settings.model).tokenizer()
    short, long = SharedChats(tokenizer, 1, system_tokens=64), SharedChats(tokenizer, 1, system_tokens=512)
    seen: dict[str, dict[str, list[Answer]]] = {}
    with (
        contenders.our_engine(settings, tokenizer, "speculate=off") as engine,
        contenders.our_server(settings, "--no-speculate") as server,
    ):
        for number in range(OVERHEAD_ROUNDS * settings.runs + 2):
            for label, chats, first in (("short", short, 0), ("long", long, 60)):  # no question twice
                chat = chats.round(2 * (first + number))
                pair = [engine, server] if number % 2 else [server, engine]
                for contender in pair:
                    contender.ask(chat, 1)
                    answer = contender.ask(chat, OVERHEAD_OUTPUT)[0]
                    contender.pause()
                    if answer.error:
                        raise PeerError(f"{contender.name}: {answer.error}")
                    if number >= 2:
                        seen.setdefault(label, {}).setdefault(contender.name, []).append(answer)
    bars, details = [], {}
    for label, answers in seen.items():
        added = _added(answers["hasten serve"], answers["hasten engine"])
        details[label] = added
        bars.append(
            Bar(f"server over engine: TTFT, {label} prompt", added["ttft_ms"], 3.0, "ms", at_least=False)
        )
        bars.append(
            Bar(f"server over engine: a token, {label} prompt", added["token_ms"], 0.3, "ms", at_least=False)
        )
    return bars, details


def _added(server: list[Answer], engine: list[Answer]) -> dict[str, Any]:
    """Medians of the pairs' differences: the prompts differ, so pairs are compared, not medians."""
    ttft = [1000 * ((a.first_s or 0.0) - (b.first_s or 0.0)) for a, b in zip(server, engine, strict=True)]
    token = [1000 * ((a.tpot_s or 0.0) - (b.tpot_s or 0.0)) for a, b in zip(server, engine, strict=True)]
    return {
        "ttft_ms": percentile(ttft, 0.5),
        "token_ms": percentile(token, 0.5),
        "ttft_differences_ms": stat_of(ttft),
        "token_differences_ms": stat_of(token),
        "token_pairs_ms": token,
        "engine_ttft_ms": stat_of([1000 * (a.first_s or 0.0) for a in engine]),
        "engine_token_ms": stat_of([1000 * (a.tpot_s or 0.0) for a in engine]),
        "prompt_tokens": sorted({a.prompt_tokens for a in server if a.prompt_tokens}),
        "output_tokens": sorted({a.output_tokens for a in server}),
    }


def start(settings: Settings) -> tuple[list[Bar], Any]:
    """From the start of the process until /ready is answered with 200; the artifact is in the page cache."""
    seconds = []
    for number in range(settings.runs + 1):
        address = Address("127.0.0.1", free_port())
        command = [*contenders.hasten_command(), "serve", settings.artifact, "--host", address.host]
        with ServerProcess(
            "hasten serve", [*command, "--port", str(address.port)], address, ready="/ready"
        ) as server:
            took = server.wait_ready()
        if number:
            seconds.append(took)
        say(f"start {number}: ready after {took:.2f} s")
    return [Bar("hasten serve ARTIFACT to ready", stat_of(seconds).median, 1.5, "s", at_least=False)], {
        "seconds": stat_of(seconds)
    }
