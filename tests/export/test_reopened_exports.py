"""What we export to Hugging Face's formats opens again, and means what it meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hasten.core import Recipe
from hasten.export import export
from hasten.models import open_model
from hasten.models.artifact import load_artifact
from hasten.weights.packed import pack_model
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
