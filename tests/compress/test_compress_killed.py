"""Compressing that is killed half-way: the same command goes on, and gives what it would have given."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.compress.artifact import load_artifact
from hasten.compress.compress import compress
from hasten.compress.job import Means
from hasten.compress.pack import PackedModel, checksum_of

TOKENS = 1024


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sums(packed: PackedModel) -> dict[str, str]:
    return {name: checksum_of(linear) for name, linear in packed.linears.items()}


CHILD = """
import sys, torch
torch.set_num_threads(1)
from hasten.compress.compress import compress
from hasten.compress.job import Means
def tell(p):
    print(p.step, p.done, flush=True)
compress(sys.argv[1], sys.argv[2], out=sys.argv[3], tokens=1024, means=Means(1, "cpu"), observer=tell)
"""


def killed(folder: Path, recipe: str, out: Path, at: tuple[str, int]) -> None:
    """A run in a process of its own, killed when it says that it is so far."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), recipe, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        step, done = line.rsplit(maxsplit=1)
        if step == at[0] and int(done) >= at[1]:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL, "it was over before it could be killed"
    child.stdout.close()
    assert not out.exists()


def run_again(folder: Path, recipe: str, out: Path) -> tuple[dict[str, str], str]:
    """The weights of a run that ends, and everything it told."""
    command = [sys.executable, "-c", CHILD, str(folder), recipe, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sums(load_artifact(out).packed), done.stdout


def uninterrupted(folder: Path, recipe: str) -> PackedModel:
    return compress(folder, recipe, tokens=TOKENS, means=Means(1, "cpu")).packed


def test_killed_while_distilling(tiny_folder: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    """The teacher's states are kept; a run that goes on ends with the weights it would have had."""
    folder, recipe = tiny_folder("llama"), tmp_path / "r.yaml"
    recipe.write_text(
        "{default: w4, prune: [{kind: ffn, amount: 0.34}], distil: {tokens: 4096, batch_tokens: 512}}"
    )
    killed(folder, str(recipe), tmp_path / "killed.hasten", ("distil", 4))
    (left,) = cache.glob("compress/work/*")
    assert list(left.rglob("*.states"))
    again, _ = run_again(folder, str(recipe), tmp_path / "killed.hasten")
    assert not left.exists()
    assert again == sums(uninterrupted(folder, str(recipe)))


def test_killed_at_a_layer(tiny_folder: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("hasten.compress.quantise.layerwise")
    folder, recipe = tiny_folder("llama"), "w4-gptq"
    killed(folder, recipe, tmp_path / "killed.hasten", ("quantise", 2))
    assert list(cache.glob("compress/**/*"))
    again, told = run_again(folder, recipe, tmp_path / "killed.hasten")
    first = next(line for line in told.splitlines() if line.startswith("quantise") and line[-1] != "0")
    assert int(first.split()[1]) >= 2, "finished layers are not computed again"
    assert again == sums(uninterrupted(folder, recipe))
