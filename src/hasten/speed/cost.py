"""What a workload asks of the machine: bytes to read and operations to do."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.core import Machine, ModelSpec, Recipe, Workload
from hasten.errors import UsageError


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

    def read_fraction(self, decode_tok_per_s: float, workload: Workload, machine: Machine) -> float | None:
        """Decode's read rate over the measured one; None while that is unknown."""
        if machine.read_gb_per_s is None:
            return None
        steps_per_s = decode_tok_per_s / workload.batch
        return (self.weight_bytes + self.kv_bytes) * steps_per_s / (machine.read_gb_per_s * 1e9)

    def int8_fraction(self, prefill_tok_per_s: float, workload: Workload, machine: Machine) -> float | None:
        """Prefill's rate in linear layers over the measured int8 one; None if unknown, or without integers.

        Attention's own operations are left out: they are not int8.
        """
        if machine.int8_tops is None or not self.prompt_int8_ops:
            return None
        operations = self.prompt_int8_ops + self.prompt_bf16_ops
        return operations * prefill_tok_per_s / workload.prompt / (machine.int8_tops * 1e12)


def cost(
    config: ModelSpec,
    workload: Workload,
    recipe: Recipe,
    weight_bytes: int | None = None,
    *,
    keeps_integers: bool = True,
) -> Cost:
    """What `workload` costs with this model in this recipe.

    The mean context while decoding is prompt + output / 2. The head runs once a prompt. The embedding rows
    read, norms, rotary angles, softmax and the keys and values written are left out: little beside the
    weights of a model of 100M or more.

    Args:
        config: the model.
        workload: prompt and output in tokens, sequences at once.
        recipe: layouts of the weights, kind of the KV cache.
        weight_bytes: of linear weights one decoded token reads; None: as the recipe packs them.
        keeps_integers: values that the recipe keeps as the file has them are integers, not 16-bit floats.

    Raises:
        UsageError: the recipe keeps the source's values and `weight_bytes` is not given.
    """
    m, prompt = workload.batch, workload.prompt
    int8, bf16, head_int8, head_bf16 = _weights(config, recipe, keeps_integers)
    context = prompt + workload.output / 2
    kv = kv_read_bytes(config, context, recipe.kv != "bf16")
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


def recipe_bytes(config: ModelSpec, recipe: Recipe) -> int:
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
        total += layout.bytes_of(*shape)
    return total


def page_bytes(config: ModelSpec, int8: bool, tokens: int) -> int:
    """Bytes of one page of keys and values of all layers, as native/kv_cache.h lays it out."""
    return 2 * config.num_layers * config.num_kv_heads * tokens * _head_bytes(config, int8)


def _head_bytes(config: ModelSpec, int8: bool) -> int:
    """Bytes of a token's key or value of one head: padded to 32 values; int8 has a float scale beside it."""
    dim = -(-config.head_dim // 32) * 32
    return dim + 4 if int8 else 2 * dim


def kv_read_bytes(config: ModelSpec, context: float, int8: bool) -> float:
    """Bytes of keys and values one decoded token reads at `context` tokens, sliding windows respected."""
    return 2.0 * config.num_kv_heads * _head_bytes(config, int8) * sum(_seen(config, context))


def _windows(config: ModelSpec) -> list[float]:
    """Tokens each layer may look back on."""
    sliding = config.sliding_layers or (False,) * config.num_layers
    window = config.sliding_window
    return [float(window) if slides and window else float("inf") for slides in sliding]


def _seen(config: ModelSpec, context: float) -> list[float]:
    return [min(context, window) for window in _windows(config)]


def _seen_by_prompt(window: float, prompt: int) -> float:
    """Keys that all queries of a prompt see together: 1 + 2 + ... up to the window, then the window each."""
    ramp = min(window, prompt)
    return ramp * (ramp + 1) / 2 + (prompt - ramp) * ramp


def _weights(config: ModelSpec, recipe: Recipe, keeps_integers: bool) -> tuple[float, float, float, float]:
    """Weights in integers and in bf16 without the head, then the head's."""
    head = "embed" if config.tied_head else "head"
    counts = {(is_head, is_int): 0.0 for is_head in (False, True) for is_int in (False, True)}
    for name, (rows, cols) in config.linear_shapes().items():
        layout = recipe.layout_for(name)
        counts[name == head, keeps_integers if layout is None else layout.bits != 16] += rows * cols
    return counts[False, True], counts[False, False], counts[True, True], counts[True, False]


def prompt_flops(config: ModelSpec, start: int, count: int) -> float:
    """Operations for `count` prompt tokens behind `start` others, head left out; a multiply-add is two."""
    rows, cols = config.linear_shapes()["embed" if config.tied_head else "head"]
    linear = 2.0 * (config.linear_weights - rows * cols) * count
    seen = sum(
        _seen_by_prompt(window, start + count) - _seen_by_prompt(window, start) for window in _windows(config)
    )
    return linear + 4.0 * config.num_heads * config.head_dim * seen
