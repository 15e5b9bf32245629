"""The public names: few, documented, lazy."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hasten

ROOT = Path(__file__).parents[1]


def test_at_most_twelve_names() -> None:
    assert len(hasten.__all__) <= 12
    assert set(hasten.__all__) == set(hasten._HOME)
    assert set(hasten.__all__) <= set(dir(hasten))


@pytest.mark.parametrize("name", hasten.__all__)
def test_every_name_is_there_and_documented(name: str) -> None:
    value = getattr(hasten, name)
    doc = inspect.getdoc(value)
    assert doc, f"hasten.{name} has no docstring"
    assert len(doc) > 20


@pytest.mark.parametrize("name", ["load", "optimize", "probe"])
def test_functions_document_arguments_and_errors(name: str) -> None:
    function = getattr(import_module(hasten._HOME[name]), name)
    doc = inspect.getdoc(function) or ""
    if len(inspect.signature(function).parameters) > 1:
        assert "Args:" in doc, name
    assert all(
        p.annotation is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values()
    )


def test_every_dependency_is_imported() -> None:
    """What nothing imports is not installed for everybody."""
    declared = re.search(r"(?ms)^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text())
    assert declared is not None
    names = set(re.findall(r'(?m)^    "([\w-]+)', declared[1]))
    files = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    imported = set(re.findall(r"(?m)^\s*(?:import|from) (\w+)", files))
    assert "numpy" in names and {"yaml" if name == "pyyaml" else name for name in names} <= imported


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        hasten.nonsense  # noqa: B018


def test_import_is_light() -> None:
    heavy = "{'numpy', 'torch', 'rich', 'hasten._native'}"
    script = f"import sys, hasten; sys.exit(str({heavy} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_optimize_stays_a_function_once_its_package_is_imported() -> None:
    script = "import hasten.optimize, hasten; assert callable(hasten.optimize), hasten.optimize"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
