"""The examples are short and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_examples_and_they_are_short() -> None:
    assert EXAMPLES
    for path in EXAMPLES:
        lines = path.read_text().splitlines()
        assert len(lines) < 40, path
        assert lines[0].startswith('"""'), path


@pytest.mark.demo
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) > 40
