"""Which tiles each product of the batched step is tried with, and how they are timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F

from hasten.runtime.gpu.batch_step import BatchStep, Shape
from hasten.runtime.gpu.batch_weights import AttentionTile, Product, Tile

PRODUCTS: tuple[Product, ...] = ("qkv", "o", "gate_up", "down", "head")
ATTENTION = [
    AttentionTile(*t)
    for t in [(256, 64, 2, 5), (1024, 64, 4, 5), (512, 64, 2, 5), (512, 32, 2, 5), (1024, 32, 2, 7),
              (1024, 32, 2, 5), (1024, 32, 1, 7),
              (1024, 64, 2, 5), (256, 32, 2, 5)]
]  # fmt: skip
_SPLIT = [(64, 64, 4, 4, 4), (64, 64, 2, 4, 4), (64, 128, 2, 4, 3), (64, 128, 4, 4, 3), (64, 64, 8, 4, 3)]
_BF16: dict[tuple[str, Product], list[tuple[int, ...]]] = {  # rows, block, splits, warps, stages
    ("0.6B", "qkv"): [*_SPLIT, (64, 128, 2, 4, 4), (64, 128, 4, 4, 2), (64, 64, 4, 8, 4), (64, 128, 2, 8, 3)],
    ("0.6B", "o"): [*_SPLIT, (32, 128, 4, 4, 3), (32, 64, 4, 4, 4), (16, 128, 2, 4, 4),
                    (32, 128, 2, 4, 4), (64, 128, 4, 8, 3)],
    ("0.6B", "gate_up"): [*_SPLIT[:3], (32, 128, 1, 4, 4), (32, 64, 1, 4, 5), (32, 128, 1, 4, 3),
                          (32, 64, 2, 4, 4), (16, 128, 1, 4, 4)],
    ("0.6B", "down"): [*_SPLIT, (32, 128, 4, 4, 4), (32, 64, 4, 4, 5), (32, 128, 8, 4, 3),
                       (16, 128, 2, 4, 4), (64, 128, 4, 8, 3)],
    ("0.6B", "head"): [(128, 64, 1, 4, 4), (64, 64, 1, 4, 6), (128, 128, 1, 4, 3), (128, 128, 1, 8, 3),
                       (64, 128, 1, 4, 4)],
    ("8B", "qkv"): [*_SPLIT, (64, 64, 2, 4, 5), (64, 128, 2, 4, 4), (64, 64, 4, 8, 4), (64, 128, 2, 8, 3)],
    ("8B", "o"): [*_SPLIT, (64, 64, 2, 4, 6), (64, 128, 2, 4, 4), (32, 128, 2, 4, 4), (32, 256, 1, 4, 4)],
    ("8B", "gate_up"): [(64, 64, 1, 4, 4), (64, 64, 1, 4, 5), (64, 64, 1, 4, 3), (64, 64, 1, 8, 4),
                        (64, 128, 1, 4, 3), (128, 64, 1, 8, 4), (64, 128, 1, 8, 3)],
    ("8B", "down"): [*_SPLIT, (64, 64, 2, 4, 6), (64, 128, 2, 4, 4), (128, 64, 4, 8, 4), (32, 128, 4, 4, 3)],
    ("8B", "head"): [(128, 64, 1, 4, 4), (128, 128, 1, 4, 3), (128, 128, 1, 8, 3), (64, 64, 1, 4, 6),
                     (256, 64, 1, 8, 4)],
}  # fmt: skip
_FP8: dict[tuple[str, Product], list[tuple[int, ...]]] = {
    ("8B", "qkv"): [(64, 128, 2, 4, 4), (64, 128, 4, 4, 4), (64, 256, 2, 4, 3), (64, 256, 4, 4, 2)],
    ("8B", "o"): [(64, 128, 2, 4, 6), (64, 128, 4, 4, 4), (64, 256, 2, 4, 3), (64, 256, 4, 4, 3)],
    ("8B", "gate_up"): [(64, 128, 1, 4, 4), (64, 128, 1, 4, 3), (128, 128, 1, 8, 3), (64, 256, 1, 4, 2)],
    ("8B", "down"): [(64, 128, 4, 4, 4), (64, 128, 2, 4, 6), (64, 256, 2, 4, 3), (128, 128, 4, 8, 4),
                     (64, 256, 4, 4, 3)],
    ("8B", "head"): [(128, 128, 1, 4, 4), (128, 128, 1, 4, 3), (128, 256, 1, 8, 2)],
}  # fmt: skip


def candidates(model: str, precision: str, product: Product) -> list[Tile]:
    """Tiles to try."""
    return [Tile(*t) for t in (_BF16 if precision == "bf16" else _FP8)[model, product]]


def one_product(step: BatchStep, shape: Shape, product: Product) -> None:
    """That product of every layer, one after another: weights come from memory, never from the L2."""
    if product == "head":
        step.head(shape)
        return
    for layer in range(len(step.weights.config.blocks)):
        getattr(step, product)(shape, layer)


def with_tile(shape: Shape, product: Product, tile: Tile) -> Shape:
    return replace(shape, tiles={**shape.tiles, product: tile})


def microseconds(work: Callable[[], None], calls: int, rounds: int = 5) -> float:
    """Median time of one of `calls` calls that `work` makes, from replays of a graph of it."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


def library(step: BatchStep, rows: int, product: Product) -> float:
    """Time of the library's product alone (cuBLAS; with fp8 one scale for all), without what follows."""
    name = {"gate_up": "gate_up"}.get(product, product)
    w = step.weights
    matrices = [w.head] if product == "head" else [getattr(layer, name) for layer in w.layers]
    x = torch.randn(rows, matrices[0].values.shape[1], device="cuda", dtype=torch.bfloat16)
    if matrices[0].scales is None:
        return microseconds(lambda: [F.linear(x, m.values) for m in matrices] and None, len(matrices))
    one = torch.ones((), device="cuda")
    x8 = x.to(torch.float8_e4m3fn)

    def scaled() -> None:
        for m in matrices:
            torch._scaled_mm(
                x8, m.values.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
            )

    return microseconds(scaled, len(matrices))


def tune(step: BatchStep, shape: Shape, product: Product, tiles: Iterable[Tile]) -> list[tuple[float, Tile]]:
    """(us a call, tile), the fastest first; a tile that does not fit the device is left out."""
    calls = 1 if product == "head" else len(step.weights.config.blocks)
    found = []
    for tile in tiles:
        try:
            tried = with_tile(shape, product, tile)
            found.append((microseconds(lambda tried=tried: one_product(step, tried, product), calls), tile))  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - a compiler's or a driver's; the others are still worth timing
            print("left out", product, tile, str(error)[:100], flush=True)
    return sorted(found, key=lambda pair: pair[0])


def tune_attention(step: BatchStep, shape: Shape) -> list[tuple[float, AttentionTile]]:
    """The same for attention."""
    layers, found = range(len(step.weights.config.blocks)), []
    for tile in ATTENTION:
        tried = replace(shape, attention=tile)
        try:
            time = microseconds(
                lambda tried=tried: [step.attention(tried, i) for i in layers] and None, len(layers)
            )  # type: ignore[misc]
            found.append((time, tile))
        except Exception as error:  # noqa: BLE001
            print("left out", tile, str(error)[:100], flush=True)
    return sorted(found, key=lambda pair: pair[0])
