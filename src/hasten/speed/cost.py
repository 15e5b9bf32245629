"""What a workload asks of the machine: bytes to read and operations to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hasten.core import Attention, Machine, ModelSpec, Recipe, Workload
from hasten.errors import UsageError


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one decode step of the whole batch and of one prompt; a multiply-add is two."""

    weight_bytes: int  # linear layers a decode step reads, head included; of experts, those that are chosen
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
        weight_bytes: of linear weights a step reads, of a mixture too; None: as the recipe packs them.
        keeps_integers: values that the recipe keeps as the file has them are integers, not 16-bit floats.

    Raises:
        UsageError: the recipe keeps the source's values and `weight_bytes` is not given.
    """
    m, prompt = workload.batch, workload.prompt
    int8, bf16, head_int8, head_bf16 = _weights(config, recipe, keeps_integers)
    context = prompt + workload.output / 2
    kv = kv_read_bytes(config, context, recipe.kv != "bf16")
    return Cost(
        weight_bytes=read_bytes(config, recipe, m) if weight_bytes is None else weight_bytes,
        kv_bytes=m * kv,
        int8_ops=2.0 * m * (int8 + head_int8),
        bf16_ops=2.0 * m * (bf16 + head_bf16),
        attention_ops=m * _attention_ops(config, lambda window: min(window, context)),
        prompt_int8_ops=2.0 * (int8 * prompt + head_int8),
        prompt_bf16_ops=2.0 * (bf16 * prompt + head_bf16),
        prompt_attention_ops=_attention_ops(config, lambda window: _seen_by_prompt(window, prompt)),
    )


def read_bytes(config: ModelSpec, recipe: Recipe, tokens: int) -> int:
    """Bytes of linear layers that one step reads, as native/layout.h packs them, padding included.

    An expert is read where one of the step's tokens goes through it: the mean over tokens that choose evenly
    and apart from each other.

    Args:
        config: the model.
        recipe: layouts of the weights.
        tokens: computed in the step.

    Raises:
        UsageError: the recipe keeps the source's values, so only the opened file knows.
    """
    total = 0.0
    for name, shape in config.linear_shapes().items():
        layout = recipe.layout_for(name)
        if layout is None:
            raise UsageError(
                f"recipe {recipe.name!r} keeps the file's own layouts: their bytes are known once it is open",
                hint="open the model and pass weight_bytes, or estimate w8, w6, w5 or w4",
            )
        total += layout.bytes_of(*shape) * (1 - (1 - config.share(name)) ** tokens)
    return round(total)


def page_bytes(config: ModelSpec, int8: bool, tokens: int) -> int:
    """Bytes of one page of keys and values of all layers that keep some, as native/kv_cache.h lays it out."""
    own = (block.mixer for block in config.blocks if block.mixer.kv_from is None)
    return tokens * sum(_kv_bytes(mixer, int8) for mixer in own)


def _kv_bytes(mixer: Attention, int8: bool) -> int:
    """Bytes of a token's key and value of all heads, padded to 32 values; int8 adds a float scale each."""
    dim = -(-mixer.head_dim // 32) * 32
    return 2 * mixer.kv_heads * (dim + 4 if int8 else 2 * dim)


def kv_read_bytes(config: ModelSpec, context: float, int8: bool) -> float:
    """Bytes of keys and values one decoded token reads at `context` tokens, sliding windows respected."""
    mixers = (block.mixer for block in config.blocks)
    return sum(_kv_bytes(mixer, int8) * min(context, _window(mixer)) for mixer in mixers)


def _window(mixer: Attention) -> float:
    """Tokens that one attention may look back on."""
    return float("inf") if mixer.window is None else mixer.window


def _attention_ops(config: ModelSpec, seen: Callable[[float], float]) -> float:
    """Operations of attention: two multiply-adds a query, key and dimension; `seen`: window -> keys."""
    mixers = (block.mixer for block in config.blocks)
    return sum(4.0 * mixer.heads * mixer.head_dim * seen(_window(mixer)) for mixer in mixers)


def _seen_by_prompt(window: float, prompt: int) -> float:
    """Keys that all queries of a prompt see together: 1 + 2 + ... up to the window, then the window each."""
    ramp = min(window, prompt)
    return ramp * (ramp + 1) / 2 + (prompt - ramp) * ramp


def _weights(config: ModelSpec, recipe: Recipe, keeps_integers: bool) -> tuple[float, float, float, float]:
    """Weights a token goes through, in integers and in bf16 without the head, then the head's."""
    counts = {(is_head, is_int): 0.0 for is_head in (False, True) for is_int in (False, True)}
    for name, (rows, cols) in config.linear_shapes().items():
        layout = recipe.layout_for(name)
        is_int = keeps_integers if layout is None else layout.bits != 16
        counts[name == config.head_name, is_int] += rows * cols * config.share(name)
    return counts[False, True], counts[False, False], counts[True, True], counts[True, False]


def prompt_flops(config: ModelSpec, start: int, count: int) -> float:
    """Operations for `count` prompt tokens behind `start` others, head left out; a multiply-add is two."""
    linear = 2.0 * (config.weights_read - config.vocab * config.width) * count
    return linear + _attention_ops(
        config, lambda window: _seen_by_prompt(window, start + count) - _seen_by_prompt(window, start)
    )
