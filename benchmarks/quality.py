"""Our bf16 and int8 paths against transformers in fp32, over 4,096 tokens of the demo model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import hasten
from bar import Bar, Settings, say
from hasten import _native
from hasten.bench.compare import peer_source
from hasten.bench.measure import default_text
from hasten.errors import PeerError

WINDOW = 512
WINDOWS = 8
LIMITS = {"bf16": 2e-4, "w8": 2e-3}


def measure(settings: Settings) -> tuple[list[Bar], Any]:
    """Mean KL(transformers fp32 || ours) in nats, by recipe."""
    source = peer_source(settings.model)
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for recipe in LIMITS:
            model = hasten.load(settings.model, recipe=recipe, threads=settings.threads, context=WINDOW)
            if not figures:
                ids = model.tokenizer.encode(default_text(), add_special=False)
                windows = np.array(ids[: WINDOW * WINDOWS + 1], np.int32)
                _reference(settings, source, windows, Path(folder))
            figures[recipe] = _divergence(model, windows, Path(folder))
            model.close()
    bars = [
        Bar(
            f"{recipe}: mean KL against transformers fp32",
            figures[recipe]["kl_mean"],
            limit,
            "nats",
            at_least=False,
        )
        for recipe, limit in LIMITS.items()
    ]
    return bars, figures


def _reference(settings: Settings, source: Path, ids: Any, folder: Path) -> None:
    """Have the peers' Python write the logits of every window, 311 MB each with 151,936 ids."""
    np.save(folder / "ids.npy", ids)
    script = Path(__file__).parent / "reference_logits.py"
    python = settings.peer_python or sys.executable
    say("transformers fp32: computing reference logits")
    command = [python, str(script), str(source), str(folder), str(WINDOW), str(settings.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(
            f"reference logits failed: {done.stderr[-800:]}", hint="install torch, transformers, gguf"
        )


def _divergence(model: Any, ids: Any, folder: Path) -> dict[str, float]:
    kl, agree, ours, theirs = [], [], [], []
    for number in range(WINDOWS):
        say(f"{model.recipe.name}: window {number + 1} of {WINDOWS}")
        part = ids[number * WINDOW : (number + 1) * WINDOW + 1]
        reference = np.load(folder / f"{number}.npy", mmap_mode="r")
        found = _native.divergence(np.ascontiguousarray(reference), model.logits(part[:-1]), part[1:].copy())
        for into, values in zip((kl, theirs, ours, agree), found, strict=True):
            into.append(np.asarray(values, np.float64))
    values = np.concatenate(kl)
    return {
        "kl_mean": float(values.mean()),
        "kl_p99": float(np.quantile(values, 0.99)),
        "top1_agreement": float(np.concatenate(agree).mean()),
        "ppl": float(np.exp(np.concatenate(ours).mean())),
        "ppl_reference": float(np.exp(np.concatenate(theirs).mean())),
        "tokens": int(values.size),
    }
