"""Single weights out of every matrix of every layer, by magnitude, wanda or sparsegpt.

The embedding and the head stay: a zero there takes a word's own meaning away (all three papers leave them).
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from hasten.compress.calibration import Calibration
from hasten.compress.prune import Observer, PartPruned, Parts, Pruner
from hasten.compress.stream import Found, Stream, gram_error, stream_weights, symmetric_add
from hasten.compress.torch_model import LINEARS, Weights, changed, layer_weights
from hasten.core import READERS, ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import PRUNINGS, Pruning


def keep_mask(importance: torch.Tensor, pruning: Pruning, per_row: bool) -> torch.Tensor:
    """The most important weights, bool [rows, cols].

    Args:
        pruning: N of every M neighbours in a row stay, or all but the amount.
        per_row: the amount goes in every row (wanda), not in the matrix as a whole.
    """
    if pruning.pattern is not None:
        stay, of = pruning.pattern
        groups = importance.view(len(importance), -1, of)
        best = groups.topk(stay, dim=-1).indices
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view(importance.shape)
    flat = importance if per_row else importance.reshape(1, -1)
    gone = round(pruning.amount * flat.shape[1])
    worst = flat.topk(gone, dim=-1, largest=False).indices
    return torch.ones_like(flat, dtype=torch.bool).scatter_(-1, worst, False).view(importance.shape)


BLOCK = 128
"""Columns whose mask is chosen at once; the paper's."""
DAMPING = 0.01
"""Part of the mean second moment added to all: the paper's."""


def sparsegpt(
    weight: torch.Tensor, gram: torch.Tensor, pruning: Pruning, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights with zeros, float32 [rows, cols], nearest in output to those given (Frantar and Alistarh 2023).

    Column by column from the left: what a zero changes in the output is made good by the columns to its
    right, as the inverse Hessian says, through its Cholesky factor.

    Args:
        weight: [rows, cols].
        gram: [cols, cols], sum of x x^T over the calibration text.
        pruning: the amount or pattern, where no mask is given.
        mask: bool [rows, cols], weights that stay; None chooses them block by block, by w^2 / [H^-1]_jj.
    """
    weight = weight.clone()
    factor = _inverse_factor(gram, weight)
    width = _block(pruning)
    for at in range(0, weight.shape[1], width):
        end = min(at + width, weight.shape[1])
        block, own = weight[:, at:end], factor[at:end, at:end]
        every = end - at if pruning.pattern is None else pruning.pattern[1]
        stays = torch.zeros_like(block, dtype=torch.bool) if mask is None else mask[:, at:end]
        losses = torch.zeros_like(block)
        for column in range(end - at):
            if mask is None and column % every == 0:  # the next columns, as they are by now
                ahead = slice(column, column + every)
                saved = block[:, ahead].square() / own.diagonal()[ahead].square()
                stays[:, ahead] = keep_mask(saved, pruning, per_row=False)
            lost = block[:, column].masked_fill(stays[:, column], 0.0) / own[column, column]
            block[:, column:] -= lost[:, None] * own[column, column:]
            block[:, column].masked_fill_(~stays[:, column], 0.0)
            losses[:, column] = lost
        weight[:, end:] -= losses @ factor[at:end, end:]
    return weight


def _block(pruning: Pruning) -> int:
    if pruning.pattern is None:
        return BLOCK
    of = pruning.pattern[1]
    return max(1, BLOCK // of) * of


def _inverse_factor(gram: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of damped moments; inputs that are always zero lose weights."""
    system = gram.clone()
    dead = system.diagonal() <= 0
    weight[:, dead] = 0.0
    system.diagonal()[dead] = 1.0
    system.diagonal().add_(DAMPING * float(system.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(system))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def check_pattern(config: ModelSpec, pruning: Pruning) -> None:
    """Whether N:M fits every matrix.

    Raises:
        UsageError: M does not divide the inputs of a matrix.
    """
    if pruning.pattern is None:
        return
    of = pruning.pattern[1]
    for name, (_, cols) in config.linear_shapes().items():
        if name.startswith("layers.") and cols % of:
            raise UsageError(
                f"prune {pruning.kind}: pattern {pruning.pattern[0]}:{of} does not divide the {cols} inputs "
                f"of {name}",
                hint="use pattern: 2:4"
                if cols % 4 == 0 and of != 4
                else "use an amount instead of a pattern",
            )


Chosen = tuple[torch.Tensor, torch.Tensor | None]
"""Weights that stay, bool [rows, cols]; repaired weights where choosing computes them anyway, else None."""


class SingleWeights(Pruner):
    """Layer after layer; each is judged on what the pruned ones before give it.

    Repair is sparsegpt's update over the mask that was chosen.
    """

    unit = "weights"
    because = (
        "zeros are stored, read and multiplied like other weights: the engine's layouts are dense, and "
        "processors have no instruction for N:M"
    )

    @abstractmethod
    def chosen(self, weight: torch.Tensor, gram: torch.Tensor | None, pruning: Pruning) -> Chosen:
        """Which weights of a matrix stay.

        Args:
            weight: float32 [rows, cols].
            gram: [cols, cols], sum of x x^T of what it reads; None where no text is read.
        """

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        check_pattern(config, pruning)
        return config

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        is_blind = text is None or (PRUNINGS[pruning.kind].blind and not pruning.repair)
        stream = None if text is None or is_blind else Stream.of(source, text)
        values: dict[str, torch.Tensor] = {}
        parts = []
        total = len(source.config.blocks)
        for index in range(total):
            step(index, total)
            weights = layer_weights(source, index)
            fast = {} if stream is None else stream_weights(source, index)
            grams = {} if stream is None else _grams(stream, index, fast)
            for group, names in READERS.items():
                for name in names:
                    full = f"layers.{index}.{name}"
                    values[full], errors = self._pruned(weights[name], grams.get(group), pruning)
                    kept, size = int(values[full].count_nonzero()), values[full].numel()
                    parts.append(PartPruned(full, kept, size, *errors))
            if stream is not None:
                new = {name: values[f"layers.{index}.{name}"].to(fast[name].dtype) for name in LINEARS}
                stream.advance(index, fast | new)
        step(total, total)
        return changed(source, values), parts

    def _pruned(
        self, weight: torch.Tensor, gram: torch.Tensor | None, pruning: Pruning
    ) -> tuple[torch.Tensor, tuple[float | None, float | None]]:
        """bfloat16 [rows, cols], and its error as cut and as repaired."""
        mask, fit = self.chosen(weight, gram, pruning)
        cut = (weight * mask).bfloat16()
        if gram is None:
            return cut, (None, None)
        before = gram_error(gram, weight, cut.float())
        if not pruning.repair:
            return cut, (before, None)
        fit = (sparsegpt(weight, gram, pruning, mask) if fit is None else fit).bfloat16()
        return fit, (before, gram_error(gram, weight, fit.float()))


class Magnitude(SingleWeights):
    """`magnitude`: by their size alone; no text is needed unless the rest is repaired."""

    def chosen(self, weight: torch.Tensor, gram: torch.Tensor | None, pruning: Pruning) -> Chosen:
        """See `SingleWeights`: the largest of the matrix, or of every M neighbours."""
        return keep_mask(weight.abs(), pruning, per_row=False), None


class Wanda(SingleWeights):
    """`wanda`: by size times what comes in (Sun et al. 2023)."""

    def chosen(self, weight: torch.Tensor, gram: torch.Tensor | None, pruning: Pruning) -> Chosen:
        """See `SingleWeights`: the largest |w| * |x|_2 of each output row."""
        assert gram is not None
        norms = gram.diagonal().clamp_min(0).sqrt()
        return keep_mask(weight.abs() * norms, pruning, per_row=True), None


class SparseGpt(SingleWeights):
    """`sparsegpt`: choosing and repairing are one; as cut is what its mask alone leaves."""

    always_fits = True

    def chosen(self, weight: torch.Tensor, gram: torch.Tensor | None, pruning: Pruning) -> Chosen:
        assert gram is not None
        fit = sparsegpt(weight, gram, pruning).bfloat16()
        return fit != 0, fit


def _grams(stream: Stream, index: int, weights: Weights) -> dict[str, torch.Tensor]:
    """Second moments of a layer's four inputs, the layer not pruned yet."""
    sizes = {group: weights[names[0]].shape[1] for group, names in READERS.items()}
    grams: dict[str, torch.Tensor] = {group: torch.zeros(size, size) for group, size in sizes.items()}
    for rows in stream.batches():
        found: Found = {}
        stream.through(index, weights, rows, found, silent=("down",))
        for group, names in READERS.items():
            symmetric_add(grams[group], found[names[0]][0])
    return grams
