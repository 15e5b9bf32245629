"""Compressing that is killed half-way: the same command goes on, and gives what it would have given."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.compress.compress import compress
from hasten.compress.job import Means
from hasten.weights.packed import PackedModel, checksum_of

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
    print(p.stage, p.done, p.detail, sep='|', flush=True)
compress(sys.argv[1], sys.argv[2], out=sys.argv[3], tokens=1024, means=Means(1, "cpu"), observer=tell)
"""


def killed(folder: Path, recipe: str, out: Path, at: tuple[str, int | str]) -> None:
    """A run in a process of its own, killed when it says that it is so far."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), recipe, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    for line in child.stdout:
        step, done, detail = line.rstrip().split("|", 2)
        if step == at[0] and at[1] in (int(done), detail):
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL, "it was over before it could be killed"
    child.stdout.close()
    assert not out.exists()


def run(folder: Path, recipe: str) -> PackedModel:
    """A run that ends, in this process."""
    return compress(folder, recipe, tokens=TOKENS, means=Means(1, "cpu")).packed


@pytest.mark.slow
def test_killed_while_distilling(tiny_folder: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    """The teacher's states are kept; a run that goes on ends with the weights it would have had."""
    folder, recipe = tiny_folder("llama"), tmp_path / "r.yaml"
    recipe.write_text(
        "{default: w4, prune: [{kind: ffn, amount: 0.34}], distil: {tokens: 4096, batch_tokens: 512}}"
    )
    killed(folder, str(recipe), tmp_path / "killed.hasten", ("distil", 4))
    (left,) = cache.glob("compress/runs/*")
    assert list(left.rglob("*.states"))
    again = sums(run(folder, str(recipe)))
    assert not left.exists()
    assert again == sums(run(folder, str(recipe)))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w4-gptq", "w4-best"])
def test_killed_at_a_layer(
    recipe: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Finished layers are not computed again, and nobody sees it by the weights."""
    from hasten.compress.quantise import layerwise

    folder, computed = tiny_folder("llama"), []
    real = layerwise.packed_layer

    def counted(source: Any, asked: Any, method: Any, layer: Any) -> Any:
        computed.append(layer.index)
        return real(source, asked, method, layer)

    monkeypatch.setattr(layerwise, "packed_layer", counted)
    killed(folder, recipe, tmp_path / "killed.hasten", ("quantise", "layer 2"))
    assert list(cache.glob("compress/runs/*"))
    again = sums(run(folder, recipe))
    assert computed == [2]
    assert not list(cache.glob("compress/runs/*"))
    assert again == sums(run(folder, recipe))
    assert computed == [2, 0, 1, 2]
