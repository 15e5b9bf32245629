"""The fuzzers' seeds again, whole and mutated at random: seconds of what the fuzzers do for minutes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import targets

TARGETS: dict[str, Callable[[bytes], bool]] = {"gguf": targets.gguf, "safetensors": targets.safetensors}
SEEDS = [(kind, path) for kind in TARGETS for path in sorted((targets.CORPUS / kind).iterdir())]
MUTANTS = 300  # of each seed
EDGES = [0, 1, 0x7F, 0x80, 0xFF]


@pytest.mark.parametrize("kind", TARGETS)
def test_some_seeds_open_and_some_do_not(kind: str) -> None:
    results = [TARGETS[kind](path.read_bytes()) for owner, path in SEEDS if owner == kind]
    assert 0 < sum(results) < len(results)


@pytest.mark.parametrize(("kind", "path"), SEEDS, ids=[f"{kind}-{path.name}" for kind, path in SEEDS])
def test_only_our_errors_come_out(kind: str, path: Path) -> None:
    data = path.read_bytes()
    for mutant in mutants(data, random.Random(path.name)):
        TARGETS[kind](mutant)


def mutants(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """Bytes set to edges, 64-bit numbers replaced, pieces removed, doubled or swapped."""
    yield data
    for _ in range(MUTANTS):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 4])):
            at = rng.randrange(len(changed)) if changed else 0
            length = rng.choice([1, 4, 8, 32])
            action = rng.randrange(5)
            if action == 0:
                changed[at : at + 1] = bytes([rng.choice([*EDGES, rng.randrange(256)])])
            elif action == 1:
                changed[at : at + 8] = rng.choice([rng.getrandbits(64), 1 << 63, 1 << 32, 3]).to_bytes(
                    8, "little"
                )
            elif action == 2:
                del changed[at : at + length]
            elif action == 3:
                changed[at:at] = changed[at : at + length]
            else:
                del changed[at:]
        yield bytes(changed)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"null", b'{"model_type": "llama"}', b'{"model_type": {}}', b"[" * 9999]
)
def test_configs_of_strangers(text: bytes) -> None:
    assert targets.config(text) is False
