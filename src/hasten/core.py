"""The shared nouns. Frozen dataclasses with units in the names; none needs torch or the native module.

Shape letters, everywhere: `B` sequences, `N` packed tokens, `T` query length, `S` context length, `H` query
heads, `K` KV heads, `D` head size, `E` model width, `F` feed-forward width, `V` vocabulary, `P` pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hasten.recipe import Recipe as Recipe
from hasten.rope_scaling import RopeScaling
from hasten.weights.formats import Format as Format

SCHEMA_VERSION = 1
"""Version of every JSON document and artifact this program writes."""

NormPlacement = Literal["pre", "post", "sandwich"]
Activation = Literal["silu", "gelu_tanh"]
Goal = Literal["latency", "throughput", "memory"]
Status = Literal["pass", "fail", "insufficient"]


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder, its variation points as data.

    One decoder runs all of Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text), Phi-3, SmolLM and OLMo 2; they
    differ only in these fields and in which tensors exist (biases, qk-norms).
    """

    architecture: str  # "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2"
    vocab_size: int  # V
    hidden_size: int  # E
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    context_length: int  # tokens
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    norm_placement: NormPlacement = "pre"
    qk_norm: Literal["none", "head", "full"] = (
        "none"  # per head [D] (Qwen3, Gemma 3), or all of q, k (OLMo 2)
    )
    rotary_dim: int | None = None  # None = head_dim; Phi-3's partial_rotary_factor makes it smaller
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_local_theta: float | None = None  # Gemma 3: theta of the sliding layers, which are never scaled
    rope_layers: tuple[bool, ...] = ()  # SmolLM3: False = no rotary embedding in that layer; empty = all True
    sliding_window: int | None = None  # tokens a sliding layer may look back on, itself included
    sliding_layers: tuple[bool, ...] = ()  # one flag a layer; empty = no layer slides
    query_scale: float | None = None  # attention scores are q.k * query_scale; None = head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0  # Gemma: sqrt(E), rounded to bf16 as the original does
    tied_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def score_scale(self) -> float:
        """What q.k is multiplied with before softmax."""
        return self.query_scale if self.query_scale is not None else self.head_dim**-0.5

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer read for one token, by canonical name -> (rows, columns), the head included."""
        e, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        shapes: dict[str, tuple[int, int]] = {}
        for i in range(self.num_layers):
            p = f"layers.{i}."
            shapes[p + "q"] = (self.num_heads * d, e)
            shapes[p + "k"] = (self.num_kv_heads * d, e)
            shapes[p + "v"] = (self.num_kv_heads * d, e)
            shapes[p + "o"] = (e, self.num_heads * d)
            shapes[p + "gate"] = (f, e)
            shapes[p + "up"] = (f, e)
            shapes[p + "down"] = (e, f)
        shapes["embed" if self.tied_head else "head"] = (self.vocab_size, e)
        return shapes

    @property
    def linear_weights(self) -> int:
        """Weights read for one decoded token (head included, embedding row not)."""
        return sum(rows * cols for rows, cols in self.linear_shapes().values())

    @property
    def flops_per_token(self) -> int:
        """Multiply-adds x 2 of all linear layers for one token, head included; attention is not."""
        return 2 * self.linear_weights

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> int:
        """KV cache bytes one token of context costs over all layers."""
        return int(2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value)


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs a model on this machine."""

    threads: int | None = field(
        default=None, metadata={"help": "threads to use; default: one a core, as far as CPU quotas allow"}
    )
    context: int | None = field(
        default=None,
        metadata={
            "help": "longest prompt plus output, tokens; default: the model's, at most 8192, "
            "less where memory is short"
        },
    )
    max_sequences: int = field(default=16, metadata={"help": "sequences that may decode together"})
    prefill_chunk: int = field(default=512, metadata={"help": "prompt tokens computed in one step"})
    kv_gb: float | None = field(
        default=None,
        metadata={
            "help": "most memory for keys and values, GB; "
            "default: max_sequences full contexts, less where memory is short"
        },
    )


CachePolicy = Literal["lru", "lfu", "s3fifo", "cost"]


@dataclass(frozen=True)
class ServingOptions:
    """How the engine shares a model among many requests."""

    prefix_cache: bool = field(
        default=True, metadata={"help": "keep computed prompts and reuse them where another begins the same"}
    )
    cache_policy: CachePolicy = field(
        default="lru", metadata={"help": "which cached page goes first: lru, lfu, s3fifo or cost"}
    )
    kv_disk: Path | None = field(
        default=None, metadata={"help": "folder that keeps computed prompts over restarts; default: none"}
    )
    kv_disk_gb: float = field(default=8.0, metadata={"help": "most that folder may hold, GB"})
    speculate: bool = field(
        default=True, metadata={"help": "draft tokens from what was said before; never changes an answer"}
    )
    max_waiting: int = field(
        default=256, metadata={"help": "requests that may wait; one more is refused at once"}
    )


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine: lengths in tokens, `batch` sequences at once."""

    prompt: int = 512
    output: int = 128
    batch: int = 1


@dataclass(frozen=True)
class Budget:
    """What may be given up: the quality limit of docs/concepts.md."""

    max_ppl_increase: float = 0.01  # 0.01 = +1 %


@dataclass(frozen=True)
class Stat:
    """Several runs of one figure."""

    median: float
    p10: float
    p90: float
    n: int


@dataclass(frozen=True)
class CacheLevel:
    """One cache of the processor, as the system describes it."""

    level: int
    kind: str  # "data", "instruction" or "unified"
    bytes: int
    shared_by: int  # logical processors


@dataclass(frozen=True)
class Ceiling:
    """How fast one instruction set multiplies and adds, all threads at work; a multiply-add counts as two."""

    isa: str
    kind: Literal["int8", "bf16", "fp32"]
    tera_ops_per_s: float  # the best round: what the machine can do when nobody is in the way
    rounds: Stat  # all rounds, 1e12 operations a second


@dataclass(frozen=True)
class Machine:
    """What is here and what it measures. None is unknown, never guessed."""

    cpu: str
    isa: tuple[str, ...]  # instruction sets the native engine has here, best last
    cores: int  # threads worth starting: hasten.machine.cores
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    memory_bytes: int | None
    read_gb_per_s: float | None = None  # measured, all threads
    int8_tops: float | None = None
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    gpus: tuple[str, ...] = ()
    os: str = ""
    python: str = ""
    caches: tuple[CacheLevel, ...] = ()
    memory_limit_bytes: int | None = None  # what the control group allows; None = no limit known
    read_rounds: Stat | None = None  # GB/s of all rounds; read_gb_per_s is the best one
    read_buffer_bytes: int | None = None  # read in each round
    ceilings: tuple[Ceiling, ...] = ()  # every instruction set's; int8_tops and its like are the best of them
    cores_because: str = ""  # why `cores` is less than the processors this process may run on


@dataclass(frozen=True)
class Measurement:
    """One engine's speed on one workload of this machine."""

    engine: str  # "hasten", "llama.cpp", ...
    version: str
    format: str  # recipe or the peer's own name for its weights
    weight_bytes: int | None
    prefill_tok_per_s: Stat
    decode_tok_per_s: Stat
    ttft_ms: Stat
    tpot_ms: Stat
    peak_rss_bytes: int | None
    workload: Workload = field(default_factory=Workload)
    threads: int = 1
    fraction_of_read_ceiling: float | None = None
    fraction_of_int8_ceiling: float | None = None
    disturbed_rounds: int = 0  # rounds that other work slowed down and that were taken again


@dataclass(frozen=True)
class Verdict:
    """What a recipe costs in quality: against the source in bf16, same engine and text (docs/concepts.md)."""

    status: Status
    ppl: float
    ppl_source: float
    ppl_increase: float  # 0.01 = +1 %
    ppl_increase_low: float  # bootstrap 95 % interval, paired
    ppl_increase_high: float
    kl_mean: float  # nats
    kl_p99: float  # nats
    top1_agreement: float  # 0..1
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """A prediction of the speed model, labelled as one."""

    decode_tok_per_s: float
    prefill_tok_per_s: float
    ttft_ms: float
    weight_bytes: int
    bound: Literal["memory", "compute"]


@dataclass(frozen=True)
class Plan:
    """A recipe with everything that speaks for it."""

    model: str
    recipe: Recipe
    options: EngineOptions
    measurement: Measurement | None
    verdict: Verdict | None
    estimate: Estimate | None
    because: tuple[str, ...]  # one reason for every automatic choice


def as_json(value: Any) -> Any:
    """Plain JSON values of any noun here: dataclasses to dicts, tuples to lists, formats to names."""
    if isinstance(value, Format):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(v) for v in value]
    return value
