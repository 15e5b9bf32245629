"""The batched step of two ranks that map each other's memory, interpreted in two processes, against one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")
if __name__ == "__main__":
    import mended_interpreter

    mended_interpreter.mend()

from hasten.core import ModelSpec
from hasten.runtime.gpu.batch_step import BatchStep, StepOptions
from hasten.runtime.gpu.batch_weights import load
from hasten.runtime.gpu.peers import MOST_ROWS, PeerRanks, Room
from hasten.runtime.gpu.ranks import Shard, Team
from hasten.runtime.gpu.tiles import Tensors, share_of_tensors
from specs import changed, spec

LLAMA = spec(
    "llama", 128, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, context_length=512
)
MODELS = {
    "llama": LLAMA,
    "sandwich, copied head, biases": changed(
        LLAMA, architecture="gemma3", vocab_size=67, norm_placement="sandwich", tied_head=True,
        biases=("q", "o", "down"),
    ),
}  # fmt: skip
STEPS, ROWS = 4, 3


def tensor_of(config: ModelSpec, name: str) -> Any:
    shape = config.parameter_shapes().get(name)
    if shape is None:
        return None
    noise = np.random.default_rng(len(name) + sum(name.encode())).standard_normal(shape) * shape[-1] ** -0.5
    return torch.from_numpy((1 + 0.1 * noise if name.endswith("norm") else noise).astype(np.float32))


def shared(*shape: int) -> Any:
    return torch.zeros(shape, dtype=torch.uint8).share_memory_()


def memory(ranks: int, width: int) -> list[list[Any]]:
    """Of each kind what every rank owns: two sets of sums, tokens."""
    words = ranks * MOST_ROWS * width // 2 * 8
    return [[shared(size) for _ in range(ranks)] for size in (words, words, ranks * MOST_ROWS * 16)]


def member(rank: int, ranks: int, width: int, owned: list[list[Any]]) -> PeerRanks:
    """A rank on processors: the same memory is at the same address in a process that was forked."""
    found = PeerRanks.__new__(PeerRanks)
    found.rank, found.ranks, found.width = rank, ranks, width
    found.stop = torch.zeros(1, dtype=torch.int32)
    rooms = [Room(own[rank], [one.data_ptr() for one in own]) for own in owned]
    found.words, found.tokens = rooms[:2], rooms[2]
    return found


def decoded(config: ModelSpec, team: Team | None) -> tuple[np.ndarray, np.ndarray]:
    """Residual streams of the last step, and all tokens."""
    tensors = Tensors(lambda name: tensor_of(config, name))
    if team is not None:
        config, tensors = team.shard.local, share_of_tensors(tensors, team.shard)
    weights = load(config, tensors.of, 256, "bf16", "cpu")
    step = BatchStep(weights, StepOptions(ROWS, 24, 256), team=team)
    step.tokens[:ROWS] = torch.tensor([5, 9, 60], dtype=torch.int32)
    step.positions[:ROWS] = 0
    step.table[:ROWS, 0] = torch.tensor([1, 2, 3], dtype=torch.int32)
    for _ in range(STEPS):
        step.step(ROWS, 32)
    return step.buffers.residual[:ROWS].numpy().copy(), step.emitted[:ROWS, 1 : STEPS + 1].numpy().copy()


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/gpu/two.py checks this on GPUs")
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_step_as_one(name: str) -> None:
    here = Path(__file__)
    paths = os.pathsep.join([str(here.parent), str(here.parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, str(here), name],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def compare(name: str) -> None:
    """In a process without other threads, which forks the second rank."""
    config, ranks = MODELS[name], 2
    wanted, tokens = decoded(config, None)
    owned, results = memory(ranks, config.width), shared(ROWS * config.width * 4)
    chosen = shared(ROWS * STEPS * 4)
    teams = [
        Team(Shard(config, rank, ranks), member(rank, ranks, config.width, owned)) for rank in range(ranks)
    ]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            residual, its = decoded(config, teams[1])
            results.copy_(torch.from_numpy(residual.reshape(-1).view(np.uint8)))
            chosen.copy_(torch.from_numpy(np.ascontiguousarray(its).reshape(-1).view(np.uint8)))
            code = 0
        finally:
            os._exit(code)
    try:
        got, mine = decoded(config, teams[0])
    finally:
        assert os.waitpid(child, 0)[1] == 0
    other = results.numpy().view(np.float32).reshape(ROWS, config.width)
    assert np.array_equal(got, other)  # bit by bit on both ranks
    assert np.array_equal(mine, chosen.numpy().view(np.int32).reshape(ROWS, STEPS))
    assert np.abs(got - wanted).max() < 0.03 * wanted.std()
    assert np.array_equal(mine, tokens)


if __name__ == "__main__":
    compare(sys.argv[1])
