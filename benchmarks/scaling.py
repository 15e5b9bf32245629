"""How decoding scales: with the number of sequences, and with the length of the context."""

from __future__ import annotations

from typing import Any

import hasten
from bar import Bar, Settings, say
from hasten.bench.figures import Sample, paired_ratio
from hasten.bench.measure import PromptRing, default_text, measurement_of, run_once
from hasten.core import Workload


def batch(settings: Settings) -> tuple[list[Bar], Any]:
    """Eight sequences decoding together over one."""
    many, one = Workload(512, 128, batch=8), Workload(512, 128)
    return _ratio(settings, many, one, "8 sequences over 1: decode", 4.5)


def context(settings: Settings) -> tuple[list[Bar], Any]:
    """Decode after 8,192 tokens of prompt over decode after 512."""
    return _ratio(settings, Workload(8192, 128), Workload(512, 128), "8k context over 512: decode", 0.55)


def _ratio(
    settings: Settings, top: Workload, base: Workload, name: str, limit: float
) -> tuple[list[Bar], Any]:
    """Both workloads in turn on one loaded model, for w4 and for the chosen artifact."""
    bars, details = [], {}
    for label, ref, recipe in (("w4", settings.model, "w4"), ("chosen", settings.artifact, None)):
        runs = _alternate(settings, ref, recipe, (top, base))
        ratio = paired_ratio(*([s.decode_tok_per_s for s in samples] for samples in runs))
        bars.append(Bar(f"{label}: {name}", ratio.median, limit, "x"))
        details[label] = {
            "ratio": ratio,
            "measurements": [
                measurement_of(
                    samples,
                    workload,
                    engine="hasten",
                    version=hasten.__version__,
                    form=label,
                    weight_bytes=None,
                    threads=settings.threads,
                    peak_rss_bytes=None,
                )
                for samples, workload in zip(runs, (top, base), strict=True)
            ],
        }
    return bars, details


def _alternate(
    settings: Settings, ref: str, recipe: str | None, workloads: tuple[Workload, Workload]
) -> tuple[list[Sample], list[Sample]]:
    longest = max(w.prompt + w.output for w in workloads)
    model = hasten.load(ref, recipe=recipe, threads=settings.threads, context=longest)
    ring = PromptRing(model.tokenizer.encode(default_text(), add_special=False))
    runs: tuple[list[Sample], list[Sample]] = ([], [])
    at = 0
    for number in range(settings.runs + 1):
        say("warm-up" if number == 0 else f"round {number} of {settings.runs}")
        for samples, workload in zip(runs, workloads, strict=True):
            prompts = [ring.prompt(at + i, workload.prompt) for i in range(workload.batch)]
            at += workload.batch
            sample = run_once(model, prompts, workload.output)
            if number:
                samples.append(sample)
    model.close()
    return runs
