"""Scales that move from a linear layer's inputs into what makes them: the output stays what it was.

Multiplying column j of a matrix by s_j and dividing input j by it changes nothing, and the division costs
nothing where it folds into what is there: a norm's weight, or the rows of the matrix before. AWQ (Lin et al.
2023) and SmoothQuant (Xiao et al. 2022) differ only in how they choose s. Pure functions: nothing given is
written to, and tensors that a fold leaves alone are shared with the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch

from hasten.core import ModelSpec

Group = Literal["qkv", "o", "gate_up", "down"]
"""Linear layers that read the same input, in the order they are computed."""

GROUPS: tuple[Group, ...] = get_args(Group)

READERS: Mapping[Group, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
"""Short names of a group's matrices."""

_NORMS: Mapping[Group, str] = {"qkv": "attn_norm", "gate_up": "mlp_norm"}
_MAKERS: Mapping[Group, str] = {"o": "v", "down": "up"}


def obstacle(config: ModelSpec, group: Group) -> str | None:
    """Why scales of a group's inputs fold into nothing; None where they fold."""
    if group in _NORMS and config.norm_placement == "post":
        return (
            f"{config.architecture} has no norm before {' and '.join(READERS[group])}: "
            "they read the residual stream, which all layers share"
        )
    return None


def foldable(config: ModelSpec, group: Group) -> bool:
    """Whether scales of a group's inputs fold; `obstacle` says why not."""
    return obstacle(config, group) is None


def shared_scales(
    weights: Mapping[str, torch.Tensor], config: ModelSpec, group: Group, scales: torch.Tensor
) -> torch.Tensor:
    """The scales [cols] that `fold` uses: for `o` equal over the query heads that share a KV head.

    Their geometric mean: a channel of one value head is read by several query heads, and only one scale of
    it folds into `v`. Other groups keep what they are given.
    """
    if group != "o":
        return scales
    grouped = scales.reshape(-1, _share(weights), config.head_dim)  # [K, H / K, D]
    return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)


def fold(
    weights: Mapping[str, torch.Tensor], config: ModelSpec, group: Group, scales: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One layer with a group's inputs divided by `scales` and its matrices' columns multiplied by them.

    Args:
        weights: the layer by short name (compress/torch_layer.py), of any float type.
        config: the model's.
        group: whose inputs; it must be `foldable`.
        scales: [cols], positive; those of `o` go through `shared_scales` first.

    Returns:
        The layer anew, of the same types. Its output is the same up to rounding.
    """
    assert foldable(config, group), obstacle(config, group)
    assert bool(torch.isfinite(scales).all()) and bool((scales > 0).all()), group
    scales = shared_scales(weights, config, group, scales.float())
    new = dict(weights)
    for name in READERS[group]:
        new[name] = _times(weights[name], scales)
    if group in _NORMS:
        new[_NORMS[group]] = _times(weights[_NORMS[group]], 1 / scales)
        return new
    maker = _MAKERS[group]
    rows = scales if group == "down" else _of_kv_heads(scales, config.head_dim, _share(weights))
    new[maker] = _times(weights[maker], 1 / rows[:, None])
    if (bias := weights.get(f"{maker}.bias")) is not None:
        new[f"{maker}.bias"] = _times(bias, 1 / rows)
    return new


def _times(values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return (values.float() * factors.to(values.device)).to(values.dtype)


def _share(weights: Mapping[str, torch.Tensor]) -> int:
    """Query heads a KV head serves, by the matrices' own shapes: heads may have been pruned."""
    return weights["o"].shape[1] // weights["v"].shape[0]


def _of_kv_heads(scales: torch.Tensor, head_dim: int, share: int) -> torch.Tensor:
    """[H * D], equal over each KV head's query heads -> [K * D]."""
    return scales.reshape(-1, share, head_dim)[:, 0].reshape(-1)
