"""docs/compress.md: its tables come from the program, its recipes can be read, its commands run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import pytest

from hasten.cli import main
from hasten.compress.job import checked
from hasten.compress.recipe_file import parse_recipe
from hasten.core import Recipe
from hasten.models.open import open_model
from hasten.recipe import METHODS, PRUNINGS, Distillation, DistilLoss, MethodEntry, PruneEntry, Pruning

PAGE = Path(__file__).parents[1] / "docs" / "compress.md"
TEXT = PAGE.read_text(encoding="utf-8")
RECIPES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = re.findall(r"^    (hasten compress .*?)(?:  +.*)?$", TEXT, re.MULTILINE)


def table(noun: type) -> str:
    """The fields of a dataclass as Markdown."""
    rows = ["| key | meaning | default |", "| --- | --- | --- |"]
    for item in dataclasses.fields(noun):
        default = item.default
        said = "required" if default is dataclasses.MISSING else _shown(default)
        rows.append(f"| `{item.name}` | {item.metadata['help']} | {said} |")
    return "\n".join(rows)


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@pytest.mark.parametrize("noun", [Pruning, Distillation])
def test_tables_are_those_of_the_program(noun: type) -> None:
    mark = f"<!-- table: {noun.__name__} -->\n"
    assert mark + table(noun) in TEXT, f"put this below {mark}\n{table(noun)}"


def methods(table: Mapping[str, MethodEntry]) -> str:
    """The methods as Markdown."""
    rows = ["| `method` | how integers are found | text |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {one.help} | {'yes' if one.reads else 'no'} |" for name, one in table.items()]
    return "\n".join(rows)


def prunings(table: Mapping[str, PruneEntry]) -> str:
    """What can be pruned as Markdown."""
    rows = ["| kind | removes | faster here |", "| --- | --- | --- |"]
    rows += [
        f"| `{n}` | {one.help} | {'no' if one.takes == 'weights' else 'yes'} |" for n, one in table.items()
    ]
    return "\n".join(rows)


def test_methods_and_prunings_are_those_of_the_program() -> None:
    for text in (methods(METHODS), prunings(PRUNINGS)):
        assert text + "\n\n" in TEXT, f"put this table into docs/compress.md:\n{text}"


def test_every_key_is_described() -> None:
    rows = {match[1] for match in re.finditer(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE)}
    assert rows >= {item.name for item in dataclasses.fields(Recipe)}
    assert all(loss in TEXT for loss in get_args(DistilLoss))


def test_recipes_can_be_read(tiny_folder: Callable[..., Path]) -> None:
    assert RECIPES
    config = open_model(tiny_folder("llama-wide")).config
    for text in RECIPES:
        recipe = checked(parse_recipe(text), config)
        assert recipe.prune and recipe.distil and recipe.layers and recipe.head != recipe.default


def test_names_of_recipes_can_be_read() -> None:
    names = re.findall(r"(?<!\S)--recipe (w[\w-]+)", TEXT)
    assert "w4-best" in names
    for name in names:
        Recipe.parse(name)
    for part in re.findall(
        r"`(-\w[\w-]*)`", TEXT[TEXT.index("## Recipe names") : TEXT.index("## Recipe files")]
    ):
        Recipe.parse("w4" + part)


@pytest.mark.demo
@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes each: the real model, calibrated."""
    from hasten.quality.text import default_text

    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("{default: w4, head: w8, method: awq, layers: {layers.*.down: w6}}")
    Path("notes.txt").write_text(default_text().calibration, encoding="utf-8")
    assert len(COMMANDS) >= 3
    for command in COMMANDS:
        assert main(command.split()[1:]) == 0, command
