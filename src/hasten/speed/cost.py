"""Bytes and operations: what a model in a recipe asks of the machine, whatever the machine is.

`Load` is a model as a device sees it: products with their formats, attentions, sizes. It is made once from
ModelSpec and Recipe, no weights needed; `hasten.speed.pace` turns a step over it into seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from hasten.core import READERS, Attention, Format, Machine, ModelSpec, Recipe, Workload
from hasten.errors import UsageError

HEAD = "head"
_GROUP_OF = {name: group for group, names in READERS.items() for name in names}


@dataclass(frozen=True)
class Product:
    """Linear layers that read the same input in one format, computed together, and how many of the same."""

    part: str  # qkv, o, gate_up, down, head, or the layer's own name
    layout: Format | None  # None: the source's values, as yet unknown
    weights: int  # of one such product
    bytes: float  # of one such product, as packed; 0 where the layout is unknown
    inputs: int  # columns
    count: int
    share: float  # of tokens that go through: 1 but for experts

    def read_by(self, tokens: int) -> float:
        """Bytes of all of them that a step of so many tokens reads: experts that some token goes through."""
        return self.bytes * self.count * (1 - (1 - self.share) ** tokens)


@dataclass(frozen=True)
class Load:
    """A model in a recipe as a device sees it."""

    products: tuple[Product, ...]
    mixers: tuple[tuple[Attention, int], ...]  # attentions of each kind, and how many
    layers: int
    width: int  # E
    feed_forward: int  # F of the widest block
    vocab: int  # V
    kv_int8: bool
    integer_products: tuple[Product, ...] = ()  # those of `products` that are multiplied as integers

    @property
    def integers(self) -> bool:
        """Whether some product has integer weights."""
        return bool(self.integer_products)

    def bytes_of(self, tokens: int) -> float:
        """Bytes of linear layers that a step of so many tokens reads, the head included."""
        return sum(product.read_by(tokens) for product in self.products)


def load_of(config: ModelSpec, recipe: Recipe, *, keeps_integers: bool = True) -> Load:
    """What runs when `config` runs in `recipe`.

    Args:
        config: the model.
        recipe: layouts of the weights, kind of the KV cache.
        keeps_integers: values that the recipe keeps as the file has them are integers, not 16-bit floats.
    """
    joined: dict[tuple[str, str, Format | None, float], list[int]] = {}
    for name, (rows, cols) in config.linear_shapes().items():
        layout = recipe.layout_for(name)
        place, _, last = name.rpartition(".")
        part = HEAD if name == config.head_name else _GROUP_OF.get(last, last)
        of = joined.setdefault((place, part, layout, config.share(name)), [0, 0, cols])
        of[0] += rows * cols
        of[1] += 0 if layout is None else layout.bytes_of(rows, cols)
    counted = Counter(
        Product(part, layout, weights, size, cols, 1, share)
        for (_, part, layout, share), (weights, size, cols) in joined.items()
    )
    products = tuple(replace(product, count=count) for product, count in counted.items())
    whole = tuple(p for p in products if (keeps_integers if p.layout is None else p.layout.bits != 16))
    return Load(
        products=products,
        mixers=tuple(Counter(block.mixer for block in config.blocks).items()),
        layers=len(config.blocks),
        width=config.width,
        feed_forward=max((block.feed_forward.width for block in config.blocks), default=0),
        vocab=config.vocab,
        kv_int8=recipe.kv != "bf16",
        integer_products=whole,
    )


def stored_bytes(config: ModelSpec, recipe: Recipe) -> int:
    """Bytes that all matrices take in memory: of every expert, and of the embedding table.

    Raises:
        UsageError: as `read_bytes`.
    """
    shapes = {**config.linear_shapes(), "embed": (config.vocab, config.width)}
    return sum(_layout(recipe, name).bytes_of(*shape) for name, shape in shapes.items())


def _layout(recipe: Recipe, name: str) -> Format:
    layout = recipe.layout_for(name)
    if layout is None:
        raise UsageError(
            f"recipe {recipe.name!r} keeps the file's own layouts: their bytes are known once it is open",
            hint="open the model and pass weight_bytes, or estimate w8, w6, w5 or w4",
        )
    return layout


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
        return self._prompt_fraction(prefill_tok_per_s, workload, machine.int8_tops)

    def gpu_fraction(self, prefill_tok_per_s: float, workload: Workload, machine: Machine) -> float | None:
        """Prefill's rate in linear layers over a GPU's for such weights (`on_gpu`); None if unknown."""
        tera = machine.int8_tops if self.prompt_int8_ops else machine.bf16_tflops
        return None if tera is None else self._prompt_fraction(prefill_tok_per_s, workload, tera)

    def _prompt_fraction(self, prefill_tok_per_s: float, workload: Workload, tera_per_s: float) -> float:
        operations = self.prompt_int8_ops + self.prompt_bf16_ops
        return operations * prefill_tok_per_s / workload.prompt / (tera_per_s * 1e12)


def on_gpu(machine: Machine, is_fp8: bool) -> Machine:
    """The machine with its first measured GPU's ceilings in place of the CPU's; unknown where it has none.

    Weights narrower than 16 bits are multiplied as e4m3 where all of them are, else as bf16.
    """
    read = bf16 = fp8 = None
    for gpu in machine.accelerators[:1]:
        read, bf16, fp8 = gpu.copy_gb_per_s, gpu.bf16_tflops, gpu.fp8_tflops
    narrow = fp8 if is_fp8 and fp8 is not None else bf16
    return replace(
        machine, read_gb_per_s=read, bf16_tflops=bf16, int8_tops=narrow, fp32_tflops=None, ceilings=()
    )


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
        attention_ops=m * attention_ops(config, lambda window: min(window, context)),
        prompt_int8_ops=2.0 * (int8 * prompt + head_int8),
        prompt_bf16_ops=2.0 * (bf16 * prompt + head_bf16),
        prompt_attention_ops=attention_ops(config, lambda window: seen_by_prompt(window, prompt)),
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
    for name in config.linear_shapes():
        _layout(recipe, name)
    return round(load_of(config, recipe).bytes_of(tokens))


def page_bytes(config: ModelSpec, int8: bool, tokens: int) -> int:
    """Bytes of one page of keys and values of all layers that keep some, as native/kv_cache.h lays it out."""
    own = (block.mixer for block in config.blocks if block.mixer.kv_from is None)
    return tokens * sum(kv_token_bytes(mixer, int8) for mixer in own)


def kv_token_bytes(mixer: Attention, int8: bool) -> int:
    """Bytes of a token's key and value of all heads, padded to 32 values; int8 adds a float scale each."""
    dim = -(-mixer.head_dim // 32) * 32
    return 2 * mixer.kv_heads * (dim + 4 if int8 else 2 * dim)


def kv_read_bytes(config: ModelSpec, context: float, int8: bool) -> float:
    """Bytes of keys and values one decoded token reads at `context` tokens, sliding windows respected."""
    mixers = (block.mixer for block in config.blocks)
    return sum(kv_token_bytes(mixer, int8) * min(context, window_of(mixer)) for mixer in mixers)


def window_of(mixer: Attention) -> float:
    """Tokens that one attention may look back on."""
    return float("inf") if mixer.window is None else mixer.window


def attention_ops(config: ModelSpec, seen: Callable[[float], float]) -> float:
    """Operations of attention: two multiply-adds a query, key and dimension; `seen`: window -> keys."""
    mixers = (block.mixer for block in config.blocks)
    return sum(4.0 * mixer.heads * mixer.head_dim * seen(window_of(mixer)) for mixer in mixers)


def seen_by_prompt(window: float, prompt: int) -> float:
    """Keys that all queries of a prompt see together: 1 + 2 + ... up to the window, then the window each."""
    ramp = min(window, prompt)
    return ramp * (ramp + 1) / 2 + (prompt - ramp) * ramp


def _weights(config: ModelSpec, recipe: Recipe, keeps_integers: bool) -> tuple[float, float, float, float]:
    """Weights a token goes through, in integers and in bf16 without the head, then the head's."""
    load = load_of(config, recipe, keeps_integers=keeps_integers)
    counts = {(is_head, is_int): 0.0 for is_head in (False, True) for is_int in (False, True)}
    for product in load.products:
        used = product.weights * product.count * product.share
        counts[product.part == HEAD, product in load.integer_products] += used
    return counts[False, True], counts[False, False], counts[True, True], counts[True, False]


def prompt_flops(config: ModelSpec, start: int, count: int) -> float:
    """Operations for `count` prompt tokens behind `start` others, head left out; a multiply-add is two."""
    linear = 2.0 * (config.weights_read - config.vocab * config.width) * count
    return linear + attention_ops(
        config, lambda window: seen_by_prompt(window, start + count) - seen_by_prompt(window, start)
    )
