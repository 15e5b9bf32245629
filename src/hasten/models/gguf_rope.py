"""Rotary embedding parameters of a GGUF file: metadata, and tensors that hold a factor for each frequency."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from hasten.errors import ModelError
from hasten.models.fields import Fields
from hasten.rope_scaling import RopeScaling
from hasten.weights.tensors import SourceTensor

_KINDS = ("none", "linear", "yarn", "longrope")


def gguf_rope(
    fields: Fields, tensors: Mapping[str, SourceTensor], rotary: int, context: int
) -> tuple[float, RopeScaling]:
    """(theta, scaling).

    A `rope_freqs.weight` tensor holds Llama 3's scaling as divisors worked out by the converter: that is a
    `longrope` whose short and long factors are equal and whose attention factor is 1.

    Raises:
        ModelError: a kind that is not supported, or factors that do not fit the rotary dimensions.
    """
    theta = float(fields.number("rope.freq_base", 10_000.0))
    factor = fields.number("rope.scaling.factor", 0.0, low=-1.0)
    factor = factor or fields.number("rope.scale_linear", 0.0, low=-1.0) or 1.0  # the second is the old name
    kind = fields.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
    if kind not in _KINDS:
        raise ModelError(
            f"{fields.where}: rope scaling {kind!r} is not supported", hint=f"supported: {', '.join(_KINDS)}"
        )
    original = fields.integer("rope.scaling.original_context_length", context, high=1 << 31)
    long = _factors(tensors, "rope_factors_long.weight", rotary, fields.where)
    short = _factors(tensors, "rope_factors_short.weight", rotary, fields.where)
    llama3 = _factors(tensors, "rope_freqs.weight", rotary, fields.where)
    if long or short:
        return theta, _longrope(fields, short or long, long or short, original, context)
    if llama3:
        if kind == "yarn":
            raise ModelError(f"{fields.where}: rope_freqs.weight together with yarn is not supported")
        scaled = tuple(divisor * (factor if kind == "linear" else 1.0) for divisor in llama3)
        same = RopeScaling(
            "longrope", 1.0, context, attention_factor=1.0, short_factor=scaled, long_factor=scaled
        )
        return theta, same
    if kind == "linear":
        return theta, RopeScaling("linear", factor) if factor != 1.0 else RopeScaling()
    if kind == "yarn":
        return theta, _yarn(fields, factor, original)
    return theta, RopeScaling()


def _factors(tensors: Mapping[str, SourceTensor], name: str, rotary: int, where: str) -> tuple[float, ...]:
    tensor = tensors.get(name)
    if tensor is None:
        return ()
    if tensor.dtype != "F32" or tensor.shape != (rotary // 2,):
        raise ModelError(
            f"{where}: tensor {name!r} must be F32 [{rotary // 2}], got {tensor.dtype} {list(tensor.shape)}"
        )
    values = tensor.data.view(np.float32)
    if not bool(np.all(np.isfinite(values) & (values > 0))):
        raise ModelError(f"{where}: tensor {name!r} must hold finite, positive factors")
    return tuple(values.tolist())


def _longrope(
    fields: Fields, short: tuple[float, ...], long: tuple[float, ...], original: int, context: int
) -> RopeScaling:
    """Phi-3: the converter writes the attention factor; 1 where it is missing, as llama.cpp has it."""
    attention = fields.number("rope.scaling.attn_factor", 1.0)
    return RopeScaling(
        "longrope",
        context / original,
        original,
        attention_factor=attention,
        short_factor=short,
        long_factor=long,
    )


def _yarn(fields: Fields, factor: float, original: int) -> RopeScaling:
    """llama.cpp multiplies the usual sharpening 1 + 0.1 ln(factor) with the file's attn_factor."""
    given = fields.number("rope.scaling.attn_factor", 1.0)
    given *= fields.number("rope.scaling.yarn_attn_factor", 1.0)
    attention = given * (1.0 + 0.1 * math.log(factor)) if given != 1.0 and factor > 1 else None
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention,
    )
