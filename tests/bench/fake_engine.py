"""An engine for the tests of the worker process; its format says how it behaves."""

from __future__ import annotations

import os
import sys
import time

from hasten.bench.figures import TokenClock
from hasten.bench.peers import Peer
from hasten.errors import PeerError
from hasten.speed.cost import Cost

PEER = Peer(("ok",), ("json",), "fake==1", crash_hint="build it anew")


def prepare(spec):
    if spec.format == "unpreparable":
        raise PeerError("the export failed", hint="try another")
    return f"{spec.source}/prepared"


def load(spec, prepared):
    assert prepared == f"{spec.source}/prepared"
    if spec.format == "big":
        spec = bytearray(200_000_000)
        spec[::4096] = b"x" * len(spec[::4096])
        return Fake("big")
    return Fake(spec.format)


class Fake:
    version = "1"
    weight_bytes = 1000
    notes = "fake"

    def __init__(self, form):
        self.format = form
        self.runs = 0
        self.seen = []

    def generate(self, prompts, output):
        self.runs += 1
        print("this is no reply")
        if self.format == "crash":
            sys.stderr.write("about to fall over\n")
            sys.stderr.flush()
            os.abort()
        if self.format == "raise":
            raise ValueError("no such kernel")
        if self.format == "hang":
            time.sleep(60)
        if self.format == "fails-later" and self.runs == 3:
            raise PeerError("out of pages")
        repeated = [p for p in prompts if p in self.seen]
        self.seen += prompts
        assert not repeated, "a prompt came twice"
        clock = TokenClock(prompts)
        for _ in range(output):
            for sequence, prompt in enumerate(prompts):
                time.sleep(0.002 if self.format == "slow" else 0.0005)
                clock.push(sequence, prompt[0])
        return clock.finish()

    def encode(self, text):
        return list(range(len(text) // 100))

    def decode(self, ids):
        return " ".join(map(str, ids))

    def cost(self, workload):
        return Cost(10**6, 0.0, 0.0, 0.0, 0.0, 1e6 * workload.prompt, 0.0, 0.0)

    def about(self):
        device = os.environ.get("FAKE_DEVICE")
        told = {"device": device, "device_because": "a test wants it"} if device else {}
        return {"model": "fake", **told}

    def close(self):
        return
