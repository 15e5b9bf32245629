"""A ModelSpec as GGUF metadata: the inverse of hasten.models.families.gguf_metadata, checked by it.

Whatever the format or llama.cpp has no word for (a sliding window in a llama, soft caps, dynamic rope) comes
back different from the check, and is refused by name before a byte is written.

Source: as hasten.models.families.gguf_metadata.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.compress.config_difference import difference
from hasten.core import ModelSpec, RopeScaling, Rotary
from hasten.errors import HastenError, UsageError
from hasten.models import rope
from hasten.models.families import FAMILIES, gguf_spec
from hasten.models.gguf import GgufMetadata
from hasten.weights.tensors import SourceTensor

ARCHITECTURES = {name: family.gguf for name, family in FAMILIES.items()}
"""What GGUF calls each architecture; a Mistral without a window is a llama."""

_BIASES = {"llama": frozenset(("q", "k", "v", "o", "gate", "up", "down")), "qwen2": frozenset("qkv")}
_BF16 = 32  # llama.cpp's llama_ftype MOSTLY_BF16; of mixed files no number is true
Factors = dict[str, npt.NDArray[np.float32]]


def refuse(what: str, why: str) -> UsageError:
    """The error for what GGUF cannot carry."""
    return UsageError(
        f"gguf cannot carry {what}: {why}", hint="--to compressed-tensors carries every architecture"
    )


def config_metadata(config: ModelSpec, biases: Iterable[str], name: str) -> tuple[dict[str, Any], Factors]:
    """(metadata, F32 tensors of rope factors) of a model.

    Args:
        config: the model.
        biases: linear layers that have one.
        name: what the file calls the model.

    Raises:
        UsageError: GGUF, or the program that reads it, cannot say something of the model; it is named.
    """
    architecture = ARCHITECTURES.get(config.architecture)
    if architecture is None:
        raise refuse(f"the architecture {config.architecture}", f"known are {', '.join(ARCHITECTURES)}")
    strange = sorted(set(biases) - _BIASES.get(architecture, frozenset()))
    if strange:
        raise refuse(f"the biases of {', '.join(strange)}", f"{architecture} in GGUF has none there")
    values: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _BF16,
        "general.quantization_version": 2,
    }
    own = _shape(config, architecture)
    scaling, factors = _rope(config)
    values |= {f"{architecture}.{key}": value for key, value in {**own, **scaling}.items()}
    _check(config, values, factors)
    return values, factors


def _shape(config: ModelSpec, architecture: str) -> dict[str, Any]:
    own: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.rotary_dim or config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.head_dim * config.num_heads != config.hidden_size or architecture == "gemma3":
        own |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "gemma3" and config.sliding_window is not None:
        own["attention.sliding_window"] = config.sliding_window
    if architecture == "phi3":
        own["attention.sliding_window"] = 0
    return own


def _rope(config: ModelSpec) -> tuple[dict[str, Any], Factors]:
    """Metadata below `ARCHITECTURE.rope.`, and factors by tensor name."""
    scaling, kind = config.rope_scaling, config.rope_scaling.kind
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}, {}
    if kind == "yarn":
        return _yarn(scaling, config), {}
    if kind == "llama3":
        rotary = _rotary(config)
        plain, _ = rope.frequencies(replace(rotary, scaling=RopeScaling()), config.context)
        scaled, _ = rope.frequencies(rotary, config.context)
        return {}, {"rope_freqs.weight": (plain / scaled).astype(np.float32)}
    if kind == "longrope":
        return _longrope(scaling, config)
    if kind != "default":
        raise refuse(f"rope scaling of the kind {kind}", "the format has no word for it")
    return {}, {}


def _rotary(config: ModelSpec) -> Rotary:
    return config.rotary or Rotary(config.head_dim)


def _yarn(scaling: RopeScaling, config: ModelSpec) -> dict[str, Any]:
    found = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_context_length or config.context_length,
    }
    if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        found["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        found["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    _, scale = rope.frequencies(_rotary(config), config.context)
    usual = 1.0 + 0.1 * math.log(scaling.factor) if scaling.factor > 1 else 1.0
    if not math.isclose(scale, usual, rel_tol=1e-6):
        found["rope.scaling.attn_factor"] = scale / usual
    return found


def _longrope(scaling: RopeScaling, config: ModelSpec) -> tuple[dict[str, Any], Factors]:
    short, long = (np.array(f, np.float32) for f in (scaling.short_factor, scaling.long_factor))
    _, scale = rope.frequencies(_rotary(config), config.context)
    if scaling.short_factor == scaling.long_factor and scale == 1.0:  # Llama 3 out of a GGUF file
        return {}, {"rope_freqs.weight": short}
    own = {"rope.scaling.attn_factor": float(scale)}
    if scaling.original_context_length:
        own["rope.scaling.original_context_length"] = scaling.original_context_length
    return own, {"rope_factors_long.weight": long, "rope_factors_short.weight": short}


def _check(config: ModelSpec, values: Mapping[str, Any], factors: Factors) -> None:
    """Read the metadata as a file's and compare what it says with the model."""
    kept = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in values.items()}
    nothing = np.zeros((), np.uint8)
    rows = config.vocab_size
    tensors = {
        name: SourceTensor(name, value.shape, "F32", value.view(np.uint8)) for name, value in factors.items()
    }
    for name in ("token_embd.weight", *(() if config.tied_head else ("output.weight",))):
        tensors[name] = SourceTensor(name, (rows, 1), "F16", np.broadcast_to(nothing, 2 * rows))
    try:
        found = gguf_spec(GgufMetadata(kept), tensors, "the exported file")
    except HastenError as wrong:
        raise refuse("this model", wrong.message) from None
    _compare(config, found)


def _compare(config: ModelSpec, found: ModelSpec) -> None:
    named = replace(config, architecture=found.architecture)
    wrong = difference(named, found)
    if wrong is not None:
        raise refuse(wrong.name, f"the model has {wrong.ours}, such a file means {wrong.theirs}")
