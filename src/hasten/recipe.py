"""What happens to a model: widths by layer, the method that finds them, what is taken out first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from hasten.errors import UsageError
from hasten.weights import FORMATS, TABLE_NAMES, Format


def option(default: Any, help: str) -> Any:
    """A dataclass field with what its flag says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class MethodEntry:
    """What is known of a method before its file is loaded, which takes torch."""

    place: str  # "module:Class", an implementation of `hasten.compress.quantise.Method`
    help: str
    reads: Literal["", "moments", "states"] = ""
    """Of the calibration text: nothing; second moments of what each layer reads in the source, kept on disk;
    or the hidden states of the source and of what is quantised, layer after layer."""
    head_bits: int = 0  # at least, for the head, where a recipe's name gives it none


@dataclass(frozen=True)
class PruneEntry:
    """What is known of a kind of pruning before its file is loaded, which takes torch."""

    place: str  # "module:Class", an implementation of `hasten.compress.prune.Pruner`
    help: str  # what goes
    takes: Literal["weights", "channels", "width", "layers", "words"]
    """Single weights, which become zeros; inputs of matrices; hidden dimensions; whole layers; tokens."""
    blind: bool = False  # chooses without text: reads it to repair alone


_QUANTISE, _PRUNE = "hasten.compress.quantise", "hasten.compress.prune"
METHODS = {
    "rtn": MethodEntry(f"{_QUANTISE}:Nearest", "to the nearest, scales searched for the least squared error"),
    "hqq": MethodEntry(
        f"{_QUANTISE}.hqq:Hqq",
        "scales and minimums found with a loss that gives outliers little weight (HQQ)",
    ),
    "awq": MethodEntry(
        f"{_QUANTISE}.gptq:Awq",
        "important channels are scaled up, the layer before them is scaled down by the same factors, large "
        "values are clipped (AWQ)",
        reads="moments",
    ),
    "gptq": MethodEntry(
        f"{_QUANTISE}.gptq:Gptq",
        "one column after another; columns that are not rounded yet compensate the error (GPTQ)",
        reads="moments",
    ),
    "awq-gptq": MethodEntry(
        f"{_QUANTISE}.gptq:AwqGptq", "scaled by the first, rounded by the second", reads="moments"
    ),
    "best": MethodEntry(
        f"{_QUANTISE}.gptq:Best", "what measured best at 4 bits", reads="states", head_bits=8
    ),
}
"""How integers are found. A new one is a file with a class that implements `Method`, and a line here."""

PRUNINGS = {
    "magnitude": PruneEntry(
        f"{_PRUNE}.single_weights:Magnitude", "the smallest weights", "weights", blind=True
    ),
    "wanda": PruneEntry(
        f"{_PRUNE}.single_weights:Wanda",
        "weights whose product with the size of their input is smallest (Wanda)",
        "weights",
    ),
    "sparsegpt": PruneEntry(
        f"{_PRUNE}.single_weights:SparseGpt",
        "weights whose removal the other weights can compensate best (SparseGPT)",
        "weights",
    ),
    "ffn": PruneEntry(f"{_PRUNE}.layers:Channels", "feed-forward channels", "channels"),
    "heads": PruneEntry(
        f"{_PRUNE}.layers:Heads", "attention heads, the same number in each layer", "channels"
    ),
    "layers": PruneEntry(
        f"{_PRUNE}.layers:Layers", "the layers that change the hidden states least", "layers"
    ),
    "width": PruneEntry(f"{_PRUNE}.width:Width", "hidden dimensions", "width"),
    "vocabulary": PruneEntry(f"{_PRUNE}.vocabulary:Words", "words that the text does not use", "words"),
}
"""What can be taken out. A new one is a file with a class that implements `Pruner`, and a line here."""

DistilLoss = Literal["forward", "reverse", "skewed"]


class Shaped(Protocol):
    """What a recipe asks of a ModelSpec."""

    def linear_shapes(self) -> dict[str, tuple[int, int]]: ...


@dataclass(frozen=True)
class Pruning:
    """One kind of weights to take out: single ones become zeros, all else makes a smaller dense model."""

    kind: str = field(metadata={"help": "what goes", "table": PRUNINGS})
    amount: float = option(0.25, "fraction that goes: weights, channels, heads, ...")
    pattern: tuple[int, int] | None = option(
        None, "N:M for single weights: N of every M inputs stay, such as 2:4"
    )
    repair: bool = option(True, "least-squares repair of the layer's output afterwards")

    def __post_init__(self) -> None:
        one_of("kind of pruning", self.kind, PRUNINGS)
        if not 0 < self.amount < 1:
            raise UsageError(
                f"prune {self.kind}: amount is a fraction between 0 and 1, got {self.amount!r}",
                hint="use 0.25 for a quarter",
            )
        if self.pattern is not None and PRUNINGS[self.kind].takes != "weights":
            raise UsageError(
                f"prune {self.kind}: a pattern is for single weights, and {self.kind} takes whole parts out",
                hint="drop pattern, or use kind: wanda",
            )
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise UsageError(
                f"prune {self.kind}: pattern {self.pattern[0]}:{self.pattern[1]} keeps none or all",
                hint="use pattern: 2:4",
            )


@dataclass(frozen=True)
class Distillation:
    """How the source teaches what was made from it."""

    loss: DistilLoss = option("forward", "KL(teacher, student), its reverse, or skewed")
    skew: float = option(0.1, "part of the teacher mixed into the student, for skewed")
    temperature: float = option(1.0, "softens both distributions")
    hidden: float = option(0.0, "weight of the squared error of hidden states")
    lora: int | None = option(None, "train adapters of this rank; default: all weights")
    tokens: int = option(1_000_000, "tokens to train on, repeats counted")
    batch_tokens: int = option(4096, "tokens a step")
    learning_rate: float = option(5e-5, "at its highest; a cosine follows")
    seed: int = option(0, "of the order of texts")

    def __post_init__(self) -> None:
        one_of("distillation loss", self.loss, get_args(DistilLoss))
        ranges = {
            "skew": 0 <= self.skew < 1,
            "temperature": self.temperature > 0,
            "hidden": self.hidden >= 0,
            "lora": self.lora is None or self.lora >= 1,
            "tokens": self.tokens >= 1,
            "batch_tokens": self.batch_tokens >= 1,
            "learning_rate": self.learning_rate > 0,
        }
        for name, holds in ranges.items():
            if not holds:
                raise UsageError(
                    f"distil: {name} cannot be {getattr(self, name)!r}",
                    hint=f"the default is {name}: {Distillation.__dataclass_fields__[name].default}",
                )


@dataclass(frozen=True)
class Recipe:
    """What happens to weights, activations and KV. Names: docs/concepts.md.

    `source` keeps the values the file holds, each tensor in the cheapest layout that holds it. Otherwise
    `default` is the layout of every linear layer, `head` that of the LM head (and a tied embedding), and
    `layers` overrides single layers by canonical name (`layers.3.down`).
    """

    name: str
    default: Format | None = None  # None: keep the source's values
    head: Format | None = None  # None: as default
    layers: Mapping[str, Format] = field(default_factory=dict)
    kv: Literal["bf16", "int8"] = "bf16"
    method: str = field(default="rtn", metadata={"table": METHODS})
    rotate: bool = False  # Hadamard rotation of the hidden states, folded into the weights
    smooth: float | None = None  # SmoothQuant's alpha: how much of the activations' range goes to the weights
    prune: tuple[Pruning, ...] = ()  # in this order, before anything is quantised
    distil: Distillation | None = None  # after pruning, before quantisation

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        if self.smooth is not None and not 0 < self.smooth < 1:
            raise UsageError(
                f"recipe {self.name}: smooth lies between 0 and 1, got {self.smooth!r}",
                hint="use smooth: 0.5",
            )

    @property
    def is_plain(self) -> bool:
        """Whether packing the source's values is all there is to do: nothing calibrated, nothing changed."""
        changes = self.rotate or self.smooth is not None or self.prune or self.distil is not None
        return self.method == "rtn" and not changes

    def layout_for(self, tensor: str) -> Format | None:
        """Format of one linear layer, or None to keep the source's values."""
        if tensor in self.layers:
            return self.layers[tensor]
        if tensor in ("head", "embed") and self.head is not None:
            return self.head
        return self.default

    def bits_per_weight(self, config: Shaped) -> float | None:
        """Mean stored bits over the linear layers, head included; None while values are kept as they come."""
        bits = weights = 0.0
        for name, (rows, cols) in config.linear_shapes().items():
            layout = self.layout_for(name)
            if layout is None:
                return None
            bits += layout.bits_per_weight * rows * cols
            weights += rows * cols
        return bits / weights

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """`source`, `bf16`, `w8`, `w6`, `w5`, `w4`, with `-g64`, `-head8`, `-kv8`, `-gptq` ... appended.

        `fp8` is `fp8-e4m3`: a scale for each row.

        `w4-best` has a head of 8 bits unless it names another.

        Raises:
            UsageError: the name is none of these.
        """
        text = re.sub(r"^fp8(?!-e4m3)", "fp8-e4m3", name.strip())
        table = next((one for one in TABLE_NAMES if text == one or text.startswith(f"{one}-")), None)
        base = table or text.split("-")[0]
        options = text[len(base) :].split("-")[1:]
        match = re.fullmatch(r"bf16|source|w([8654])", base)
        if match is None and table is None:
            raise UsageError(f"unknown recipe {name!r}", hint=f"use {names_hint()}")
        kinds = [option.rstrip("0123456789") for option in options]
        if same := [one for one, kind in zip(options, kinds, strict=True) if kinds.count(kind) > 1]:
            raise UsageError(
                f"recipe {name!r} says one thing twice: {', '.join(same)}",
                hint=f"keep one, such as {same[0]}",
            )
        bits = int(match.group(1) or 16) if match else 16
        group, head_bits, symmetric, words, kv = 32, None, True, list[str](), "bf16"
        named = {frozenset(one.split("-") if one != "rtn" else ()): one for one in METHODS}
        for option in options:
            if (m := re.fullmatch(r"g(32|64|128)", option)) and bits != 16:
                group = int(m.group(1))
            elif m := re.fullmatch(r"head(16|8|6|5|4)", option):
                head_bits = int(m.group(1))
            elif option == "asym" and bits != 16:
                symmetric = False
            elif option == "kv8":
                kv = "int8"
            elif bits != 16 and any({*words, option} <= parts for parts in named):
                words.append(option)
            else:
                raise UsageError(f"recipe {name!r}: cannot read {option!r}", hint=f"use {names_hint()}")
        method = named.get(frozenset(words))
        if method is None:
            raise UsageError(f"recipe {name!r}: cannot read {'-'.join(words)!r}", hint=f"use {names_hint()}")
        if (least := METHODS[method].head_bits) and head_bits is None:
            head_bits = max(least, bits)
        default = None if base == "source" else Format.of(bits, group, symmetric)
        if table is not None:
            default = FORMATS[table]
        head = Format.of(head_bits, group, symmetric) if head_bits else None
        return cls(
            name=name,
            default=default,
            head=head,
            kv="int8" if kv == "int8" else "bf16",
            method=method,
        )


def appended_methods() -> str:
    """What says the method in a recipe's name: `-hqq, -awq, -gptq, -awq-gptq or -best`."""
    *others, last = [f"-{name}" for name in METHODS if name != "rtn"]
    return f"{', '.join(others)} or {last}"


def names_hint() -> str:
    """Every part that a recipe's name may have, for people."""
    return (
        f"source, bf16, w8, w6, w5 or w4, with -g64, -g128, -asym, -head8, -kv8, {appended_methods()} "
        f"appended; {', '.join(reversed(TABLE_NAMES))}; mix:1%; or a recipe file"
    )


def one_of(what: str, got: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among the known ones."""
    if got not in known:
        raise UsageError(f"unknown {what} {got!r}", hint=f"use one of {', '.join(known)}")


def share_of(text: str) -> tuple[float, bool] | None:
    """(value, whether it came with a percent sign) of a share: `1%` and `0.01` are 0.01; None: it is none."""
    match = re.fullmatch(r"\s*\+?(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    return match and (float(match[1]) / (100 if match[2] else 1), bool(match[2]))
