"""docs/reference.md is what the program says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="signatures print differently in other versions")
def test_reference_is_in_step() -> None:
    written = Path(__file__).parents[2] / "docs" / "reference.md"
    command = [sys.executable, str(written.with_suffix(".py"))]
    made = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    assert written.read_text(encoding="utf-8") == made, "run: make docs"
