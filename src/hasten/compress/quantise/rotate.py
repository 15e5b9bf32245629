"""Hidden states turned by a random Hadamard matrix, folded into the weights (QuaRot, Ashkboos et al. 2024).

A decoder that normalises before each block computes the same in any orthogonal basis of the residual stream:
RMSNorm without weights keeps lengths only, so norm weights go into the matrices that read them, and every
matrix that reads the stream turns its columns, every one that writes it turns its rows. Values turn within
each head likewise, between `v` and `o` (R2 of SpinQuant, Liu et al. 2024). Outliers of single channels are
spread over all, which rounds better; the model computes what it did, at the same speed.

What turns while the model runs (QuaRot's Hadamard before `down`, and of queries and keys) is not done: the
engine would pay for it at each token.

Weights have less error this way, outputs not always: a channel that is large in the stream and small in the
norm's weights hardly counts before, and is part of every channel after. Rounded to nearest in groups of 32,
the demo model gained nothing at 4 bits: measure a recipe with and without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from hasten.compress.changed import Values, changed
from hasten.compress.quantise.hadamard import Orthogonal, orthogonal
from hasten.compress.torch_layer import tensor_values
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.weights.tensors import SourceTensor

_READERS = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "gate": "mlp_norm", "up": "mlp_norm"}
_WRITERS = ("o", "down")


def obstacle(config: ModelSpec) -> str | None:
    """Why a model cannot be rotated; None where it can."""
    if config.norm_placement == "pre":
        return None
    return (
        f"{config.architecture} normalises what joins the residual stream, with a weight for each channel, "
        "and such weights fold into no matrix that follows"
    )


def residual_rotation(config: ModelSpec, seed: int = 0) -> Orthogonal:
    """The matrix Q [E, E] that `rotate` turns hidden states by; `because` says what was chosen."""
    return orthogonal(config.hidden_size, seed)


def head_rotation(config: ModelSpec, layer: int, seed: int = 0) -> Orthogonal:
    """The matrix R2 [D, D] that `rotate` turns the values of every head of a layer by."""
    return orthogonal(config.head_dim, seed + 1 + layer)


def rotate(source: Source, seed: int = 0) -> Source:
    """The model in another basis: the same outputs up to float32 rounding, weights without outliers.

    Nothing is computed now: each tensor is unpacked, folded and turned when it is read. A tied head is untied
    unless all weights of the final norm are equal (`config.tied_head` says): embedding and head then differ,
    and the model stores both. Norm weights become 1, so nothing more folds into them that was there before.

    Args:
        source: a model that normalises before each block, and nowhere else but queries and keys.
        seed: of both rotations.

    Raises:
        UsageError: norms stand where their weights fold into nothing (Gemma 3, OLMo 2).
    """
    if (why := obstacle(source.config)) is not None:
        raise UsageError(f"{source.name} cannot be rotated: {why}", hint="leave rotate out of the recipe")
    config, turn = source.config, residual_rotation(source.config, seed)
    values: dict[str, Values] = {"embed": _columns(source.tensors["embed"], turn)}
    for layer in range(config.num_layers):
        values |= _layer(source, layer, turn, head_rotation(config, layer, seed))
    final = source.tensors["final_norm"]
    weights = tensor_values(final)
    if config.tied_head and bool((weights == weights[0]).all()):
        return changed(source, values)  # a single factor commutes with every rotation: it stays in the norm
    head = source.tensors["embed" if config.tied_head else "head"]
    values |= {"head": _columns(head, turn, final), "final_norm": torch.ones_like(weights)}
    return changed(source, values, config=replace(config, head=replace(config.head, tied=False)))


def _layer(source: Source, layer: int, turn: Orthogonal, heads: Orthogonal) -> dict[str, Values]:
    """The new tensors of one layer by canonical name."""
    prefix = f"layers.{layer}."
    found = {name.removeprefix(prefix): t for name, t in source.tensors.items() if name.startswith(prefix)}
    values: dict[str, Values] = {
        name: _columns(found[name], turn, found[norm], heads if name == "v" else None)
        for name, norm in _READERS.items()
    }
    values |= {name: _rows(found[name], turn, heads if name == "o" else None) for name in _WRITERS}
    values |= {norm: torch.ones(found[norm].shape) for norm in ("attn_norm", "mlp_norm")}
    biases = {"v": heads, "o": turn, "down": turn}
    for name, by in biases.items():
        if (bias := found.get(f"{name}.bias")) is not None:
            values[f"{name}.bias"] = _columns(bias, by)
    return {prefix + name: value for name, value in values.items()}


def _columns(
    tensor: SourceTensor,
    turn: Orthogonal,
    norm: SourceTensor | None = None,
    heads: Orthogonal | None = None,
) -> Callable[[], torch.Tensor]:
    """W diag(norm) Q, and R2^T of that for each head's rows: what reads the stream, or a vector in it."""

    def made() -> torch.Tensor:
        values = tensor_values(tensor)
        if norm is not None:
            values *= tensor_values(norm)
        values = turn.turn_(values)
        return values if heads is None else heads.turn_rows_(values)

    return made


def _rows(tensor: SourceTensor, turn: Orthogonal, heads: Orthogonal | None) -> Callable[[], torch.Tensor]:
    """Q^T W, and that times R2 for each head's columns: what writes the stream."""

    def made() -> torch.Tensor:
        values = tensor_values(tensor)
        return turn.turn_rows_(values if heads is None else heads.turn_(values))

    return made
