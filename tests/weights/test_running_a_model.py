"""A model runs without the package that compresses models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = """
import sys
import hasten
source, artifact = sys.argv[1:]
model = hasten.load(source, "w4", threads=1, context=64, store=False)
model.generate(["the"], max_new_tokens=2, chat=False)
from hasten.models.artifact import save
from hasten.models.open import open_model
save(artifact, model.packed, open_model(source), {})
again = hasten.load(artifact, threads=1, context=64)
again.generate(["the"], max_new_tokens=2, chat=False)
print(*sorted(name for name in sys.modules if name.startswith("hasten.compress")))
print(*sorted(name for name in sys.modules if name in ("torch", "hasten.weights.artifact")))
"""


def test_running_a_model_imports_nothing_of_compress(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tiny_folder("qwen3")), str(tmp_path / "a.hasten")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["", "hasten.weights.artifact"]
