"""What a result depends on, as one short text: two models of the same fingerprint give the same bits."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

import hasten
from hasten.core import as_json
from hasten.weights.packed import checksum_of
from hasten.weights.plan import LAYOUT_VERSION

if TYPE_CHECKING:
    from hasten.engine.model import LanguageModel


def fingerprint(model: LanguageModel) -> str:
    """Names a loaded model so exactly that keys, values and answers kept under it may be used again.

    It covers the packed weights, their layouts, norms and biases, the configuration, the kind of KV cache,
    the tokenizer with its chat templates, the layout version, the version of this program and the
    instruction set (two of them may differ by a rounding). A model has the same fingerprint whether it was
    packed just now or read from an artifact or the store. Threads, context and batch limits never change a
    bit: left out.

    Costs one pass over the weights where their checksums are not known yet (0.15 s a GB on two cores), and
    0.5 s with a large tokenizer that was not loaded from an artifact; what was stored has both.

    Args:
        model: it must not be closed. After `model.replace` the fingerprint is another.

    Returns:
        64 hexadecimal digits.
    """
    threads = model.threads
    linears = {
        name: [as_json(linear.layout), linear.rows, linear.cols, checksum_of(linear, threads)]
        for name, linear in model.packed.linears.items()
    }
    vectors = {
        name: hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest()
        for name, values in model.packed.vectors.items()
    }
    parts = {
        "hasten": hasten.__version__,
        "layout_version": LAYOUT_VERSION,
        "isa": model.executor.name,
        "config": as_json(model.config),
        "kv": model.recipe.kv,
        "linears": linears,
        "vectors": vectors,
        "tokenizer": model.tokenizer.digest,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
