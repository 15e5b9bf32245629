"""The roofline by hand, and its limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hasten
from hasten import _native
from hasten.core import (
    Attention,
    Block,
    Ceiling,
    FeedForward,
    Format,
    Machine,
    ModelSpec,
    Recipe,
    Rotary,
    Stat,
    Workload,
)
from hasten.errors import MachineError, UsageError
from hasten.speed.cost import cost, kv_read_bytes, page_bytes, prompt_flops, read_bytes
from hasten.speed.forecast import estimate
from hasten.speed.pace import Efficiency
from specs import changed, spec

TINY = spec(
    architecture="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=4096,
)
LAYER = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128  # q, o; k, v; gate, up, down
WEIGHTS = 2 * LAYER + 1000 * 64
STAT = Stat(1.0, 1.0, 1.0, 1)
MACHINE = Machine(
    cpu="test",
    isa=("scalar", "avx512"),
    cores=2,
    l1d_bytes=None,
    l2_bytes=None,
    l3_bytes=None,
    memory_bytes=None,
    read_gb_per_s=50.0,
    int8_tops=1.0,
    bf16_tflops=0.25,
    ceilings=(Ceiling("scalar", "int8", 0.1, STAT), Ceiling("scalar", "bf16", 0.05, STAT)),
)
FULL = Efficiency(read=1.0, linear=1.0, attention=1.0)


def test_decode_is_bytes_over_bandwidth() -> None:
    w8 = Recipe.parse("w8")
    got = estimate(TINY, MACHINE, Workload(100, 20), w8, efficiency=FULL)
    weights = (2 * LAYER + 1008 * 64) * 8.5 / 8  # the head's rows are padded to 16
    kv = 2 * 2 * 2 * 32 * 2 * 110  # k and v, layers, heads, size (padded), bytes, mean context
    assert got.weight_bytes == weights
    assert got.decode_tok_per_s == pytest.approx(50e9 / (weights + kv))
    assert got.bound == "memory"
    half = estimate(TINY, MACHINE, Workload(100, 20), w8, efficiency=replace(FULL, read=0.5))
    assert half.decode_tok_per_s == pytest.approx(got.decode_tok_per_s / 2)


def test_prefill_is_operations_over_the_ceiling() -> None:
    got = estimate(TINY, MACHINE, Workload(1000, 1), Recipe.parse("w8"), efficiency=FULL)
    linear = 2 * (2 * LAYER * 1000 + 64000) / 1e12
    attention = 2 * 4 * 4 * 16 * (1000 * 1001 / 2) / 0.25e12
    assert got.prefill_tok_per_s == pytest.approx(1000 / (linear + attention))
    assert got.ttft_ms == pytest.approx((linear + attention) * 1e3)
    bf16 = estimate(TINY, MACHINE, Workload(1000, 1), Recipe.parse("bf16"), efficiency=FULL)
    assert bf16.prefill_tok_per_s == pytest.approx(1000 / (linear * 4 + attention))


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    single = estimate(TINY, MACHINE, Workload(16, 16, 1), Recipe.parse("w4"), efficiency=FULL)
    pair = estimate(TINY, MACHINE, Workload(16, 16, 2), Recipe.parse("w4"), efficiency=FULL)
    many = estimate(TINY, MACHINE, Workload(16, 16, 256), Recipe.parse("w4"), efficiency=FULL)
    assert single.bound == "memory" and many.bound == "compute"
    assert single.decode_tok_per_s < pair.decode_tok_per_s < 2 * single.decode_tok_per_s
    assert many.decode_tok_per_s < 256 * single.decode_tok_per_s
    together = estimate(TINY, MACHINE, Workload(16, 16, 256), Recipe.parse("w4"), efficiency=FULL, chunk=4096)
    asked = cost(TINY, Workload(16, 16), Recipe.parse("w4"))
    one = asked.prompt_int8_ops / 1e12 + asked.prompt_attention_ops / 0.25e12
    assert together.ttft_ms == pytest.approx(256e3 * one)
    assert many.ttft_ms > together.ttft_ms  # eight steps, beside those that decode already


def test_sliding_windows_bound_what_is_read() -> None:
    sliding = changed(TINY, sliding_window=64, sliding_layers=(True, False))
    assert kv_read_bytes(sliding, 1000, False) == 2 * 2 * 32 * 2 * (64 + 1000)
    assert kv_read_bytes(sliding, 10, False) == 2 * 2 * 32 * 2 * 20
    full = cost(TINY, Workload(100, 0), Recipe.parse("w8"))
    less = cost(sliding, Workload(100, 0), Recipe.parse("w8"))
    assert full.prompt_attention_ops == 4 * 64 * 2 * 5050
    assert less.prompt_attention_ops == 4 * 64 * (5050 + 64 * 65 / 2 + 36 * 64)


def test_a_mixture_of_experts_reads_what_its_tokens_choose() -> None:
    """2 of 8 experts a token, and one that every token goes through."""
    mixer = Attention(4, 2, 32, rotary=Rotary(32))
    mixed = ModelSpec(
        "mixed", 128, 64, 4096, (Block(mixer, FeedForward(96, "experts", experts=8, chosen=2, shared=1)),)
    )
    expert, rest = 3 * 96 * 64, 2 * 128 * 64 + 2 * 64 * 64 + 8 * 64 + 128 * 64
    recipe = Recipe.parse("bf16")

    def read(tokens: int) -> int:
        return read_bytes(mixed, recipe, tokens)

    router = 2 * (16 - 8) * 64  # its 8 rows are padded to 16
    assert read(1) == 2 * (rest + (1 + 2) * expert) + router
    assert read(2) == 2 * rest + 2 * (1 + 8 * (1 - 0.75**2)) * expert + router
    assert read(10**6) == 2 * (rest + (1 + 8) * expert) + router
    asked = cost(mixed, Workload(1000, 0, batch=2), recipe)
    assert asked.weight_bytes == read(2)
    assert asked.bf16_ops == 2 * 2 * mixed.weights_read < 2 * 2 * mixed.weights_stored
    assert prompt_flops(mixed, 0, 10) == 20 * (mixed.weights_read - 128 * 64) + 4 * 4 * 32 * 55
    slow = replace(MACHINE, bf16_tflops=1e6)  # nothing but reading takes time
    prompt = estimate(mixed, slow, Workload(1000, 0, batch=2), recipe, efficiency=replace(FULL, step_us=0))
    keys = 256 * (512 + 24 + 1001 + 536)  # of the prompts so far, and of the answer beside the third step
    head = 2 * 128 * 64  # which the first step does not need: nothing is drawn
    steps = read(512) - head + read(512) + read(513) + read(464) + keys
    assert prompt.prefill_tok_per_s == pytest.approx(2000 * 50e9 / steps, rel=1e-5)


def test_blocks_of_different_shapes_are_counted_one_by_one() -> None:
    """A wide block of 8 KV heads, then one that reads the first one's keys and values over a window of 10."""
    wide, narrow = Attention(16, 8, 32), Attention(4, 1, 32, window=10, kv_from=0)
    blocks = (Block(wide, FeedForward(64)), Block(narrow, FeedForward(32)))
    model = ModelSpec("two", 100, 64, 4096, blocks)
    assert page_bytes(model, False, 16) == 16 * 2 * 8 * 64  # the second block keeps none
    assert page_bytes(model, True, 16) == 16 * 2 * 8 * 36
    assert kv_read_bytes(model, 100, False) == 2 * 64 * (8 * 100 + 1 * 10)
    asked = cost(model, Workload(100, 0), Recipe.parse("w8"))
    assert asked.attention_ops == 4 * 32 * (16 * 100 + 4 * 10)
    assert asked.prompt_attention_ops == 4 * 32 * (16 * 5050 + 4 * (55 + 90 * 10))


def test_mixed_recipes_and_int8_keys() -> None:
    recipe = Recipe(
        "mix", default=Format.of(4), head=Format.of(16), layers={"layers.0.q": Format.of(16)}, kv="int8"
    )
    got = cost(TINY, Workload(10, 0), recipe)
    assert got.bf16_ops == 2 * (64 * 64 + 64000)
    assert got.int8_ops == 2 * (WEIGHTS - 64 * 64 - 64000)
    assert got.kv_bytes == 2 * 2 * 2 * 10 * (32 + 4)


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((16, 64), Format.of(16), 16 * 64 * 2),
        ((17, 33), Format.of(16), 32 * 64 * 2),
        ((16, 32), Format.of(4), 8 * 32 + 32),
        ((16, 96), Format.of(5, 128), 10 * 128 + 32),
        ((16, 64), Format.of(6, 16, symmetric=False), 4 * (12 * 16 + 64)),
    ],
)
def test_packed_bytes_follow_the_layout(shape: tuple[int, int], layout: Format, expected: int) -> None:
    assert layout.bytes_of(*shape) == expected


def test_unknown_stays_unknown() -> None:
    for name in ("read_gb_per_s", "int8_tops", "bf16_tflops"):
        unknown: dict[str, Any] = {name: None}
        with pytest.raises(MachineError, match="unknown") as caught:
            estimate(TINY, replace(MACHINE, **unknown), Workload(), Recipe.parse("w8"))
        assert caught.value.hint
    with pytest.raises(UsageError, match="once it is open"):
        estimate(TINY, MACHINE, Workload(), Recipe.parse("source"))
    assert estimate(TINY, MACHINE, Workload(), Recipe.parse("source"), weight_bytes=123).weight_bytes == 123
    for workload in (Workload(0, 1), Workload(1, 1, 0), Workload(1, -1)):
        with pytest.raises(UsageError):
            estimate(TINY, MACHINE, workload, Recipe.parse("w8"))
    with pytest.raises(UsageError):
        Efficiency(read=0.0)


def test_another_instruction_set() -> None:
    best = estimate(TINY, MACHINE, Workload(512, 0), Recipe.parse("w8"))
    scalar = estimate(TINY, MACHINE, Workload(512, 0), Recipe.parse("w8"), isa="scalar")
    assert scalar.prefill_tok_per_s < best.prefill_tok_per_s
    with pytest.raises(MachineError):
        estimate(TINY, MACHINE, Workload(), Recipe.parse("w8"), isa="avx512")


def test_what_the_file_keeps_counts_as_what_it_is() -> None:
    kept = Recipe.parse("source")
    asked = cost(TINY, Workload(10, 0), kept, 1000)
    assert asked.bf16_ops == asked.prompt_bf16_ops == 0 and asked.int8_ops == 2 * WEIGHTS
    floats = cost(TINY, Workload(10, 0), kept, 1000, keeps_integers=False)
    assert floats.int8_ops == 0 and floats.bf16_ops == 2 * WEIGHTS


@pytest.mark.parametrize("recipe", ["w8", "w8-kv8"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_native_cache_takes_the_same_bytes_for_a_page(
    tiny_folder: Callable[[str], Path], architecture: str, recipe: str
) -> None:
    model = hasten.load(tiny_folder(architecture), recipe, context=64, store=False)
    try:
        int8 = model.recipe.kv != "bf16"
        assert model.executor.page_bytes == page_bytes(model.config, int8, _native.PAGE_TOKENS)
    finally:
        model.close()
