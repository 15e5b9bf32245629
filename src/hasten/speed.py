"""The speed model: what a workload asks of the machine (`cost`), and how fast it should run (`estimate`).

A decode step of a batch of M sequences reads every weight once and each sequence's keys and values once, and
multiplies every weight M times:

    t_read    = (weight bytes + M x KV bytes at the mean context) / (read bandwidth x e_read)
    t_compute = int8 ops / (int8 ceiling x e_linear) + bf16 ops / (bf16 ceiling x e_linear)
                + attention ops / (bf16 ceiling x e_attention)
    decode tok/s = M / (max(t_read, t_compute) + t_step)

A prompt of T tokens costs the same sum of operations over its own counts, and at least one reading of the
weights:

    prefill tok/s = T / (max(t_compute of the prompt, weight bytes / (read bandwidth x e_read)) + t_step)
    ttft = M x T / prefill tok/s: all M prompts arrive at once, and this is when the last of them has its
    first token

The e are fractions of the ceilings that real kernels reach (`Efficiency`).

Limits. It is a prediction, and what it is worth is known once the workload is measured. It knows neither
queueing nor prefix reuse nor speculation; reading and computing are taken to overlap fully,
which flatters batches near the balance point; a model that fits into the last-level cache decodes faster than
it says; and ceilings measured while others use the machine are too low.

Source of the method: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hasten.core import Attention, Estimate, Machine, ModelSpec, Recipe, Workload
from hasten.errors import MachineError, UsageError


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


@dataclass(frozen=True)
class Efficiency:
    """Fractions of the measured ceilings that the engine reaches.

    The defaults are what this project demands of its kernels, not measurements.
    """

    read: float = 0.8
    linear: float = 0.6
    attention: float = 0.3
    step_us: float = 0.0  # a step's fixed cost: dispatch, barriers, sampling

    def __post_init__(self) -> None:
        if min(self.read, self.linear, self.attention) <= 0 or self.step_us < 0:
            raise UsageError(
                f"efficiencies must be above 0, got {self}", hint="leave them out for the defaults"
            )


def estimate(
    config: ModelSpec,
    machine: Machine,
    workload: Workload,
    recipe: Recipe,
    *,
    weight_bytes: int | None = None,
    efficiency: Efficiency | None = None,
    isa: str | None = None,
) -> Estimate:
    """Predict the speed of `workload`: tokens a second over the whole batch, milliseconds to the first token.

    Args:
        config: the model.
        machine: with measured ceilings.
        workload: prompt and output in tokens, sequences at once.
        recipe: layouts of the weights, kind of the KV cache.
        weight_bytes: bytes of linear weights a step reads; None: as the recipe packs them, of a mixture
            those experts that the step's tokens choose.
        efficiency: fractions of the ceilings; None: the defaults of `Efficiency`.
        isa: take this instruction set's ceilings instead of the machine's best.

    Raises:
        MachineError: a ceiling that the prediction needs was not measured.
        UsageError: lengths below one, or a recipe whose bytes only the opened model knows.
    """
    if min(workload.prompt, workload.batch) < 1 or workload.output < 0:
        raise UsageError(
            f"cannot estimate {workload}: prompt and batch start at 1",
            hint="use --prompt 512 --output 128 --batch 1",
        )
    asked = cost(config, workload, recipe, weight_bytes)
    reach = efficiency or Efficiency()
    read = _need(machine.read_gb_per_s, "read bandwidth") * 1e9 * reach.read
    t_read = (asked.weight_bytes + asked.kv_bytes) / read
    t_compute, t_prompt = _compute_seconds(asked, machine, reach, isa)
    fixed = reach.step_us * 1e-6
    prompt_bytes = read_bytes(config, recipe, workload.prompt) if weight_bytes is None else weight_bytes
    prefill_s = max(t_prompt, prompt_bytes / read) + fixed
    return Estimate(
        decode_tok_per_s=workload.batch / (max(t_read, t_compute) + fixed),
        prefill_tok_per_s=workload.prompt / prefill_s,
        ttft_ms=workload.batch * prefill_s * 1e3,
        weight_bytes=asked.weight_bytes,
        bound="memory" if t_read >= t_compute else "compute",
    )


def _compute_seconds(
    asked: Cost, machine: Machine, reach: Efficiency, isa: str | None
) -> tuple[float, float]:
    """Seconds of arithmetic of a decode step and of a prompt."""
    bf16 = _need(_ceiling(machine, "bf16", isa), "bf16 ceiling") * 1e12
    decode = asked.bf16_ops / (bf16 * reach.linear) + asked.attention_ops / (bf16 * reach.attention)
    prompt = asked.prompt_bf16_ops / (bf16 * reach.linear) + asked.prompt_attention_ops / (
        bf16 * reach.attention
    )
    if asked.int8_ops or asked.prompt_int8_ops:
        int8 = _need(_ceiling(machine, "int8", isa), "int8 ceiling") * 1e12 * reach.linear
        decode += asked.int8_ops / int8
        prompt += asked.prompt_int8_ops / int8
    return decode, prompt


def _ceiling(machine: Machine, kind: str, isa: str | None) -> float | None:
    if isa is None:
        return machine.int8_tops if kind == "int8" else machine.bf16_tflops
    found = [c.tera_ops_per_s for c in machine.ceilings if c.isa == isa and c.kind == kind]
    return max(found, default=None)


def _need(value: float | None, name: str) -> float:
    if value is None:
        raise MachineError(
            f"the {name} of this machine is unknown, so nothing can be predicted", hint="run: hasten probe"
        )
    return value
