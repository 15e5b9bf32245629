"""The article's sample runs and explains itself, and docs/article.md names files that are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_sample_runs_and_explains_every_row() -> None:
    command = [sys.executable, ROOT / "examples" / "article_sample.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr, "no warnings"
    for row in ("as it was", "pruned", "int8", "compiled", "cache, new input", "cache, seen input"):
        assert done.stdout.count(f"\n{row} ") == done.stdout.count(f"\n- {row}: ") == 2, row
    probabilities = re.search(r"^softmax \[(.*)\]$", done.stdout, re.MULTILINE)
    assert probabilities and abs(sum(map(float, probabilities[1].split(","))) - 1) < 0.01
    assert "the same bits, 1 hit" in done.stdout


def test_what_the_document_names_is_there() -> None:
    text = (ROOT / "docs" / "article.md").read_text()
    named = re.findall(r"`((?:\w+/)*[\w]+(?:/|\.(?:py|cpp|json)))`", text)
    named += re.findall(r"`python (\S+)`", text)
    assert len(named) > 25
    places = (ROOT, ROOT / "src" / "hasten", ROOT / "docs")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert not missing
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links and not [link for link in links if not (ROOT / "docs" / link).exists()]
