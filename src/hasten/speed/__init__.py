"""The speed model: how fast a workload should run by the roofline of this machine.

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

from dataclasses import dataclass

from hasten.core import Estimate, Machine, ModelSpec, Recipe, Workload
from hasten.errors import MachineError, UsageError
from hasten.speed.cost import Cost, cost, read_bytes


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


# The formula that this model takes the place of -----------------------------------------------------------

PRINTED_IN_THE_ARTICLE = 0.0000833  # "s a sample, that is, 83.3 ms"

Dimension = dict[str, int]  # exponents of units, such as {"byte": 1, "second": -1}


@dataclass(frozen=True)
class WorkedExample:
    """The article's example again: `as_written` with its numbers, `as_stated` with ten million parameters."""

    as_written: float
    as_stated: float
    printed: float


def article_speed(p: float, e: float, m: float, r: float, d: float, c: float) -> float:
    """The article's V = P * E / (M + R * D / C): a number without a meaning.

    P is the hardware's compute performance, E the degree of algorithm optimisation, M the model's parameters,
    R the data rate between memory and hardware, D the data preprocessing time and C the effect of the cache.
    These are the right three levers (hardware, algorithms, caching), and this project keeps them. As a
    formula it cannot be used:

    - Its sum adds a number of parameters to a number of bytes (`dimensions`).
    - V is called a speed but read as a time in the worked example.
    - A faster link R makes V smaller, and preprocessing time D counts only by way of R.
    - P = 100 is never given in the example (R's value stands there), and M = 1000 * 10^6 is a hundred times
      the stated ten million parameters.
    - The example prints 0.0000833 s and calls it 83.3 ms; its own expression is 8.0e-8, and 0.0000833 s is
      83.3 microseconds (`worked_example`).
    - Nothing says memory-bound or compute-bound, prefill or decode, batch or context.

    Raises:
        ZeroDivisionError: C is zero, or the sum is.
    """
    return p * e / (m + r * d / c)


def worked_example() -> WorkedExample:
    """Ten million parameters, R = 100 MB/s, E = 0.8, D = 2 s, C = 0.9; R's 100 also stands in P's place."""
    return WorkedExample(
        as_written=article_speed(p=100, e=0.8, m=1000 * 10**6, r=100, d=2, c=0.9),
        as_stated=article_speed(p=100, e=0.8, m=10 * 10**6, r=100, d=2, c=0.9),
        printed=PRINTED_IN_THE_ARTICLE,
    )


def dimensions() -> tuple[Dimension, Dimension]:
    """Units of the two terms the formula adds, M and R * D / C: a sum has a meaning where they are equal.

    R is bytes a second and D seconds, by the article's words; C is a fraction.
    """
    rate, time = {"byte": 1, "second": -1}, {"second": 1}
    product = {unit: rate.get(unit, 0) + time.get(unit, 0) for unit in {**rate, **time}}
    return {"parameter": 1}, {unit: power for unit, power in product.items() if power}
