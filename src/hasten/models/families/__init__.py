"""The families of models that open, and what all must satisfy.

A family is an entry of the table, and a file that it may share with one that is nearly the same.

To add one, see CONTRIBUTING.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import numpy as np

from hasten.core import Activation, Attention, ModelSpec, NormPlacement, QkNorm, dense
from hasten.errors import ModelError
from hasten.models.families import decoder
from hasten.models.families.family import Family, Fields
from hasten.models.families.gemma3 import GEMMA3
from hasten.models.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3
from hasten.models.gguf import GgufMetadata
from hasten.models.rope import frequencies

_MAX_HEAD_DIM = 1024  # of native/bind/engine.cpp: attention keeps a query's row on the stack
FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, PHI3, SMOLLM3, OLMO2)
}
"""By `ModelSpec.architecture`."""
_OF_THE_WHOLE = ("tie_word_embeddings", "bos_token_id", "eos_token_id")


def hf_spec(values: Any, where: str, embed_dtype: str = "BF16") -> ModelSpec:
    """Translate a Hugging Face configuration.

    Args:
        values: the parsed config.json.
        where: what errors call it.
        embed_dtype: how the embedding is stored; Gemma's scale of it is rounded to that, as in the original.

    Raises:
        ModelError: an architecture or feature that is not supported, or a value that makes no sense.
    """
    if not isinstance(values, Mapping):
        raise ModelError(f"{where}: must hold an object, got {type(values).__name__}")
    name = values.get("model_type") or _type_of_class(values.get("architectures"))
    if name is None:
        raise ModelError(f"{where}: model_type is missing", hint="download config.json again")
    family = next((f for f in FAMILIES.values() if name in (f.model_types or (f.name,))), None)
    if family is None:
        raise _unsupported(name, where)
    if name in family.nested_types:  # the whole model's word counts for its text half too
        whole = {key: values[key] for key in _OF_THE_WHOLE if values.get(key) is not None}
        values = {**Fields(values, where).mapping("text_config"), **whole}
    fields = Fields(values, where, defaults=family.defaults)
    return checked(decoder.from_config(fields, family, embed_dtype), where)


def _type_of_class(classes: Any) -> str | None:
    """The model's type by its class, where a config names no type."""
    known = {family.hf_class: (family.model_types or (family.name,))[0] for family in FAMILIES.values()}
    first = classes[0] if isinstance(classes, list) and classes else None
    return known.get(first) if isinstance(first, str) else None


def gguf_spec(metadata: GgufMetadata, tensors: decoder.Tensors, where: str) -> ModelSpec:
    """Translate the metadata of a GGUF file.

    Args:
        metadata: of the file.
        tensors: of the file, by its own names.
        where: what errors call it.

    Raises:
        ModelError: an architecture or feature that is not supported, or a value that makes no sense.
    """
    name = metadata.text("general.architecture")
    family = next((f for f in FAMILIES.values() if f.gguf == name), None)
    if family is None:
        raise _unsupported(name, where)
    fields = Fields(metadata, where, prefix=f"{name}.")
    return checked(decoder.from_gguf(fields, family, metadata, tensors), where)


def _unsupported(name: Any, where: str) -> ModelError:
    return ModelError(
        f"{where}: architecture {name!r} is not supported",
        hint=f"supported: {', '.join(FAMILIES)} (SmolLM and SmolLM2 are llama)",
    )


def checked(spec: ModelSpec, where: str) -> ModelSpec:
    """The model, if its numbers fit each other and every part of this program can run it.

    Raises:
        ModelError: they do not.
    """
    if spec.architecture not in FAMILIES:
        raise _unsupported(spec.architecture, where)
    for name, value, low, high in _sizes(spec):
        if not low <= value <= high:
            raise ModelError(f"{where}: {name} must be from {low} to {high}, got {value}")
    for name, number, most in _positive(spec):
        if number is not None and not 0 < number <= most:
            raise ModelError(f"{where}: {name} must be above 0 and at most {most:g}, got {number}")
    for name, word, known in _words(spec):
        if word not in known:
            raise ModelError(
                f"{where}: {name} {word!r} is not supported", hint=f"supported: {', '.join(known)}"
            )
    try:
        dense(spec, "hasten")
        for mixer in dict.fromkeys(block.mixer for block in spec.blocks):
            _check_attention(mixer, spec.context)
    except ModelError as wrong:
        raise ModelError(f"{where}: {wrong.message}", hint=wrong.hint) from None
    return spec


def _sizes(spec: ModelSpec) -> Iterator[tuple[str, float, int, int]]:
    """Whole numbers and the bounds between which real models lie."""
    yield "num_layers", len(spec.blocks), 1, 1024
    yield "hidden_size", spec.width, 1, 1 << 20
    yield "vocab_size", spec.vocab, 1, 1 << 22
    yield "context_length", spec.context, 1, 1 << 31
    yield "norm_eps", spec.final_norm.eps, 0, 1
    for block in dict.fromkeys(spec.blocks):
        mixer = block.mixer
        yield "intermediate_size", block.feed_forward.width, 1, 1 << 20
        yield "num_heads", mixer.heads, 1, 4096
        yield "num_kv_heads", mixer.kv_heads, 1, 4096
        yield "head_dim", mixer.head_dim, 2, _MAX_HEAD_DIM
        yield "norm_eps", block.norms.eps, 0, 1
        if mixer.window is not None:
            yield "sliding_window", mixer.window, 1, (1 << 31) - 1


def _positive(spec: ModelSpec) -> Iterator[tuple[str, float | None, float]]:
    """Numbers above 0, where there are any, and the most that each may be: beyond lies but overflow."""
    yield "embed_scale", spec.embedding.scale, 1e6
    yield "logit_softcap", spec.head.softcap, 1e6
    for mixer in dict.fromkeys(block.mixer for block in spec.blocks):
        yield "query_scale", mixer.scale, 1e6
        yield "attention_softcap", mixer.softcap, 1e6
        if mixer.rotary is not None:
            yield "rope_theta", mixer.rotary.theta, 1e15


def _words(spec: ModelSpec) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    for block in dict.fromkeys(spec.blocks):
        yield "activation", block.feed_forward.activation, get_args(Activation)
        yield "norm_placement", block.norms.placement, get_args(NormPlacement)
        yield "qk_norm", block.mixer.qk_norm, get_args(QkNorm)


def _check_attention(mixer: Attention, context: int) -> None:
    if mixer.heads % mixer.kv_heads:
        raise ModelError(f"{mixer.heads} query heads are no multiple of {mixer.kv_heads} key heads")
    rotary = mixer.rotary
    if rotary is None:
        return
    if rotary.dim % 2 or not 0 < rotary.dim <= mixer.head_dim:
        raise ModelError(
            f"rotary dimensions must be even and at most the head size {mixer.head_dim}, got {rotary.dim}"
        )
    scaling = rotary.scaling
    for name, factors in (("short", scaling.short_factor), ("long", scaling.long_factor)):
        fits = len(factors) == rotary.dim // 2 and all(f > 0 for f in factors)
        if scaling.kind == "longrope" and not fits:
            raise ModelError(f"longrope needs {rotary.dim // 2} positive {name} factors, got {len(factors)}")
    if scaling.original_context_length is not None and scaling.original_context_length < 1:
        raise ModelError(f"an original context of {scaling.original_context_length} tokens")
    try:
        with np.errstate(all="ignore"):  # what comes of it is looked at below
            turned = [frequencies(rotary, context), frequencies(rotary, context, 1 << 31)]
    except (ArithmeticError, ValueError) as wrong:
        raise ModelError(f"{scaling.kind} rope scaling cannot be computed: {wrong}") from None
    if not all(np.isfinite(inverse).all() and math.isfinite(scale) for inverse, scale in turned):
        raise ModelError(f"{scaling.kind} rope scaling gives frequencies that are not finite")
