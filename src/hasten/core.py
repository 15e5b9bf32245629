"""The shared nouns. Frozen dataclasses with units in the names; none needs torch or the native module.

Shape letters, everywhere: `B` sequences, `N` packed tokens, `T` query length, `S` context length, `H` query
heads, `K` KV heads, `D` head size, `E` model width, `F` feed-forward width, `V` vocabulary, `P` pages,
`X` experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from hasten.errors import ModelError
from hasten.recipe import Recipe as Recipe
from hasten.recipe import option
from hasten.weights import Format as Format

SCHEMA_VERSION = 1
"""Version of every JSON document and artifact this program writes."""

NormPlacement = Literal["pre", "post", "sandwich"]
Activation = Literal["silu", "gelu_tanh"]
QkNorm = Literal["none", "head", "full"]
"""None, of each head [D] (Qwen3, Gemma 3), or of all queries and all keys (OLMo 2)."""
Goal = Literal["latency", "throughput", "memory", "cost", "energy"]
Status = Literal["pass", "fail", "insufficient"]


RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long context.

    Source: the `rope_scaling` object of a Hugging Face config.json; the names are its names.
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_context_length: int | None = None  # tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: scales cos and sin; None = derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    short_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]


@dataclass(frozen=True)
class Rotary:
    """How queries and keys turn with their position."""

    dim: int  # leading values of a head that turn, in pairs (i, i + dim / 2)
    theta: float = 10_000.0
    scaling: RopeScaling = field(default_factory=RopeScaling)


@dataclass(frozen=True)
class Attention:
    """One attention: shapes, and what sets it apart."""

    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    mask: Literal["causal", "full"] = "causal"
    window: int | None = None  # tokens a query may look back on, its own included; None: all
    rotary: Rotary | None = None  # None: positions do not turn anything
    qk_norm: QkNorm = "none"
    scale: float | None = None  # scores are q.k * scale; None = head_dim ** -0.5
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: bool = False  # a learned score a head that takes weight and gives nothing
    biases: tuple[str, ...] = ()  # which of q, k, v, o have one
    kv_from: int | None = None  # the layer whose keys and values this one reads; None: its own

    @property
    def score_scale(self) -> float:
        """What q.k is multiplied with before softmax."""
        return self.scale if self.scale is not None else self.head_dim**-0.5

    def linears(self, width: int) -> dict[str, tuple[int, int]]:
        """Linear layers: name -> (rows, columns)."""
        inner, kv = self.heads * self.head_dim, (self.kv_heads * self.head_dim, width)
        own = {"k": kv, "v": kv} if self.kv_from is None else {}
        return {"q": (inner, width), **own, "o": (width, inner)}


@dataclass(frozen=True)
class FeedForward:
    """The position-wise layers: down(act(gate) * up), down(act(up)), or experts of the gated kind."""

    width: int  # F, of one expert where there are experts
    kind: Literal["gated", "plain", "experts"] = "gated"
    activation: Activation = "silu"
    experts: int = 0  # X, those among which is chosen
    chosen: int = 0  # experts that one token goes through
    shared: int = 0  # experts that every token goes through besides
    biases: tuple[str, ...] = ()  # which of gate, up, down have one

    def linears(self, width: int) -> dict[str, tuple[int, int]]:
        """Linear layers: name -> (rows, columns); an expert's are `experts.{x}.gate`, `shared.{x}.up` ..."""
        up, down = (self.width, width), (width, self.width)
        if self.kind == "plain":
            return {"up": up, "down": down}
        gated = {"gate": up, "up": up, "down": down}
        if self.kind == "gated":
            return gated
        names = [f"experts.{x}." for x in range(self.experts)] + [f"shared.{x}." for x in range(self.shared)]
        inside = {name + part: shape for name in names for part, shape in gated.items()}
        return {"router": (self.experts, width), **inside}


Group = Literal["qkv", "o", "gate_up", "down"]
READERS: Mapping[Group, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)
}  # fmt: skip
"""Linear layers of a block that read the same input, in the order they are computed: engines fuse them."""


@dataclass(frozen=True)
class Norms:
    """Where the norms of a block stand, and which they are."""

    placement: NormPlacement = "pre"
    eps: float = 1e-6
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True)
class Block:
    """One layer of a model: x + mixer(x), perhaps cross attention to an encoder, then x + feed_forward(x)."""

    mixer: Attention
    feed_forward: FeedForward
    norms: Norms = field(default_factory=Norms)
    cross: Attention | None = None

    def linears(self, width: int) -> dict[str, tuple[int, int]]:
        """The block's linear layers: name -> (rows, columns), in the order they are computed.

        This is the one place that names them. Cross attention's are `cross.q` and so on.
        """
        cross = {} if self.cross is None else self.cross.linears(width)
        return {
            **self.mixer.linears(width),
            **{f"cross.{name}": shape for name, shape in cross.items()},
            **self.feed_forward.linears(width),
        }

    @property
    def biases(self) -> tuple[str, ...]:
        """The linear layers that have a bias, by name."""
        cross = () if self.cross is None else tuple(f"cross.{name}" for name in self.cross.biases)
        return (*self.mixer.biases, *cross, *self.feed_forward.biases)

    def with_biases(self, names: Iterable[str]) -> Block:
        """The same block where these of its linear layers have a bias, and no others."""
        wanted = set(names)
        mixer, ways = (tuple(name for name in part.linears(1) if name in wanted)
                       for part in (self.mixer, self.feed_forward))  # fmt: skip
        return dataclasses.replace(
            self,
            mixer=dataclasses.replace(self.mixer, biases=mixer),
            feed_forward=dataclasses.replace(self.feed_forward, biases=ways),
        )

    def vectors(self, width: int) -> dict[str, int]:
        """Norms and biases: name -> length."""
        found: dict[str, int] = {}
        if self.norms.placement in ("pre", "sandwich"):
            found |= {"attn_norm": width, "mlp_norm": width}
        if self.norms.placement in ("post", "sandwich"):
            found |= {"post_attn_norm": width, "post_mlp_norm": width}
        mixer = self.mixer
        if mixer.qk_norm != "none":
            is_full = mixer.qk_norm == "full"
            found["q_norm"] = (mixer.heads if is_full else 1) * mixer.head_dim
            found["k_norm"] = (mixer.kv_heads if is_full else 1) * mixer.head_dim
        if mixer.sinks:
            found["sinks"] = mixer.heads
        shapes = self.linears(width)
        return found | {f"{name}.bias": shapes[name][0] for name in self.biases}


@dataclass(frozen=True)
class Embedding:
    """Token ids to rows of the table, times `scale`."""

    scale: float = 1.0


@dataclass(frozen=True)
class Head:
    """What the last hidden state becomes. `tied`: the embedding table is the head's matrix."""

    kind: Literal["tokens", "classes", "hidden"] = "tokens"
    tied: bool = False
    softcap: float | None = None


@dataclass(frozen=True)
class Norm:
    """One norm over the width of a model."""

    eps: float = 1e-6
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True)
class ModelSpec:
    """A model as a tree: what every layer computes and its sizes. Consecutive equal blocks are one object.

    Family files (models/families/) make it out of a config.json or GGUF metadata; everything else (engines,
    cost, compression, export) walks it. `dense` names what a part of the program cannot run.
    """

    architecture: str  # the family's name: "llama", "qwen3" ...
    vocab: int  # V, rows of the embedding table
    width: int  # E
    context: int  # tokens it was made for
    blocks: tuple[Block, ...]
    embedding: Embedding = field(default_factory=Embedding)
    final_norm: Norm = field(default_factory=Norm)
    head: Head = field(default_factory=Head)
    encoder: ModelSpec | None = None
    front_end: str | None = None  # what turns sound or images into rows of the encoder's input
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        blocks = list(self.blocks)
        for i in range(1, len(blocks)):
            if blocks[i] == blocks[i - 1]:
                blocks[i] = blocks[i - 1]
        object.__setattr__(self, "blocks", tuple(blocks))

    def with_blocks(self, change: Callable[[Block], Block]) -> ModelSpec:
        """The same model with every block changed."""
        return dataclasses.replace(self, blocks=tuple(change(block) for block in self.blocks))

    @property
    def head_name(self) -> str:
        """The canonical name of the head's matrix."""
        return "embed" if self.head.tied else "head"

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Every linear layer by canonical name -> (rows, columns), the head included: what is stored."""
        shapes = {
            f"layers.{i}.{name}": shape
            for i, block in enumerate(self.blocks)
            for name, shape in block.linears(self.width).items()
        }
        return {**shapes, self.head_name: (self.vocab, self.width)}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by canonical name: linear layers [rows, cols], embedding [V, E], others [rows]."""
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab, self.width), **self.linear_shapes()}
        for i, block in enumerate(self.blocks):
            shapes |= {f"layers.{i}.{name}": (n,) for name, n in block.vectors(self.width).items()}
        shapes["final_norm"] = (self.width,)
        return shapes

    def share(self, name: str) -> float:
        """The share of tokens that go through a linear layer: 1 but for experts, which get even shares."""
        _, _, part = name.partition(".experts.")
        if not part:
            return 1.0
        ways = self.blocks[int(name.split(".")[1])].feed_forward
        return ways.chosen / ways.experts

    @property
    def weights_stored(self) -> int:
        """Weights of all linear layers, of every expert, the head included and the embedding table not."""
        return sum(rows * cols for rows, cols in self.linear_shapes().values())

    @cached_property
    def weights_read(self) -> int:
        """Weights read for one decoded token: of experts, those that the token goes through."""
        shapes = self.linear_shapes().items()
        return round(sum(rows * cols * self.share(name) for name, (rows, cols) in shapes))


def dense(spec: ModelSpec, part: str) -> ModelSpec:
    """The model, where it is a dense causal decoder whose blocks differ in windows and rotation alone.

    Args:
        part: what runs such models only; errors name it.

    Raises:
        ModelError: the model is of another kind; what it has is named.
    """
    found = next(_beyond_dense(spec), None)
    if found is not None:
        raise ModelError(
            f"{part} does not run {found}, which this {spec.architecture} model has",
            hint="dense causal decoders are supported: Llama, Mistral, Qwen, Gemma, Phi, SmolLM, OLMo",
        )
    return spec


def _beyond_dense(spec: ModelSpec) -> Iterator[str]:
    """What a model has that a dense causal decoder of like blocks has not."""
    if spec.encoder is not None or spec.front_end is not None:
        yield "an encoder"
    if spec.head.kind != "tokens":
        yield f"a head of {spec.head.kind}"
    if spec.final_norm.kind != "rms":
        yield "layer norms"
    plain = [dataclasses.replace(b, mixer=dataclasses.replace(b.mixer, window=None, rotary=None))
             for b in dict.fromkeys(spec.blocks)]  # fmt: skip
    for block in plain:
        mixer, ways = block.mixer, block.feed_forward
        for is_there, name in (
            (block.cross is not None, "cross attention"),
            (mixer.mask != "causal", "attention without a causal mask"),
            (mixer.sinks, "attention sinks"),
            (mixer.kv_from is not None, "layers that share keys and values"),
            (ways.kind == "experts", "a mixture of experts"),
            (ways.kind == "plain", "feed-forward layers without a gate"),
            (block.norms.kind != "rms", "layer norms"),
            (block.norms.eps != spec.final_norm.eps, "norms with another epsilon than the final norm's"),
            (block != plain[0], "blocks of different shapes"),
        ):
            if is_there:
                yield name
    mixers = [block.mixer for block in dict.fromkeys(spec.blocks)]
    if len({mixer.window for mixer in mixers} - {None}) > 1:
        yield "windows of different lengths"
    turns, local = ({m.rotary for m in mixers if m.rotary and (m.window is not None) == has_window}
                    for has_window in (False, True))  # fmt: skip
    if len(turns) > 1 or len(local) > 1:
        yield "more than two kinds of rotation"
    if len({rotary.dim for rotary in turns | local}) > 1:
        yield "layers that turn different numbers of dimensions"
    if turns and any(rotary.scaling.kind != "default" for rotary in local - turns):
        yield "a scaled rotation of layers with a window"


@dataclass(frozen=True)
class EngineOptions:
    """How the engine runs a model on this machine."""

    threads: int | None = option(None, "threads to use; default: one a core, as far as CPU quotas allow")
    context: int | None = option(
        None, "longest prompt plus output, tokens; default: the model's own, less where memory is short"
    )
    max_sequences: int = option(16, "sequences that may decode together")
    prefill_chunk: int = option(512, "prompt tokens computed in one step")
    kv_gb: float | None = option(
        None,
        "most memory for keys and values, GB; "
        "default: max_sequences full contexts (on a GPU: of 8192 tokens), less where memory is short",
    )
    gpu_memory: str | float | None = option(
        None,
        "most memory of the GPU for weights, keys and values and what steps compute with: GiB, "
        "such as 20GiB or 20, or a share, such as 0.9; default: what is free",
    )
    device: str = option(
        "cpu",
        "what computes: cpu, cuda, auto (a GPU that runs the model), reference (NumPy, slow), "
        "or torch (the GPU engine's plain twin on a CPU, slow)",
    )
    tensor_parallel: int = option(1, "GPUs that compute one model together, each a share of every layer")


CachePolicy = Literal["lru", "lfu", "s3fifo", "cost"]


@dataclass(frozen=True)
class ServingOptions:
    """How the engine shares a model among many requests."""

    prefix_cache: bool = option(True, "keep computed prompts and reuse them where another begins the same")
    cache_policy: CachePolicy = option("lru", "which cached page goes first: lru, lfu, s3fifo or cost")
    kv_disk: Path | None = option(None, "folder that keeps computed prompts over restarts; default: none")
    kv_disk_gb: float = option(8.0, "most that folder may hold, GB")
    speculate: bool = option(True, "draft tokens from what was said before; never changes an answer")
    max_waiting: int = option(256, "requests that may wait; one more is refused at once")


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine: lengths in tokens, `batch` sequences at once."""

    prompt: int = 512
    output: int = 128
    batch: int = 1
    shared: int = 0  # of the prompt: what all prompts begin with, its keys and values are there already


@dataclass(frozen=True)
class Budget:
    """What may be given up: the quality limit of docs/concepts.md."""

    max_ppl_increase: float = 0.01  # 0.01 = +1 %
    max_kl: float | None = None  # mean KL divergence from the source, nats; None: any
    min_tasks: tuple[tuple[str, float], ...] | None = None  # task, least share of right answers


@dataclass(frozen=True)
class Stat:
    """Several runs of one figure."""

    median: float
    p10: float
    p90: float
    n: int
    values: tuple[float, ...] = ()  # of the runs, in the order they were taken; empty: they were not kept

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # a record read back has a list


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
class Accelerator:
    """A GPU, and what torch measures on it: the best of some rounds. None is unknown."""

    name: str
    memory_bytes: int
    capability: str  # "9.0"
    copy_gb_per_s: float  # of its memory, bytes read and written
    bf16_tflops: float  # matrix products of 8192 x 8192 x 8192
    fp8_tflops: float | None  # the same in e4m3 with a scale a row; None: it has no such instructions
    to_device_gb_per_s: float  # from pinned memory of the host
    from_device_gb_per_s: float
    launch_us: float  # of one of many small kernels, launched one by one
    round_trip_us: float  # launch one and wait for it


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
    accelerators: tuple[Accelerator, ...] = ()  # GPUs that were measured
    cores_because: str = ""  # why `cores` is less than the processors this process may run on


GAP_SHARES = (0.0, *(n / 20 for n in range(1, 20)), 0.99, 1.0)
"""Where `Measurement.gaps_ms` is taken: the least wait, every twentieth, the 99th percentile, the longest."""


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
    device: str = "cpu"  # what computed
    fraction_of_gpu_ceiling: float | None = None  # prefill's linear layers, of the GPU's bf16 or fp8 rate
    gaps_ms: tuple[float, ...] = ()  # from a sequence's token to its next, at GAP_SHARES of all such waits
    decode_bytes: float | None = None  # that a step of the whole batch reads: weights, keys and values
    decode_ops: float | None = None  # of that step; a multiply-add is two
    prompt_bytes: float | None = None  # of weights, for one prompt, each read once
    prompt_ops: float | None = None
    joules_per_token: float | None = None  # of processor and GPUs while they answered; None: not readable


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
    kl_mean_low: float | None = None  # bootstrap 95 % interval; None: of an older version
    kl_mean_high: float | None = None
    ppl_detectable: float | None = None  # smallest rise beyond the budget that 9 of 10 such texts show
    task_shares: Mapping[str, float | None] | None = None  # of right answers, where tasks were asked for
    missed: str = ""  # the task whose share was not surely reached, in words


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
