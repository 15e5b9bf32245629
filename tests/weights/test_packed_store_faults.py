"""The store of packed weights among processes that die, race and drop each other's entries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def scene(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], str]:
    """Runs a scenario of store_faults.py; what it printed."""

    def run(name: str) -> str:
        script = Path(__file__).with_name("store_faults.py")
        command = [sys.executable, str(script), name, str(tiny_folder("qwen3")), str(tmp_path / "packed")]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "damaged" not in done.stderr, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_kill_at_random_moments(scene: Callable[[str], str]) -> None:
    """200 kills while an entry is written; most hit before the end, and nothing of them stays."""
    died, left = map(int, scene("kills").split())
    assert died > 100 and left == 0


def test_many_processes_keep_one_model(scene: Callable[[str], str]) -> None:
    assert scene("together") == "ok\n"


def test_an_entry_dropped_while_others_read(scene: Callable[[str], str]) -> None:
    assert scene("dropped_while_read") == "ok\n"
