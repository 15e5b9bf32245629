"""How long the ranks' sums take, alone: the words of a decode step, and the sums of a prompt."""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from hasten.runtime.gpu.batch_products import norm_and_add
from hasten.runtime.gpu.peers import PeerRanks, Words, tagged
from hasten.runtime.gpu.ranks import Meeting

PROMPTS = (1024, 8192)  # tokens of the sums of prompts


@triton.jit
def count(turn):
    tl.store(turn, tl.load(turn) + 1)


@triton.jit(do_not_specialize=["place"])
def send_and_add(y, peers, words, stop, turn, place, residual, gamma, hidden, squares, eps, E: tl.constexpr,
                 STRIDE: tl.constexpr, RANKS: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """A row of this rank's partial sums bf16 [M, E] to all; their sum, residual, norm. Grid: (rows,)."""
    row, h = tl.program_id(0), tl.arange(0, E // 2)
    pair = tl.load(y.to(tl.pointer_type(tl.int32)) + row * (E // 2) + h)
    word = tagged(pair, tl.load(turn) * PLACES + place)
    for r in tl.static_range(RANKS):
        tl.store(tl.load(peers + r).to(tl.pointer_type(tl.int64)) + row * (E // 2) + h, word)
    norm_and_add(None, words, stop, turn, place, None, residual, gamma, hidden, squares, None, eps, E, E,
                 STRIDE, RANKS, RANKS, PLACES, 0)  # fmt: skip


def _replays(work: Callable[[], None], turns: int) -> float:
    """Microseconds of one of `turns` calls in a graph, a median of replays."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            work()
    times = []
    for _ in range(30):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / turns)
    return statistics.median(times[5:])


class _Step:
    """The exchange of some rows, again and again."""

    def __init__(self, ranks: PeerRanks, words: Words, rows: int, width: int) -> None:
        self.ranks, self.words, self.rows, self.width = ranks, words, rows, width
        torch.manual_seed(ranks.rank)
        self.y = torch.randn(rows, width, device="cuda").to(torch.bfloat16)
        self.residual = torch.zeros(rows, width, device="cuda")
        self.gamma, self.squares = torch.ones(width, device="cuda"), torch.zeros(rows, device="cuda")
        self.hidden = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
        self.place = 0

    def launch(self) -> None:
        """One exchange; 256 places a turn, and turns are counted by the first of them."""
        if self.place % 256 == 0:
            count[(1,)](self.words.turn)
        at = self.place % 2
        send_and_add[(self.rows,)](
            self.y, self.words.peers[at], self.words.own[at], self.ranks.stop, self.words.turn,
            self.place % 256, self.residual, self.gamma, self.hidden, self.squares, 1e-5, E=self.width,
            STRIDE=self.words.stride, RANKS=self.ranks.ranks, PLACES=256, num_warps=8,
        )  # fmt: skip
        self.place += 1


def measure(rank: int, ranks: int, port: int, width: int, rows_of: list[int]) -> dict[str, float]:
    """All exchanges on one rank: name -> microseconds, and `wrong` where sums are not right."""
    torch.cuda.set_device(rank)
    group = PeerRanks(Meeting(rank, ranks, port, lambda: None), PROMPTS[-1], width)
    words, found = Words(group), dict[str, float]()
    for rows in rows_of:
        step = _Step(group, words, rows, width)
        step.launch()
        torch.cuda.synchronize()
        found[f"error {rows}"] = float((step.residual - _right(ranks, rows, width)).abs().max())
        step.place = 0
        found[f"words {rows}"] = _replays(step.launch, 256)
    for tokens in PROMPTS:
        torch.manual_seed(rank)
        y = torch.randn(tokens, width, device="cuda").to(torch.bfloat16)
        room = group.room(tokens, width)
        assert room is not None
        room.copy_(y)
        total = group.add(room)
        found[f"error {tokens}"] = float((total.float() - _right(ranks, tokens, width)).abs().max())
        found[f"sums {tokens}"] = _replays(lambda room=room: group.add(room), 8)  # type: ignore[misc]
        found |= _peers_of(tokens, width)
    group.least(0)
    return found


def _peers_of(tokens: int, width: int) -> dict[str, float]:
    """The same by torch's operation and by NCCL, where they can."""
    from torch import distributed
    from torch.distributed import _symmetric_memory as symmetric

    found: dict[str, float] = {}
    name = distributed.group.WORLD.group_name  # type: ignore[union-attr]
    device = torch.device("cuda", torch.cuda.current_device())
    memory = symmetric.empty(tokens, width, dtype=torch.bfloat16, device=device)
    symmetric.rendezvous(memory, name)
    memory.zero_()
    found[f"torch two-shot {tokens}"] = _replays(
        lambda: torch.ops.symm_mem.two_shot_all_reduce_(memory, "sum", name), 8
    )
    if "NO_NCCL" not in os.environ:
        group = distributed.new_group(backend="nccl")
        found[f"NCCL {tokens}"] = _replays(lambda: distributed.all_reduce(memory, group=group), 8)
    return found


def _right(ranks: int, rows: int, width: int) -> torch.Tensor:
    parts = []
    for rank in range(ranks):
        torch.manual_seed(rank)
        parts.append(torch.randn(rows, width, device="cuda").to(torch.bfloat16).float())
    return torch.stack(parts).sum(0)


def lead(rows: Any, ranks: int, bars: Mapping[int, tuple[int, float]], width: int) -> None:
    """Measure on this process's GPU, with one more process for each other."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code = "import sys; from two_exchange import measure; measure(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), eval(sys.argv[5]))"  # noqa: E501
    sizes = list(bars)
    others = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, (rank, ranks, store.port, width, sizes))])
        for rank in range(1, ranks)
    ]
    found = measure(0, ranks, store.port, width, sizes)
    for process in others:
        process.wait(20)
    for count_, (size, bar) in bars.items():
        error = found[f"error {count_}"]
        name = f"all-reduce of {size} KB with residual and norm in a graph"
        rows.add(name, found[f"words {count_}"], bar, "us", True, error=error)
    for tokens in PROMPTS:
        more = {k.removesuffix(f" {tokens}"): v for k, v in found.items() if k.endswith(f" {tokens}")}
        rows.add(f"sum of {tokens} x {width} bf16", found[f"sums {tokens}"], None, "us", **more)
