"""The soak: 64 clients for ten minutes, with hang-ups, wrong requests and too little room for the cache.

    python benchmarks/soak.py --artifact w4.hasten                    # 10 minutes
    python benchmarks/soak.py --artifact w4.hasten --seconds 60       # while developing

Checked: no good request fails; questions asked again and again get the answer they got on the idle server;
every wrong request is refused with a 4xx; resident memory in the last minute is within 3 % of the third
minute's (of a shorter run: the last and the third tenth); afterwards no page is held but by the prefix cache,
nothing runs or waits; SIGTERM ends the server with code 0. Pages must have been short: some request was
preempted. Writes benchmarks/results/serving-soak.json. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import serving_contenders as contenders
from bar import Bar, Settings, record, say
from chat_workloads import TOPICS
from hasten.bench.figures import percentile
from hasten.bench.load import Address, send
from hasten.errors import HastenError, PeerError
from serving import make_artifact
from soak_clients import Client, Tally, ask_known

CLIENTS = 64
KV_GB = 0.04  # 3,200 tokens of the demo model for 16 sequences of up to 1,400
CONTEXT = 2048
MEMORY_LIMIT = 1.03
SETTLE_S = 30.0


@dataclass
class Memory:
    """The server's resident set over time."""

    pid: int
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)

    def sample(self, at: float) -> None:
        """One look at /proc; a process that is gone is not looked at."""
        try:
            text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        except OSError:
            return
        kilobytes = next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))
        self.seconds.append(at)
        self.bytes.append(1024 * int(kilobytes))

    def mean(self, start: float, end: float) -> float | None:
        """Mean bytes between two times; None if nobody looked then."""
        found = [b for s, b in zip(self.seconds, self.bytes, strict=True) if start <= s < end]
        return sum(found) / len(found) if found else None

    def growth(self, duration: float) -> float | None:
        """The last tenth's mean over the third tenth's."""
        tenth = duration / 10
        third, last = self.mean(2 * tenth, 3 * tenth), self.mean(9 * tenth, duration)
        return last / third if third and last else None


def main() -> int:
    """Run the soak and judge it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="the source model, if there is no artifact yet")
    parser.add_argument("--artifact", default="demo-w4.hasten")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--kv-gb", type=float, default=KV_GB)
    given = parser.parse_args()
    settings = Settings(given.model, given.artifact, given.threads, 1, None, None)
    try:
        make_artifact(settings)
        bars, details = soak(settings, given.seconds, given.clients, given.kv_gb)
    except HastenError as error:
        say(f"failed: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return 1
    say(f"written: {record('serving-soak', settings, bars, details)}")
    return 0 if all(bar.passed for bar in bars) else 1


def soak(settings: Settings, seconds: float, clients: int, kv_gb: float) -> tuple[list[Bar], Any]:
    """Start the server, let the clients loose, look at what is left."""
    with contenders.our_server(settings, "--kv-gb", str(kv_gb), context=CONTEXT) as served:
        memory, tally = Memory(served.server.pid), Tally()
        left = asyncio.run(_run(served, memory, tally, seconds, clients))
        alive = served.server.running
        code = served.server.terminate() if alive else None
    _show(tally)
    good = sum(count for kind, count in tally.done.items() if kind in ("chat", "whole", "known", "form"))
    bars = [
        _none("good requests that failed", len(tally.failed_good)),
        _none("known questions answered otherwise", len(tally.wrong_answers)),
        _none("wrong requests not refused with a 4xx", len(tally.bad_accepted)),
        Bar("memory, last minute / third", memory.growth(seconds), MEMORY_LIMIT, "x", at_least=False),
        _none("pages held by nobody", left["kv_pages_used"] - left["kv_pages_cached"]),
        _none("requests left behind", left["running"] + left["waiting"]),
        Bar("preemptions: pages were short", float(left["preemptions"]), 1.0, ""),
        _none("exit code after SIGTERM", 1 if code is None else code),
    ]
    waits = tally.ttft_s or [0.0]
    details = {
        "seconds": seconds,
        "clients": clients,
        "kv_gb": kv_gb,
        "requests": dict(tally.done),
        "good_requests": good,
        "output_tok_per_s": tally.output_tokens / seconds,
        "ttft_s": {"p50": percentile(waits, 0.5), "p95": percentile(waits, 0.95)},
        "faults": [*tally.failed_good[:20], *tally.wrong_answers[:20], *tally.bad_accepted[:20]],
        "rss_bytes": {f"{at:.0f}": size for at, size in zip(memory.seconds, memory.bytes, strict=True)},
        "engine": left,
    }
    return bars, details


async def _run(
    served: contenders.Served, memory: Memory, tally: Tally, seconds: float, clients: int
) -> dict[str, Any]:
    address = served.server.address
    known = {}
    for topic in TOPICS[:6]:
        question = f"What are {topic}? Answer in one sentence."
        answer = await ask_known(address, served.model, question)
        if answer.error:
            raise PeerError(f"the idle server failed: {answer.error}")
        known[question] = answer.text
    start = time.perf_counter()
    watch = asyncio.create_task(_watch(memory, tally, start, seconds))
    crowd = [Client(address, served.model, seed, tally, known) for seed in range(clients)]
    await asyncio.gather(*(client.run(start + seconds) for client in crowd))
    watch.cancel()
    return await _settled(address)


async def _watch(memory: Memory, tally: Tally, start: float, seconds: float) -> None:
    """Look at the server's memory every second and say how it goes every minute."""
    while (at := time.perf_counter() - start) < seconds:
        memory.sample(at)
        if len(memory.bytes) % 60 == 1:
            say(
                f"{at:.0f} s: {memory.bytes[-1] / 1e6:.0f} MB, {sum(tally.done.values())} requests, "
                f"{len(tally.failed_good)} failed"
            )
        await asyncio.sleep(1.0)


async def _settled(address: Address) -> dict[str, Any]:
    """The engine's numbers once nothing runs and waits, or after the time that takes at most."""
    until = time.perf_counter() + SETTLE_S
    while True:
        answer = await send(address, "GET", "/stats", limit_s=30.0)
        engine: dict[str, Any] = next(iter(answer.json()["models"].values()))
        if (not engine["running"] and not engine["waiting"]) or time.perf_counter() > until:
            return engine
        await asyncio.sleep(0.2)


def _none(name: str, count: float) -> Bar:
    return Bar(name, float(count), 0.0, "", at_least=False)


def _show(tally: Tally) -> None:
    for name, faults in (
        ("good requests that failed", tally.failed_good),
        ("wrong answers", tally.wrong_answers),
        ("wrong requests not refused", tally.bad_accepted),
    ):
        _show_some(name, faults)


def _show_some(name: str, faults: Sequence[str], most: int = 10) -> None:
    if faults:
        say(f"{name}: {len(faults)}, the first {min(most, len(faults))}:")
    for fault in faults[:most]:
        say(f"  {fault[:400]}")


if __name__ == "__main__":
    sys.exit(main())
