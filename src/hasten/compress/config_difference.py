"""Whether two configurations mean the same model, whatever words they say it in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.core import ModelSpec
from hasten.models import rope

_COMPARED = (
    *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "context_length", "norm_eps", "activation", "norm_placement", "qk_norm"),
    *("sliding_window", "sliding_layers", "attention_softcap", "logit_softcap", "embed_scale", "tied_head"),
)
"""What must be equal; rotation is compared as the frequencies it gives, end tokens go with the tokenizer."""
_EMBED_SCALE_ERROR = 2**-8  # of a scale rounded to bf16; readers differ in whether they round it


@dataclass(frozen=True)
class Difference:
    """What differs first."""

    name: str
    ours: Any
    theirs: Any


def difference(ours: ModelSpec, theirs: ModelSpec) -> Difference | None:
    """The first thing in which two models differ, None where they compute the same."""
    mine, other = _meaning(ours), _meaning(theirs)
    for name, value in mine.items():
        tolerance = _EMBED_SCALE_ERROR if name == "embed_scale" else 1e-5
        if not _same(value, other[name], tolerance):
            return Difference(name, value, other[name])
    return None


def _meaning(config: ModelSpec) -> dict[str, Any]:
    known: dict[str, Any] = {name: getattr(config, name) for name in _COMPARED}
    window = config.sliding_window
    if window is not None and window >= config.context_length:
        known |= {"sliding_window": None, "sliding_layers": ()}
    known["rotary_dim"] = config.rotary_dim or config.head_dim
    known["rope_layers"] = config.rope_layers or (True,) * config.num_layers
    known["query_scale"] = config.score_scale
    turned = rope.tables(config)
    known["rope frequencies"] = turned.global_inv_freq
    known["rope scale"] = turned.global_scale
    known["rope frequencies of long texts"] = turned.long_inv_freq
    known["rope threshold"] = turned.long_threshold
    known["rope frequencies of sliding layers"] = turned.local_inv_freq
    if config.rope_scaling.kind == "dynamic":
        known["rope frequencies of long texts"] = rope.tables(config, 4 * config.context_length)
    return known


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, rope.RopeTables) and isinstance(b, rope.RopeTables):
        a, b = a.global_inv_freq, b.global_inv_freq
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=0))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance)
    return type(a) is type(b) and bool(a == b)
