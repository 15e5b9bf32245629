"""What we export to Hugging Face's formats opens again, and means what it meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.core import Attention, Block, FeedForward, Norms, Recipe, RopeScaling, Rotary
from hasten.export import difference, export
from hasten.models.artifact import load_artifact
from hasten.models.open import open_model
from hasten.weights.packed import pack_model
from specs import spec
from tiny_artifacts import make, mixed, values_of


@pytest.mark.parametrize("to", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3"])
@pytest.mark.parametrize("recipe", [Recipe.parse("w4"), mixed()], ids=["w4", "mixture"])
def test_values_come_back(name: str, recipe: Recipe, to: str, tmp_path: Path) -> None:
    path = make(tmp_path, name, recipe)
    export(path, to, tmp_path / "out")
    again = pack_model(open_model(tmp_path / "out"), Recipe.parse("source"), 1)
    kept = 0
    for key, linear in load_artifact(path).packed.linears.items():
        before, after = values_of(linear), values_of(again.linears[key])
        if again.linears[key].layout.bits != 16:
            np.testing.assert_array_equal(after, before)
            kept += 1
        else:  # what the format carries as floats alone, rounded to them and to bf16
            np.testing.assert_allclose(after, before, rtol=2.0**-7, atol=1e-6)
    assert kept >= 7


def trees(value: Any) -> Iterator[tuple[str, Any, str]]:
    """(place, dataclass, field) of every field in a tree, the first block's alone."""
    for one in fields(value):
        inner = getattr(value, one.name)
        first = inner[0] if isinstance(inner, tuple) and inner and is_dataclass(inner[0]) else inner
        if is_dataclass(first):
            yield from ((f"{one.name}.{place}", *rest) for place, *rest in trees(first))
        else:
            yield one.name, value, one.name


def with_field(value: Any, place: str, change: Callable[[Any], Any]) -> Any:
    """The same tree with one field changed, in all blocks that hold the first one's object."""
    name, _, rest = place.partition(".")
    inner = getattr(value, name)
    if not rest:
        return replace(value, **{name: change(inner)})
    if isinstance(inner, tuple):
        return replace(value, **{name: (with_field(inner[0], rest, change), *inner[1:])})
    return replace(value, **{name: with_field(inner, rest, change)})


WORDS = {
    "causal": "full",
    "rms": "layer",
    "none": "head",
    "pre": "post",
    "silu": "gelu_tanh",
    "yarn": "linear",
}


def other(value: Any) -> Any:
    """Another value than this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 2
    if isinstance(value, str):
        return WORDS.get(value, "another")
    return 3.0 if value is None else ("another",)


MODEL = spec(
    "gemma3", 96, 64, 128, 2, 4, 2, 64, 16_384, sliding_window=8, sliding_layers=(True, False),
    rope_scaling=RopeScaling("yarn", 4.0, 4096, truncate=False),
)  # fmt: skip
SAID_ELSEWHERE = {"bos_token_id", "eos_token_ids"}  # by the tokenizer
FIGURES = ("low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor")


def test_no_field_of_the_tree_is_left_out_of_the_comparison() -> None:
    """Each field that is changed is found by its place; of a rotation, those that turn something."""
    assert difference(MODEL, MODEL) is None
    swapped = replace(MODEL, blocks=MODEL.blocks[::-1])  # the scaled rotation is the first block's
    seen = 0
    for place, _, name in trees(swapped):
        if name in SAID_ELSEWHERE or name in FIGURES:
            continue
        found = difference(swapped, with_field(swapped, place, other))
        assert found is not None, place
        assert found[0].startswith("blocks.0." if place.startswith("blocks.") else place), place
        seen += 1
    assert seen > 35


@pytest.mark.parametrize("kind", [Attention, FeedForward, Rotary, Norms, Block])
def test_a_field_that_is_added_later_is_compared_too(kind: type) -> None:
    later = make_dataclass("Later", [("novelty", int, field(default=0))], bases=(kind,), frozen=True)

    def grown(value: Any, novelty: int) -> Any:
        """The tree with every object of the kind exchanged for one of the later program."""
        if isinstance(value, tuple):
            return tuple(grown(one, novelty) for one in value)
        if not is_dataclass(value):
            return value
        inside = {one.name: grown(getattr(value, one.name), novelty) for one in fields(value)}
        return later(**inside, novelty=novelty) if type(value) is kind else type(value)(**inside)

    assert difference(grown(MODEL, 1), grown(MODEL, 1)) is None
    found = difference(grown(MODEL, 0), grown(MODEL, 1))
    assert found is not None and found[0].endswith("novelty") and found[1:] == (0, 1)
