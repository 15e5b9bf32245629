"""Heads out of every layer, whole KV groups or some of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hasten.compress.prune.layers import HeadPlan, Heads, kept_heads
from hasten.compress.stream import Moments, fitted
from hasten.compress.torch_model import changed, tensor_values
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.recipe import Pruning
from prune_models import distance, taken, text
from specs import changed as spec_changed

ALIKE = ["llama", "llama-wide", "phi3-sliding", "qwen2", "qwen3-yarn", "smollm3"]


@pytest.mark.parametrize("name", ALIKE)
def test_half_the_heads_go_and_repair_brings_the_rest_nearer(
    name: str, tiny_folder: Callable[..., Path]
) -> None:
    source = open_folder(tiny_folder(name))
    cut, _ = taken("heads", source, 0.5, text(), repair=False)
    repaired, parts = taken("heads", source, 0.5, text(), repair=True)
    assert repaired.config.blocks[0].mixer.heads == source.config.blocks[0].mixer.heads // 2
    assert all(part.error_after < part.error_before for part in parts)
    ids = text(1).ids[0]
    assert 0 < distance(repaired, source, ids) < distance(cut, source, ids)


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("amount", [0.5, 0.25])
def test_heads_that_add_nothing_go_without_a_trace(
    amount: float, repair: bool, tiny_folder: Callable[..., Path]
) -> None:
    """Silent heads: the first group in one layer, the second in another; or one head of each group."""
    source = open_folder(tiny_folder("llama"))
    config = source.config
    dim = config.blocks[0].mixer.head_dim
    silent = {0: (0, 1), 1: (2, 3), 2: (0, 1)} if amount == 0.5 else {0: (0, 2), 1: (1, 3), 2: (1, 2)}
    values = {}
    for layer, heads in silent.items():
        o = tensor_values(source.tensors[f"layers.{layer}.o"])
        for head in heads:
            o[:, head * dim : (head + 1) * dim] = 0.0
        values[f"layers.{layer}.o"] = o
    source = changed(source, values)
    if amount == 0.25:  # one head of each of the groups, which leaves one of two
        plan, amount = HeadPlan(2, 1), 0.5
    else:
        plan = HeadPlan(1, 2)
    pruned, _ = Heads(plan).run(
        source, Pruning("heads", amount, repair=repair), text(), lambda done, total: None
    )
    assert (pruned.config.blocks[0].mixer.heads, pruned.config.blocks[0].mixer.kv_heads) == (
        plan.groups * plan.share,
        plan.groups,
    )
    assert distance(pruned, source, text(1).ids[0]) < 0.02


def test_the_rows_of_keys_and_values_follow(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("qwen2"))  # with biases on q, k, v
    pruned, _ = taken("heads", source, 0.5, text(), repair=True)
    dim = source.config.blocks[0].mixer.head_dim
    kept = tensor_values(pruned.tensors["layers.1.k"])
    whole = tensor_values(source.tensors["layers.1.k"])
    group = next(g for g in range(2) if torch.equal(kept, whole[g * dim : (g + 1) * dim]))
    for name, size in (("q", 2 * dim), ("k", dim), ("v", dim)):
        at = slice(group * size, (group + 1) * size)
        for full in (f"layers.1.{name}", f"layers.1.{name}.bias"):
            assert torch.equal(
                tensor_values(pruned.tensors[full]), tensor_values(source.tensors[full])[at]
            ), full


def test_the_plan_is_the_nearest(tiny_folder: Callable[..., Path]) -> None:
    config = spec_changed(open_folder(tiny_folder("llama")).config, num_heads=14, num_kv_heads=2, head_dim=64)
    assert kept_heads(config, 0.25) == HeadPlan(2, 5)
    assert kept_heads(config, 0.5) == HeadPlan(1, 7)
    config = spec_changed(config, num_heads=32, num_kv_heads=8)
    assert kept_heads(config, 0.25) == HeadPlan(6, 4)


def test_too_little_too_much_and_joint_norms_are_refused(tiny_folder: Callable[..., Path]) -> None:
    config = open_folder(tiny_folder("llama")).config
    for amount in (0.01, 0.99):
        with pytest.raises(UsageError, match="leaves none or takes none out") as refused:
            kept_heads(config, amount)
        assert kept_heads(config, float(refused.value.hint.split()[-1].rstrip(",")))
    with pytest.raises(UsageError, match="norms all of a layer's queries together"):
        kept_heads(open_folder(tiny_folder("olmo2")).config, 0.5)


def test_a_token_with_a_huge_state_is_not_all_that_is_fitted() -> None:
    """Errors count relative to the hidden state: a token a thousand times as long weighs as any other."""
    random = torch.Generator().manual_seed(0)
    h, truth = torch.randn(200, 4, generator=random), torch.randn(3, 4, generator=random)
    y = h @ truth.T
    state = torch.randn(200, 8, generator=random)
    y[0], state[0] = 1000.0, 1000 * state[0]  # nothing that inputs like the others' explain
    plain, weighed = Moments.zeros(4, 3), Moments.zeros(4, 3)
    plain.add(h, y)
    weighed.add(h, y, state)
    wrong, right = (fitted(m, torch.zeros(3, 4), ridge=1e-6) for m in (plain, weighed))
    assert float((right - truth).norm()) < 0.05 * float((wrong - truth).norm())
    same = Moments.zeros(4, 3)
    same.add(h[:1] / 500, y[:1] / 500, state[:1] / 500)
    alone = Moments.zeros(4, 3)
    alone.add(h[:1], y[:1], state[:1])
    torch.testing.assert_close(same.gram, alone.gram)
