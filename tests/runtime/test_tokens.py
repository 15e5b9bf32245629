"""Token ids: one conversion for all ways in, and a UsageError for what is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import UsageError
from hasten.runtime.executor import token_ids

GOOD: list[Any] = [
    [],
    [0, 5, 9],
    (3,),
    range(4),
    [np.int64(2), 3],
    np.array([1, 2], np.uint64),
    np.array([], np.int8),
    np.arange(10, dtype=np.int32)[::3],
]
NONE: list[Any] = [
    [1.5], [1.0], ["a"], "abc", "5", [True], [False, 1], [None], None, 5, [[1]], {1: 2}.items(),
    [float("nan")], [np.float32(1)], [np.bool_(True)], np.array([1.0]), np.array([True]), np.array([[1]]),
    np.array(1),
]  # fmt: skip
OUTSIDE: list[Any] = [
    [-1], [10], [2**31 - 1], [2**31], [2**40], [2**64], [-(2**70)], [3, 10, -1], np.array([2**63], np.uint64),
    np.array([-1], np.int32), np.array([1 << 40]),
]  # fmt: skip


@pytest.mark.parametrize("ids", GOOD, ids=repr)
def test_ids_become_int32(ids: Any) -> None:
    found = token_ids(ids, 10)
    assert found.dtype == np.int32 and found.tolist() == [int(one) for one in ids]


@pytest.mark.parametrize("ids", NONE, ids=repr)
def test_what_is_no_id(ids: Any) -> None:
    with pytest.raises(UsageError, match="whole numbers") as refused:
        token_ids(ids, 10)
    assert refused.value.hint


@pytest.mark.parametrize("ids", OUTSIDE, ids=repr)
def test_ids_outside_the_vocabulary(ids: Any) -> None:
    with pytest.raises(UsageError, match="not in the vocabulary of 10"):
        token_ids(ids, 10)


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    return hasten.load(tiny_folder("qwen3"), "bf16", threads=1, context=64)


def through_an_engine(model: LanguageModel, ids: Any) -> None:
    with model.engine() as engine:
        list(engine.stream(Request(ids, max_new_tokens=1)))


def through_a_run(model: LanguageModel, ids: Any) -> None:
    with model.engine() as engine:
        list(engine.run([Request(ids, max_new_tokens=1)]))


WAYS: dict[str, Callable[[LanguageModel, Any], Any]] = {
    "stream": lambda model, ids: list(model.stream(ids, 1)),
    "run": through_a_run,
    "hidden": lambda model, ids: model.hidden(ids),
    "logits": lambda model, ids: model.logits(ids),
    "engine": lambda model, ids: through_an_engine(model, ids),
}


@pytest.mark.parametrize("ids", [[1.5], ["a"], [True], [None], [-1], [1 << 20], [2**31], [2**40]], ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in(model: LanguageModel, way: str, ids: Any) -> None:
    with pytest.raises(UsageError, match="token id"):
        WAYS[way](model, ids)
    assert len(model.hidden([5, 6])) == 2  # and the model still runs
    assert model.executor.pool.free == model.executor.pool.pages
