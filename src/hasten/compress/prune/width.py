"""Width: the same hidden dimensions go everywhere, from the embedding through every layer to the head.

Importance of a dimension: mean absolute value behind the norms, summed over all of them (Muralidharan et al.
2024, Minitron). Repair: every matrix is fitted in turn, on what the narrow model gives it, towards what the
original gives there; behind the last layer the head is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from hasten.compress.calibration import Calibration
from hasten.compress.prune import Observer, PartPruned, Parts, Pruner, kept_multiple
from hasten.compress.stream import Found, Moments, Stream, fitted, refit, stream_weights
from hasten.compress.torch_model import LINEARS, Values, Weights, changed, tensor_values
from hasten.core import READERS, ModelSpec
from hasten.models.source import Source
from hasten.recipe import Pruning

_TURNS = tuple(READERS.values())
"""Matrices in the order they are fitted; those of one turn read the same."""
_WRITERS = ("o", "down")  # their rows are hidden dimensions; the others' columns are


class Width(Pruner):
    """`width`: take hidden dimensions out of the whole model.

    A tied head is not fitted: it is the embedding.
    """

    unit = "hidden dimensions"

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        return replace(config, width=kept_multiple(pruning, "hidden dimension", config.width))

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        assert text is not None
        config, layers = self.after(source.config, pruning), len(source.config.blocks)
        total = 2 * layers
        importance = dimension_importance(source, text, lambda done: step(done, total))
        narrow = _Narrow(
            source,
            config,
            importance.topk(config.width).indices.sort().values,
            Stream.of(source, text),
        )
        parts = []
        for index in range(layers):
            step(layers + index, total)
            parts.append(narrow.layer(index, pruning.repair))
        narrow.ends(pruning.repair)
        step(total, total)
        return changed(source, narrow.values, config=narrow.config), parts

    def notes(self, config: ModelSpec, pruning: Pruning) -> tuple[str, ...]:
        is_tied = pruning.repair and config.head.tied
        return ("the head is not repaired: it is tied to the embedding",) if is_tied else ()


def dimension_importance(
    source: Source, calibration: Calibration, step: Callable[[int], None]
) -> torch.Tensor:
    """Mean absolute value of every hidden dimension where a layer reads it, summed over layers, [E]."""
    stream = Stream.of(source, calibration)
    found = torch.zeros(source.config.width)
    for index in range(len(source.config.blocks)):
        step(index)
        weights = stream_weights(source, index)
        for rows in stream.batches():
            read: Found = {}
            stream.x[rows] = stream.through(index, weights, rows, read)
            for name in ("q", "gate"):
                found += read[name][0].abs().flatten(0, -2).sum(0)
    norm = tensor_values(source.tensors["final_norm"])
    found += F.rms_norm(stream.x, norm.shape, norm, source.config.final_norm.eps).abs().flatten(0, -2).sum(0)
    return found / calibration.tokens


@dataclass
class _Narrow:
    """The narrow model as it is made, beside the original: `original` and `ours` stand before a layer."""

    source: Source
    config: ModelSpec
    kept: torch.Tensor  # int64 [E'], ascending
    original: Stream

    def __post_init__(self) -> None:
        self.ours = self.original.copy()
        self.ours.x = self.ours.x[..., self.kept].clone()
        self.values: dict[str, Values] = {}

    def layer(self, index: int, repair: bool) -> PartPruned:
        """Make one layer; both streams move behind it."""
        theirs = stream_weights(self.source, index)
        ours = {name: self._cut(name, value) for name, value in theirs.items()}
        errors: list[float | None] = [None, None]
        for turn, names in enumerate(_TURNS if repair else ()):
            moments = self._moments(index, theirs, ours, turn)
            prior = torch.cat([ours[name].float() for name in names])
            fit, *errors = refit(moments, prior, repair=True)  # errors of `down` remain
            for name, part in zip(names, torch.split(fit, [len(ours[n]) for n in names]), strict=True):
                ours[name] = part.to(ours[name].dtype)
        self.original.advance(index, theirs)
        self.ours.advance(index, ours)
        for name, value in ours.items():
            self.values[f"layers.{index}.{name}"] = value.bfloat16() if value.ndim == 2 else value
        return PartPruned(f"layers.{index}", self.config.width, self.source.config.width, *errors)

    def ends(self, repair: bool) -> None:
        """Embedding, last norm and head; they are made when they are read, in float32."""
        tensors, kept = self.source.tensors, self.kept
        norm = tensor_values(tensors["final_norm"])
        self.values["final_norm"] = norm[kept]
        self.values["embed"] = lambda: tensor_values(tensors["embed"])[:, kept]
        if self.config.head.tied:
            return
        back = torch.eye(len(norm))[:, kept]  # [E, E']: what the narrow state says of the whole one
        if repair:
            moments = Moments.zeros(len(kept), len(norm))
            for rows in self.ours.batches():
                whole = F.rms_norm(self.original.x[rows], norm.shape, norm, self.config.final_norm.eps)
                part = F.rms_norm(self.ours.x[rows], kept.shape, norm[kept], self.config.final_norm.eps)
                moments.add(part, whole)
            back = fitted(moments, back)
        self.values["head"] = lambda: tensor_values(tensors["head"]) @ back

    def _cut(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A parameter without what belongs to the dimensions that go."""
        if name in LINEARS and name not in _WRITERS:
            return value[:, self.kept]
        is_hidden = name in _WRITERS or (name.endswith("norm") and name not in ("q_norm", "k_norm"))
        is_hidden = is_hidden or name in ("o.bias", "down.bias")
        return value[self.kept] if is_hidden else value

    def _moments(self, index: int, theirs: Weights, ours: Weights, turn: int) -> Moments:
        """Of what the matrices of a turn read in our model, and what the original's give."""
        names = _TURNS[turn]
        later = tuple(name for after in _TURNS[turn + 1 :] for name in after)
        rows_out = sum(len(ours[name]) for name in names)
        moments = Moments.zeros(ours[names[0]].shape[1], rows_out)
        for rows in self.original.batches():
            read: Found = {}
            found: Found = {}
            after = self.original.through(index, theirs, rows, read, silent=later)
            mine = self.ours.through(index, ours, rows, found, silent=(*names, *later))
            wanted = torch.cat([read[name][1] for name in names], dim=-1)
            state = None
            if names[0] in _WRITERS:
                wanted = state = wanted[..., self.kept]
                if self.config.blocks[0].norms.placement == "pre":  # towards the hidden state itself
                    bias = ours.get(f"{names[0]}.bias", torch.zeros(()))
                    state = after[..., self.kept]
                    wanted = state - mine - bias
            moments.add(found[names[0]][0], wanted, state)
        return moments
