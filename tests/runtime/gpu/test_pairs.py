"""Every two features of the engine together on the GPU's executor: both are used, and no answer is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from running_models import GREEDY, answers, is_greedy, patient, running

from hasten.engine.grammar import Grammar
from hasten.engine.request import Request
from hasten.models.open import open_model
from hasten.runtime.gpu.shape import PAGE
from hasten.runtime.sampling import SamplingOptions
from tiny_models import prompts

FEATURES = ("disk", "preemption", "prefix", "chunks", "drafts", "grammar")
NEW = 44  # tokens of an answer: it grows over a page's border
PATTERN = "[a-f]{5,20}[xyz]"
START = (*prompts()[2], *prompts()[0])  # longer than a page


def requests_of(pair: tuple[str, str]) -> list[Request]:
    found = [Request((*START, 9 + i), NEW, GREEDY) for i in range(2)]
    if "drafts" in pair:  # what is said again and again can be guessed
        found.append(Request(tuple(prompts()[1] * 8), NEW, GREEDY))
    if "grammar" in pair:
        found.append(Request(START, 30, SamplingOptions(1.0, seed=4), grammar=Grammar("regex", PATTERN)))
    return found


@pytest.mark.parametrize("pair", list(combinations(FEATURES, 2)), ids="-".join)
def test_two_features_together(
    pair: tuple[str, str],
    device: str,  # where "cuda" computes
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient(monkeypatch)
    source, asked, stats = open_model(tiny_folder("qwen3")), requests_of(pair), list[Any]()
    limits: dict[str, Any] = {"context": 4 * PAGE, "max_sequences": 8}
    with running(source, **limits) as model:
        size = model.executor.page_bytes
    if "preemption" in pair:
        limits["kv_gb"] = 5.5 * size / 1e9
    serving: dict[str, Any] = {
        "speculate": "drafts" in pair,
        "prefix_cache": bool({"disk", "prefix"} & {*pair}),
        "kv_disk": tmp_path if "disk" in pair else None,
    }
    with running(source, **limits) as model:
        if "chunks" in pair:
            model.executor.chunk = 16
        for _ in range(2 if serving["prefix_cache"] else 1):  # the second finds what the first one kept
            found = answers(model, asked, stats, **serving)
            for request, tokens in zip(asked, found, strict=True):
                if request.grammar is None:
                    assert len(tokens) == request.max_new_tokens
                    assert is_greedy(model, request.prompt, tokens)
                else:
                    assert re.fullmatch(PATTERN, model.tokenizer.decode(tokens))
        assert model.executor.pool.free == model.executor.pool.pages
    used = {
        "disk": stats[-1].disk_hit_tokens,
        "preemption": stats[0].preemptions,
        "prefix": stats[-1].prefix_hit_tokens,
        "chunks": stats[0].steps > NEW + len(START) // 16 or "drafts" in pair,  # which take steps away
        "drafts": stats[0].drafted_tokens,
        "grammar": True,
    }
    assert all(used[feature] for feature in pair), used
