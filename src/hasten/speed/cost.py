"""What a workload asks of the machine: bytes to read and operations to do."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.core import Layout, ModelConfig, Recipe, Workload
from hasten.errors import UsageError

_PANEL_ROWS = 16  # native/layout.h
_SCALE_BYTES = 4  # one float a token and head beside int8 keys and values


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one decode step of the whole batch and of one prompt; a multiply-add is two."""

    weight_bytes: int  # linear layers, head included: read by every step
    kv_bytes: float  # keys and values a decode step reads, all sequences, at the mean context
    int8_ops: float  # a decode step, linear layers with integer weights
    bf16_ops: float  # a decode step, linear layers with bf16 weights
    attention_ops: float  # a decode step
    prompt_int8_ops: float
    prompt_bf16_ops: float
    prompt_attention_ops: float


def cost(config: ModelConfig, workload: Workload, recipe: Recipe, weight_bytes: int | None = None) -> Cost:
    """What `workload` costs with this model in this recipe.

    The mean context while decoding is prompt + output / 2. The head runs once a prompt. The embedding rows
    read, norms, rotary angles, softmax and the keys and values written are left out: little beside the
    weights of a model of 100M or more.

    Raises:
        UsageError: the recipe keeps the source's values and `weight_bytes` is not given.
    """
    m, prompt = workload.batch, workload.prompt
    int8, bf16, head_int8, head_bf16 = _weights(config, recipe)
    context = prompt + workload.output / 2
    kv = kv_read_bytes(config, context, kv_bytes_per_value(config, recipe))
    pairs = 4.0 * config.num_heads * config.head_dim  # two multiply-adds a query, key and dimension
    return Cost(
        weight_bytes=recipe_bytes(config, recipe) if weight_bytes is None else weight_bytes,
        kv_bytes=m * kv,
        int8_ops=2.0 * m * (int8 + head_int8),
        bf16_ops=2.0 * m * (bf16 + head_bf16),
        attention_ops=m * pairs * sum(_seen(config, context)),
        prompt_int8_ops=2.0 * (int8 * prompt + head_int8),
        prompt_bf16_ops=2.0 * (bf16 * prompt + head_bf16),
        prompt_attention_ops=pairs * sum(_seen_by_prompt(w, prompt) for w in _windows(config)),
    )


def recipe_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of all linear layers as native/layout.h packs them, padding included.

    Raises:
        UsageError: the recipe keeps the source's values, so only the opened file knows.
    """
    total = 0
    for name, shape in config.linear_shapes().items():
        layout = recipe.layout_for(name)
        if layout is None:
            raise UsageError(
                f"recipe {recipe.name!r} keeps the file's own layouts: their bytes are known once it is open",
                hint="open the model and pass weight_bytes, or estimate w8, w6, w5 or w4",
            )
        total += packed_bytes(shape, layout)
    return total


def packed_bytes(shape: tuple[int, int], layout: Layout) -> int:
    """Bytes of one packed matrix [rows, cols]: rows padded to 16, columns to the group (bf16: to 32)."""
    rows, cols = (-(-shape[0] // _PANEL_ROWS) * _PANEL_ROWS, shape[1])
    step = 32 if layout.bits == 16 else max(layout.group, 32)
    return int(rows * (-(-cols // step) * step) * layout.bits_per_weight / 8)


def kv_bytes_per_value(config: ModelConfig, recipe: Recipe) -> float:
    """2 for bf16; for int8 one byte, and a float scale for each token and head."""
    return 2.0 if recipe.kv == "bf16" else 1.0 + _SCALE_BYTES / config.head_dim


def kv_read_bytes(config: ModelConfig, context: float, bytes_per_value: float) -> float:
    """Bytes of keys and values one decoded token reads at `context` tokens, sliding windows respected."""
    return 2.0 * config.num_kv_heads * config.head_dim * bytes_per_value * sum(_seen(config, context))


def _windows(config: ModelConfig) -> list[float]:
    """Tokens each layer may look back on."""
    sliding = config.sliding_layers or (False,) * config.num_layers
    window = config.sliding_window
    return [float(window) if slides and window else float("inf") for slides in sliding]


def _seen(config: ModelConfig, context: float) -> list[float]:
    return [min(context, window) for window in _windows(config)]


def _seen_by_prompt(window: float, prompt: int) -> float:
    """Keys that all queries of a prompt see together: 1 + 2 + ... up to the window, then the window each."""
    ramp = min(window, prompt)
    return ramp * (ramp + 1) / 2 + (prompt - ramp) * ramp


def _weights(config: ModelConfig, recipe: Recipe) -> tuple[float, float, float, float]:
    """Weights in integers and in bf16 without the head, then the head's; kept values count as integers."""
    head = "embed" if config.tied_head else "head"
    counts = {(is_head, is_int): 0.0 for is_head in (False, True) for is_int in (False, True)}
    for name, (rows, cols) in config.linear_shapes().items():
        layout = recipe.layout_for(name)
        counts[name == head, layout is None or layout.bits != 16] += rows * cols
    return counts[False, True], counts[False, False], counts[True, True], counts[True, False]


def prompt_flops(config: ModelConfig, start: int, count: int) -> float:
    """Operations for `count` prompt tokens behind `start` others, head left out; a multiply-add is two."""
    rows, cols = config.linear_shapes()["embed" if config.tied_head else "head"]
    linear = 2.0 * (config.linear_weights - rows * cols) * count
    seen = sum(
        _seen_by_prompt(window, start + count) - _seen_by_prompt(window, start) for window in _windows(config)
    )
    return linear + 4.0 * config.num_heads * config.head_dim * seen
