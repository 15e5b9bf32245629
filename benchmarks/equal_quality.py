"""Speed at equal quality: each of a peer's types against our fastest recipe that is no worse than it.

A part of bars.py. Our engine opens what the peer wrote, values kept, and judges it and our recipes on the
same text against the source in bf16. No worse means a mean KL divergence of at most SLACK times the
peer's; the fastest is taken to be the one that stores the fewest bits. Then the two are timed in turn. Ours
are rounded as the peer's are: what calibration gains on top is in quantisers.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import hasten
from bar import Bar, Settings, say
from hasten.bench.compare import prepared
from hasten.quality.divergence import Reference
from hasten.quality.text import WINDOW, default_text, windows
from peers import compared, request
from quantisers import Judged, bits_of, judge

PEERS = {"llama.cpp:q8_0": 1.4, "llama.cpp:q4_k_m": 1.4, "llama.cpp:q4_0": 1.4}
"""Peer -> bar for decode."""
RECIPES = ("w8", "source", "w6", "w5-head8", "w5", "w4-head8", "w4")
SLACK = 1.1
TOKENS = 8192


def measure(settings: Settings) -> tuple[list[Bar], Any]:
    """Judge all, pair them, time the pairs."""
    files = prepared(request(settings, settings.model, None, list(PEERS)), say)
    source = hasten.load(settings.model, "bf16", threads=settings.threads, context=WINDOW)
    reference = Reference(source, windows(default_text().evaluation, source.tokenizer, tokens=TOKENS))
    ours = [_judged(name, settings.model, name, settings, reference) for name in RECIPES]
    theirs = [_judged(name, files[name], "source", settings, reference) for name in PEERS]
    bars, pairs = [], []
    for peer in theirs:
        rival = fastest(ours, peer)
        record = compared(settings, settings.model, rival.name, [peer.name])
        low = record["ratios"][peer.name]["decode_interval"][0]
        name = f"{rival.name} / {peer.name}, KL {rival.kl_mean:.4f} / {peer.kl_mean:.4f}: decode, lower end"
        bars.append(Bar(name, low, PEERS[peer.name], "x"))
        pairs.append({"ours": asdict(rival), "peer": asdict(peer), "speed": record})
    return bars, {"pairs": pairs, "judged": [asdict(one) for one in (*ours, *theirs)], "tokens": TOKENS}


def fastest(ours: list[Judged], peer: Judged) -> Judged:
    """Ours with the fewest bits among those no worse than the peer; the best of all if there is none."""
    good = [one for one in ours if one.kl_mean <= SLACK * peer.kl_mean]
    return min(good, key=lambda one: one.bits) if good else min(ours, key=lambda one: one.kl_mean)


def _judged(name: str, model: str, recipe: str, settings: Settings, reference: Reference) -> Judged:
    is_file = model != settings.model
    loaded = hasten.load(model, recipe, threads=settings.threads, context=WINDOW, store=not is_file)
    found = judge(
        name, loaded, reference, bits_of(model) if is_file else None, {"file": name} if is_file else {}
    )
    say(found.line())
    return found
