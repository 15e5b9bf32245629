"""Zeros where the papers put them: magnitude, wanda and sparsegpt, by amount and by pattern."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hasten.compress.prune import pruner_of, silent
from hasten.compress.prune.single_weights import (
    DAMPING,
    Magnitude,
    Wanda,
    check_pattern,
    keep_mask,
    sparsegpt,
)
from hasten.compress.stream import gram_error
from hasten.compress.torch_model import LINEARS, tensor_values
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.recipe import Pruning
from prune_models import distance, taken, text

KINDS = ["magnitude", "wanda", "sparsegpt"]


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [12, 40] and the second moments of 300 correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 40, generator=generator)
    mixed = torch.randn(40, 40, generator=generator) * torch.linspace(0.1, 3.0, 40)
    x = torch.randn(300, 40, generator=generator) @ mixed
    return weight, x.T @ x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("repair", [False, True])
def test_the_zeros_are_as_many_as_asked_and_repair_helps(
    kind: str, pattern: tuple[int, int] | None, repair: bool, tiny_folder: Callable[..., Path]
) -> None:
    source = open_folder(tiny_folder("qwen2"))
    pruning = Pruning(kind, 0.5, pattern, repair)
    pruned, parts = pruner_of(kind).run(source, pruning, text(), silent)
    assert len(parts) == len(LINEARS) * len(source.config.blocks)
    for part in parts:
        values = tensor_values(pruned.tensors[part.name])
        zeros = int((values == 0).sum())
        assert abs(zeros - values.numel() // 2) <= values.shape[0] and part.kept == values.numel() - zeros
        if pattern is not None:
            stays = (values.view(len(values), -1, pattern[1]) != 0).sum(-1)
            assert stays.max() <= pattern[0]
        assert (part.error_after is not None) == repair
        assert not repair or part.error_after < part.error_before
    if repair:
        cut, _ = pruner_of(kind).run(source, Pruning(kind, 0.5, pattern, False), text(), silent)
        ids = text(1).ids[0]
        assert distance(pruned, source, ids) < distance(cut, source, ids)


def test_masks_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0], [10.0, 20.0, -30.0, 40.0]])
    half = Pruning("magnitude", 0.5)
    whole, _ = Magnitude().chosen(weight, None, half)
    assert whole.tolist() == [[False] * 4, [True] * 4]  # the matrix as a whole
    by_pairs, _ = Magnitude().chosen(weight, None, Pruning("magnitude", 0.5, (1, 2)))
    assert by_pairs.tolist() == [[False, True, True, False], [False, True, False, True]]
    gram = torch.diag(torch.tensor([100.0, 1.0, 1.0, 9.0]))
    found = Wanda().chosen(weight, gram, Pruning("wanda", 0.5))[0]  # |w| * |x|: 10 4 3 6 and 100 20 30 120
    assert found.tolist() == [[True, False, False, True], [True, False, False, True]]


def test_ties_still_lose_the_exact_number() -> None:
    mask = keep_mask(torch.ones(3, 8), Pruning("wanda", 0.25), per_row=True)
    assert mask.sum(1).tolist() == [6, 6, 6]


def test_the_update_over_a_given_mask_is_exact_least_squares_for_one_column() -> None:
    """Only the first column goes: all others are free to move, as in a refit without it."""
    weight, gram = sample()
    mask = torch.ones(12, 40, dtype=torch.bool)
    mask[:, 0] = False
    found = sparsegpt(weight, gram, Pruning("wanda", 0.5), mask)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(40)
    rest = torch.linalg.solve(damped[1:, 1:], (weight @ damped)[:, 1:], left=False)
    torch.testing.assert_close(found[:, 1:], rest, rtol=1e-3, atol=1e-4)
    assert (found[:, 0] == 0).all()


@pytest.mark.parametrize("columns", [40, 300])
def test_blocks_change_nothing_for_a_given_mask(columns: int) -> None:
    """The plain twin: one column after another over the whole matrix."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, columns, generator=generator)
    x = torch.randn(900, columns, generator=generator)
    gram = x.T @ x
    mask = torch.rand(4, columns, generator=generator) > 0.5
    found = sparsegpt(weight, gram, Pruning("wanda", 0.5), mask)
    inverse = torch.linalg.inv(gram + DAMPING * gram.diagonal().mean() * torch.eye(columns))
    factor = torch.linalg.cholesky(inverse, upper=True)
    plain = weight.clone()
    for j in range(columns):
        lost = torch.where(mask[:, j], 0.0, plain[:, j]) / factor[j, j]
        plain -= lost[:, None] * torch.where(torch.arange(columns) >= j, factor[j], 0.0)
    torch.testing.assert_close(found, plain * mask, rtol=2e-3, atol=2e-4)


def test_each_method_beats_the_one_before() -> None:
    weight, gram = sample()
    half = Pruning("wanda", 0.5)
    size = gram_error(gram, weight, weight * Magnitude().chosen(weight, None, half)[0])
    known = gram_error(gram, weight, weight * Wanda().chosen(weight, gram, half)[0])
    chosen = gram_error(gram, weight, sparsegpt(weight, gram, half))
    assert chosen < known < size


def test_inputs_that_are_always_zero_lose_their_weights() -> None:
    weight, gram = sample()
    gram[7] = gram[:, 7] = 0.0
    found = sparsegpt(weight, gram, Pruning("sparsegpt", 0.25))
    assert torch.isfinite(found).all()
    assert (found[:, 7] == 0).all()


def test_a_pattern_that_does_not_divide_is_refused(tiny_folder: Callable[..., Path]) -> None:
    config = open_folder(tiny_folder("llama-odd")).config  # 66 inputs
    with pytest.raises(UsageError, match=r"2:4 does not divide the 66 inputs of layers\.0\.q") as refused:
        check_pattern(config, Pruning("wanda", 0.5, (2, 4)))
    assert refused.value.hint == "use an amount instead of a pattern"
    check_pattern(config, Pruning("wanda", 0.5, (1, 2)))


def test_magnitude_alone_needs_no_text(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("llama"))
    pruned, parts = taken("magnitude", source, 0.5, None, repair=False)
    kept = tensor_values(pruned.tensors["layers.0.up"])
    whole = tensor_values(source.tensors["layers.0.up"])
    assert torch.equal(kept[kept != 0], whole[kept != 0])
    assert all(part.error_before is None for part in parts)
