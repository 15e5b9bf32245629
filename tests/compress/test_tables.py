"""A method and a kind of pruning are one file and one line each: everything else asks the table."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.compress.compress import compress
from hasten.compress.job import Means, needs_text, work_bytes
from hasten.compress.recipe_file import parse_recipe, write_recipe
from hasten.core import Format, Recipe
from hasten.errors import UsageError
from hasten.models.artifact import load_artifact
from hasten.models.open import open_model
from hasten.recipe import METHODS, PRUNINGS, MethodEntry, PruneEntry, Pruning
from hasten.weights.packed import integers
from test_compress_page import methods, prunings

COARSE = """
from dataclasses import replace

from hasten.compress.quantise.gptq import nearest
from hasten.compress.quantise import Method, Rounded


class Coarse(Method):
    def layer(self, layer):
        assert layer.grams["down"].shape[0] == layer.weights["down"].shape[1]
        start = {name: nearest(layer.weights[name], layout, name) for name, layout in layer.layouts.items()}
        found = {name: replace(one, codes=one.codes & 254) for name, one in start.items()}
        return Rounded(found, layer.weights)
"""
FIRST = """
from hasten.compress.prune.layers import with_channels
from hasten.compress.prune import PartPruned, Pruner, kept_multiple
from hasten.compress.torch_model import changed
from hasten.compress.torch_model import layer_weights


class First(Pruner):
    unit = "channels"

    def after(self, config, pruning):
        count = kept_multiple(pruning, "channel", config.blocks[0].feed_forward.width)
        return with_channels(config, count)

    def run(self, source, pruning, text, step):
        config, values, parts = self.after(source.config, pruning), {}, []
        count = config.blocks[0].feed_forward.width
        for index in range(len(config.blocks)):
            weights = layer_weights(source, index)
            for name in ("gate", "up"):
                values[f"layers.{index}.{name}"] = weights[name][:count]
            values[f"layers.{index}.down"] = weights["down"][:, :count]
            parts.append(PartPruned(f"layers.{index}", count, source.config.blocks[0].feed_forward.width))
        return changed(source, values, config=config), parts
"""
COARSE_LINE = MethodEntry("coarse_method:Coarse", "every second level", reads="moments", head_bits=8)
FIRST_LINE = PruneEntry("first_channels:First", "all but the first channels", "channels")


@pytest.fixture(autouse=True)
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "coarse_method.py").write_text(COARSE)
    (tmp_path / "first_channels.py").write_text(FIRST)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "coarse", COARSE_LINE)
    monkeypatch.setitem(PRUNINGS, "first", FIRST_LINE)
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))


def test_they_run_on_a_model(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, out = tiny_folder("llama"), tmp_path / "out.hasten"
    width = open_model(folder).config.blocks[0].feed_forward.width
    recipe = parse_recipe("{default: w4, head: w8, method: coarse, prune: [{kind: first, amount: 0.34}]}")
    made = compress(folder, recipe, out=out, tokens=1024, means=Means(threads=1))
    assert made.source.config.blocks[0].feed_forward.width == width - 32
    assert made.calibration is not None and made.calibration["tokens"] == 1024
    for name, one in made.packed.linears.items():
        if name.startswith("layers."):
            assert not (integers(one).codes & 1).any() and one.layout == Format.of(4), name
    pruned, rounded = made.steps
    assert pruned.name == "prune first" and "channels kept" in pruned.lines[0]
    assert "faster here: a smaller dense model" in pruned.lines[2]
    assert rounded.lines[0].startswith("integers found by coarse")
    kept = load_artifact(out)
    asked = parse_recipe(kept.plan["compress"]["recipe"])
    assert asked.method == "coarse" and asked.prune == (Pruning("first", 0.34),)
    names = made.packed.linears
    assert all(np.array_equal(one.data, kept.packed.linears[name].data) for name, one in names.items())


def test_names_files_and_checks_know_them(tiny_folder: Callable[..., Path]) -> None:
    recipe = Recipe.parse("w4-coarse-g64")
    assert recipe.method == "coarse" and recipe.head == Format.of(8, 64)
    assert Recipe.parse("w4-coarse-head4").head == Format.of(4)
    assert needs_text(recipe) and needs_text(Recipe("r", prune=(Pruning("first", repair=False),)))
    source = open_model(tiny_folder("llama"))
    reads_none = Recipe("r", recipe.default, recipe.head, method="hqq")
    assert work_bytes(source, recipe, 1024, 0) > work_bytes(source, reads_none, 1024, 0)
    both = Recipe("r", Format.of(4), method="coarse", prune=(Pruning("first"),))
    assert parse_recipe(write_recipe(both)) == both
    with pytest.raises(UsageError, match="method cannot be 'corse'") as error:
        parse_recipe("method: corse")
    assert "did you mean coarse" in str(error.value.hint)
    with pytest.raises(UsageError, match="takes whole parts out"):
        Pruning("first", pattern=(2, 4))
    with pytest.raises(UsageError, match="cannot read 'cours'") as error:
        Recipe.parse("w4-cours")
    assert "-coarse" in str(error.value.hint)


def test_two_methods_in_a_name_are_refused_unless_they_are_one() -> None:
    for name in ("w4-coarse-gptq", "w4-hqq-awq", "w4-best-gptq"):
        with pytest.raises(UsageError, match="cannot read"):
            Recipe.parse(name)
    for name, same in (
        ("w4-gptq-gptq", "gptq, gptq"),
        ("w4-g64-gptq-g128", "g64, g128"),
        ("w4-head8-kv8-head4", "head8, head4"),
        ("w4-asym-asym", "asym, asym"),
        ("mxfp4-kv8-kv8", "kv8, kv8"),
    ):
        with pytest.raises(UsageError, match=f"says one thing twice: {same}"):
            Recipe.parse(name)
    assert Recipe.parse("w4-gptq-awq").method == Recipe.parse("w4-awq-gptq").method == "awq-gptq"


def test_the_page_has_a_row_for_each() -> None:
    assert "| `coarse` | every second level | yes |" in methods(METHODS)
    assert "| `first` | all but the first channels | yes |" in prunings(PRUNINGS)


@pytest.mark.parametrize("verb", ["compress", "generate"])
def test_the_help_of_commands_names_it(verb: str) -> None:
    script = (
        "from hasten.recipe import METHODS, MethodEntry; METHODS['coarse'] = MethodEntry('x:Y', 'z'); "
        f"from hasten.cli import main; main([{verb!r}, '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "-coarse" in re.sub(r"[\s│]+", "", done.stdout), done.stdout + done.stderr
