"""The examples are short and run. Those that ask a server: tests/serve/test_serve_uses.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
USES = ("decide", "summarize", "support", "translate")
"""The article's uses: clients of a server."""
CLIENT = FOLDER / "client.py"
EXAMPLES = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in USES and path != CLIENT]


def test_there_are_examples_and_they_are_short() -> None:
    assert EXAMPLES
    for path in FOLDER.glob("*.py"):
        lines = path.read_text().splitlines()
        assert len(lines) < (70 if path == CLIENT or path.stem in USES else 40), path
        assert lines[0].startswith('"""'), path


@pytest.mark.demo
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path: Path) -> None:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout) > 40
