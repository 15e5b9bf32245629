"""What fraction of this machine's measured ceilings a speed is.

Decode: every step reads all linear weights once, whatever the batch, and each sequence's keys and values:

    bytes a step = weight bytes + batch x sum over layers of 2 K D b min(context, window)

with K key/value heads of size D, b bytes a value and the mean context of the output tokens, prompt + output
/ 2. Steps a second are decode tok/s over batch; the fraction is bytes a step x steps a second over
`Machine.read_gb_per_s`.

Prefill: 2 operations a weight of every layer for each prompt token; the head runs for the last token alone
and is counted once a prompt. Attention's own operations are left out: they are not int8. The fraction is
operations x prompts a second over `Machine.int8_tops`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.core import Machine, ModelConfig, Workload
from hasten.speed.cost import kv_read_bytes


@dataclass(frozen=True)
class Cost:
    """What a workload asks of the machine."""

    decode_bytes_per_step: float
    prefill_ops: float  # of one prompt
    int8: bool  # the linears multiply int8: the int8 ceiling applies

    def read_fraction(self, decode_tok_per_s: float, workload: Workload, machine: Machine) -> float | None:
        """Decode's read rate over the measured one; None while that is unknown."""
        if machine.read_gb_per_s is None:
            return None
        steps_per_s = decode_tok_per_s / workload.batch
        return self.decode_bytes_per_step * steps_per_s / (machine.read_gb_per_s * 1e9)

    def int8_fraction(self, prefill_tok_per_s: float, workload: Workload, machine: Machine) -> float | None:
        """Prefill's operation rate over the measured int8 one; None if unknown, or for 16-bit weights."""
        if machine.int8_tops is None or not self.int8:
            return None
        prompts_per_s = prefill_tok_per_s / workload.prompt
        return self.prefill_ops * prompts_per_s / (machine.int8_tops * 1e12)


def cost_of(
    config: ModelConfig,
    weight_bytes: int,
    bytes_per_kv_value: float,
    bits_per_weight: float,
    workload: Workload,
) -> Cost:
    """What `workload` costs with this model in this recipe.

    Args:
        weight_bytes: bytes of linear weights one decoded token reads, scales and head included.
        bytes_per_kv_value: 2 for bf16, about 1 for int8 keys and values.
        bits_per_weight: mean over the linears; 16 means none of them is an integer one.
    """
    shapes = config.linear_shapes()
    head_rows, head_columns = shapes["embed" if config.tied_head else "head"]
    head = head_rows * head_columns
    layers = config.linear_weights - head
    context = workload.prompt + workload.output / 2
    return Cost(
        decode_bytes_per_step=weight_bytes
        + workload.batch * kv_read_bytes(config, context, bytes_per_kv_value),
        prefill_ops=2.0 * (layers * workload.prompt + head),
        int8=bits_per_weight < 16,
    )
