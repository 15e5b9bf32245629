"""The sharding plan: every family, numbers of ranks that divide heads and those that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from executor_models import LLAMA, MODELS

from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.runtime.gpu.ranks import Shard, shards
from specs import changed

Floats = np.ndarray


def weights(spec: ModelSpec) -> dict[str, Floats]:
    generator = np.random.default_rng(3)
    return {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in spec.parameter_shapes().items()
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].blocks[0].mixer.heads % 2 == 0])
def test_shares_of_every_family_fit_the_share_as_a_model(name: str, ranks: int) -> None:
    spec = MODELS[name]
    whole = weights(spec)
    for shard in shards(spec, ranks):
        for own, shape in shard.local.parameter_shapes().items():
            piece = shard.piece(own)
            assert piece is not None
            wanted = (len(shard.vocabulary), *shape[1:]) if own == "head" else shape
            assert piece.of(whole[shard.source(own)], np.concatenate).shape == wanted


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "phi3", "olmo2", "smollm3", "mistral", "gemma3"])
def test_rows_and_columns_come_once_and_sums_of_products_are_the_whole(name: str) -> None:
    spec = MODELS[name]
    whole, x = weights(spec), np.random.default_rng(4).standard_normal(spec.width).astype(np.float32)
    found = []
    for shard in shards(spec, 2):

        def part(own: str, shard: Shard = shard) -> Floats:
            piece = shard.piece(own)
            assert piece is not None
            return np.asarray(piece.of(whole[own], np.concatenate))

        inner = np.maximum(part("layers.0.gate") @ x, 0) * (part("layers.0.up") @ x)
        found.append(part("layers.0.down") @ inner)
    inner = np.maximum(whole["layers.0.gate"] @ x, 0) * (whole["layers.0.up"] @ x)
    np.testing.assert_allclose(sum(found), whole["layers.0.down"] @ inner, rtol=1e-3, atol=1e-2)
    heads = [head for shard in shards(spec, 2) for head in shard.heads]
    assert heads == list(range(spec.blocks[0].mixer.heads))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "wanted"),
    [
        (32, 8, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (16, 2, 4, [(0,), (0,), (1,), (1,)]),
        (8, 1, 2, [(0,), (0,)]),
        (12, 3, 2, [(0, 0, 1), (1, 2, 2)]),  # a group is cut: groups of two
        (6, 6, 3, [(0, 1), (2, 3), (4, 5)]),
    ],
)
def test_every_query_head_has_its_own_kv_head(
    heads: int, kv_heads: int, ranks: int, wanted: list[tuple[int, ...]]
) -> None:
    spec = changed(LLAMA, num_heads=heads, num_kv_heads=kv_heads)
    found = shards(spec, ranks)
    assert [shard.kv_heads for shard in found] == wanted
    for shard in found:
        mixer, group = shard.local.blocks[0].mixer, heads // kv_heads
        own = mixer.heads // mixer.kv_heads
        for i, head in enumerate(shard.heads):
            assert shard.kv_heads[i // own] == head // group


def test_biases_of_sums_are_added_once() -> None:
    spec = changed(LLAMA, biases=("q", "o", "down"))
    first, second = shards(spec, 2)
    assert first.piece("layers.0.o.bias") is not None and second.piece("layers.0.o.bias") is None
    assert second.local.blocks[0].biases == ("q",)


def test_a_head_that_does_not_divide_is_copied() -> None:
    assert [len(shard.vocabulary) for shard in shards(replace(LLAMA, vocab=263), 2)] == [263, 263]
    assert [len(shard.vocabulary) for shard in shards(replace(LLAMA, vocab=262), 2)] == [131, 131]


def test_a_number_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError) as refused:
        shards(LLAMA, 3)
    assert "4 query heads" in refused.value.message and "2, 4" in (refused.value.hint or "")


def test_the_share_of_one_rank_is_the_model() -> None:
    spec = LLAMA
    (shard,) = shards(spec, 1)
    whole = weights(spec)
    assert shard.local.linear_shapes() == spec.linear_shapes()
    assert all(
        np.array_equal(shard.piece(name).of(whole[name], np.concatenate), whole[name])  # type: ignore[union-attr]
        for name in spec.parameter_shapes()
    )
