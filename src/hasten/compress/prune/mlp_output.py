"""A stream's two steps through a layer: to where `down` reads, and on through a `down` fitted anew."""

from __future__ import annotations

import torch

from hasten.compress.moments import Moments
from hasten.compress.stream import Found, Stream, stream_linear
from hasten.compress.torch_layer import Weights


def to_middle(stream: Stream, index: int, weights: Weights) -> torch.Tensor:
    """Moves a stream behind a layer's attention; what `down` would read there, [B, T, F] in its type.

    Costs 2 bytes F a token; nothing is computed twice.
    """
    inputs = torch.empty(*stream.x.shape[:2], weights["down"].shape[1], dtype=weights["down"].dtype)
    for rows in stream.batches():
        found: Found = {}
        stream.x[rows] = stream.through(index, weights, rows, found, silent=("down",))
        inputs[rows] = found["down"][0].to(inputs.dtype)
    return inputs


def from_middle(stream: Stream, weights: Weights, inputs: torch.Tensor) -> None:
    """Moves a stream from `to_middle` to the layer's end, through the `down` of `weights`."""
    config = stream.config
    for rows in stream.batches():
        y = stream_linear("down", inputs[rows], weights["down"], weights.get("down.bias"))
        if config.norm_placement != "pre":
            norm = weights["post_mlp_norm"]
            y = torch.nn.functional.rms_norm(y, norm.shape, norm, config.norm_eps)
        stream.x[rows] += y


def moments_of(original: Stream, inputs: torch.Tensor, wanted: torch.Tensor) -> Moments:
    """Moments of what `down` reads, [B, T, F], and what it should give, [B, T, E].

    The original stands behind the layer.
    """
    moments = Moments.zeros(inputs.shape[-1], wanted.shape[-1])
    state = original.x if original.config.norm_placement == "pre" else wanted
    for rows in original.batches():
        moments.add(inputs[rows], wanted[rows], state[rows])
    return moments


def wanted_output(original: Stream, ours: Stream, index: int, weights: Weights) -> torch.Tensor:
    """What `down` should add to our stream, which is in the middle of the layer: float32 [B, T, E].

    Moves the original one layer on. Its hidden state there is the aim; where a norm stands between `down` and
    the hidden state, what its own `down` gives.
    """
    if original.config.norm_placement == "pre":
        original.advance(index, weights)
        return original.x - ours.x - weights.get("down.bias", torch.zeros(()))
    theirs = to_middle(original, index, weights)
    wanted = torch.empty_like(original.x)
    for rows in original.batches():
        wanted[rows] = stream_linear("down", theirs[rows], weights["down"], None)
    from_middle(original, weights, theirs)
    return wanted
