"""Every verb describes itself and every flag."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from hasten.cli import VERBS, main
from hasten.cli.frame import command_of, parser_of


@pytest.mark.parametrize("name", VERBS)
def test_help_of_a_verb(name: str, capsys: Any) -> None:
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"Usage: hasten {name} ")
    assert VERBS[name] in " ".join(out.split())


@pytest.mark.parametrize("name", VERBS)
def test_overview_line_is_the_docstrings_first(name: str) -> None:
    doc = inspect.getdoc(command_of(name))
    assert doc is not None
    assert doc.splitlines()[0] == VERBS[name]


@pytest.mark.parametrize("name", VERBS)
def test_every_flag_is_described(name: str) -> None:
    """A sentence each."""
    for parameter in parser_of(name).params:
        help_text = getattr(parameter, "help", None)
        assert help_text, f"hasten {name}: {parameter.name} has no help"
        assert help_text.endswith("."), help_text
