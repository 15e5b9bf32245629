"""What happens to a model: widths by layer, the method that finds them, what is taken out first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast, get_args

from hasten.errors import UsageError
from hasten.weights.formats import FORMATS, TABLE_NAMES, Format

Method = Literal["rtn", "hqq", "awq", "gptq", "awq-gptq", "best"]
"""How integers are found: docs/compress.md. All but rtn and hqq need calibration text."""

PruneKind = Literal["magnitude", "wanda", "sparsegpt", "ffn", "heads", "layers", "width", "vocabulary"]
DistilLoss = Literal["forward", "reverse", "skewed"]


class Shaped(Protocol):
    """What a recipe asks of a ModelSpec."""

    def linear_shapes(self) -> dict[str, tuple[int, int]]: ...


@dataclass(frozen=True)
class Pruning:
    """One kind of weights to take out.

    `magnitude`, `wanda` and `sparsegpt` set single weights to zero, all of a layer or `pattern` (N of every M
    inputs stay); the others make a smaller dense model.
    """

    kind: PruneKind = field(metadata={"help": "what goes"})
    amount: float = field(
        default=0.25, metadata={"help": "fraction that goes: weights, channels, heads, ..."}
    )
    pattern: tuple[int, int] | None = field(
        default=None, metadata={"help": "N:M for single weights: N of every M inputs stay, such as 2:4"}
    )
    repair: bool = field(
        default=True, metadata={"help": "least-squares repair of the layer's output afterwards"}
    )

    def __post_init__(self) -> None:
        _one_of("kind of pruning", self.kind, get_args(PruneKind))
        if not 0 < self.amount < 1:
            raise UsageError(
                f"prune {self.kind}: amount is a fraction between 0 and 1, got {self.amount!r}",
                hint="use 0.25 for a quarter",
            )
        if self.pattern is not None and self.kind not in ("magnitude", "wanda", "sparsegpt"):
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

    loss: DistilLoss = field(
        default="forward", metadata={"help": "KL(teacher, student), its reverse, or skewed"}
    )
    skew: float = field(
        default=0.1, metadata={"help": "part of the teacher mixed into the student, for skewed"}
    )
    temperature: float = field(default=1.0, metadata={"help": "softens both distributions"})
    hidden: float = field(default=0.0, metadata={"help": "weight of the squared error of hidden states"})
    lora: int | None = field(
        default=None, metadata={"help": "train adapters of this rank; default: all weights"}
    )
    tokens: int = field(default=1_000_000, metadata={"help": "tokens to train on, repeats counted"})
    batch_tokens: int = field(default=4096, metadata={"help": "tokens a step"})
    learning_rate: float = field(default=5e-5, metadata={"help": "at its highest; a cosine follows"})
    seed: int = field(default=0, metadata={"help": "of the order of texts"})

    def __post_init__(self) -> None:
        _one_of("distillation loss", self.loss, get_args(DistilLoss))
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
    method: Method = "rtn"
    rotate: bool = False  # Hadamard rotation of the hidden states, folded into the weights
    smooth: float | None = None  # SmoothQuant's alpha: how much of the activations' range goes to the weights
    prune: tuple[Pruning, ...] = ()  # in this order, before anything is quantised
    distil: Distillation | None = None  # after pruning, before quantisation

    def __post_init__(self) -> None:
        _one_of("method", self.method, get_args(Method))
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

        `w4-best` has a head of 8 bits unless it names another.

        Raises:
            UsageError: the name is none of these.
        """
        text = name.strip()
        table = next((one for one in TABLE_NAMES if text == one or text.startswith(f"{one}-")), None)
        base = table or text.split("-")[0]
        options = text[len(base) :].split("-")[1:]
        match = re.fullmatch(r"bf16|source|w([8654])", base)
        if match is None and table is None:
            raise UsageError(f"unknown recipe {name!r}", hint=f"use {NAMES_HINT}")
        bits = int(match.group(1) or 16) if match else 16
        group, head_bits, symmetric, method, kv = 32, None, True, "rtn", "bf16"
        for option in options:
            if (m := re.fullmatch(r"g(32|64|128)", option)) and bits != 16:
                group = int(m.group(1))
            elif m := re.fullmatch(r"head(16|8|6|5|4)", option):
                head_bits = int(m.group(1))
            elif option == "asym" and bits != 16:
                symmetric = False
            elif option == "kv8":
                kv = "int8"
            elif option in _METHODS and bits != 16:
                method = "awq-gptq" if {option, method} == {"awq", "gptq"} else option
            else:
                raise UsageError(f"recipe {name!r}: cannot read {option!r}", hint=f"use {NAMES_HINT}")
        if method == "best" and head_bits is None:
            head_bits = max(8, bits)
        default = None if base == "source" else Format.of(bits, group, symmetric)
        if table is not None:
            default = FORMATS[table]
        head = Format.of(head_bits, group, symmetric) if head_bits else None
        return cls(
            name=name,
            default=default,
            head=head,
            kv="int8" if kv == "int8" else "bf16",
            method=cast("Method", method),
        )


_METHODS = ("hqq", "awq", "gptq", "best")
NAMES_HINT = (
    "source, bf16, w8, w6, w5 or w4, with -g64, -g128, -asym, -head8, -kv8, "
    f"-hqq, -awq, -gptq or -best appended; {', '.join(reversed(TABLE_NAMES))}; mix:1%; or a recipe file"
)


def _one_of(what: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise UsageError(f"unknown {what} {got!r}", hint=f"use one of {', '.join(known)}")
