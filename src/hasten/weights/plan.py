"""What plan.json says that running an artifact depends on, read strictly: versions, files, layouts.

Everything else in plan.json (machine, measurements, reasons) is told to people and never refused.

Two programs of different age meet in an artifact, so these rules hold for both directions:

- `schema_version` says by which rules the folder was written. One that this program does not know is refused.
- A field that is missing has the default of its dataclass. Defaults are part of the format and never change;
  a field that was added later must have a default that means what programs did before it.
- A field that this program does not know is refused by its name, unless its value is null. What is as by
  default is not written, so an older program meets only the new fields that change an answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from hasten.core import (
    Activation,
    Attention,
    Block,
    Embedding,
    FeedForward,
    Head,
    ModelSpec,
    Norm,
    NormPlacement,
    Norms,
    QkNorm,
    RopeScaling,
    Rotary,
    as_json,
)
from hasten.errors import ArtifactError, HastenError
from hasten.weights import FORMATS, Format, FormatParts

PLAN_VERSION = 3
"""3: formats have names and versions, config.json holds a tree of blocks.
2: defaults are left out, all of `FILES` are listed, and `sha256` covers the description. 1: before 0.2."""
LAYOUT_VERSION = 1
"""Raised whenever native/layout.h changes what stored bytes mean."""
CONFIG, WEIGHTS = "config.json", "weights.safetensors"
FILES = (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json")
"""What an answer depends on, beside plan.json. No other file of the folder is read."""
AGAIN = "make it again: hasten optimize MODEL --out DIR"
_NEWER = "update Hasten to the version that wrote it, or make it again: hasten optimize MODEL --out DIR"

_SUM = re.compile(r"[0-9a-f]{16}")
T = TypeVar("T")


class Mismatch(ValueError):
    """A value is not what its field must hold; the text names the field."""


class UnknownField(Mismatch):
    """A field that only another version of this program knows."""


@dataclass(frozen=True)
class FileRecord:
    """One file as it was written."""

    bytes: int
    xxh64: tuple[str, ...]  # of every piece


@dataclass(frozen=True)
class Stored:
    """`artifact` in plan.json."""

    layout_version: int
    piece_bytes: int
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, str]  # a checksum a matrix
    sha256: str | None = None  # of the description; None in version 1


@dataclass(frozen=True)
class StoredRecipe:
    """`recipe` in plan.json."""

    name: str
    kv: Literal["bf16", "int8"]
    layers: Mapping[str, Format]
    bits_per_weight: float | None = None  # told to people; computed anew from the layouts
    formats: Mapping[str, int] = field(default_factory=dict)  # versions of those in `layers`; empty before 3


@dataclass(frozen=True)
class Description:
    """What plan.json says of the files beside it."""

    version: int
    recipe: StoredRecipe
    artifact: Stored


def described(plan: Any, where: str, piece_bytes: int) -> Description:
    """The part of a parsed plan.json that running depends on.

    Args:
        plan: the document. where: what errors call it. piece_bytes: what one checksum covers.

    Raises:
        ArtifactError: it describes no artifact, is of another version, has a field that is unknown or of a
            wrong type, lists not all of `FILES`, or differs from its own checksum.
    """
    if not isinstance(plan, Mapping) or not isinstance(plan.get("artifact"), Mapping):
        raise ArtifactError(f"{where} does not describe an artifact", hint=AGAIN)
    version = _known_version(where, "schema_version", plan, range(1, PLAN_VERSION + 1))
    _known_version(where, "layout_version", plan["artifact"], (LAYOUT_VERSION,))
    try:
        stored = dict(plan["artifact"])
        if version == 1:
            stored.setdefault("tensors", {})  # the first ones had none
        found = Description(
            version,
            noun_from(StoredRecipe, plan.get("recipe"), "recipe"),
            noun_from(Stored, stored, "artifact"),
        )
        _refuse_files(found.artifact, piece_bytes)
        _refuse_formats(found.recipe)
    except UnknownField as wrong:
        raise ArtifactError(f"{where}: {wrong}", hint=_NEWER) from None
    except (Mismatch, HastenError) as wrong:
        raise ArtifactError(f"{where}: {wrong}", hint=AGAIN) from None
    if version != 1 and found.artifact.sha256 != seal(plan):
        raise ArtifactError(f"{where} is damaged or was edited: its checksum differs", hint=AGAIN)
    return found


def seal(plan: Mapping[str, Any]) -> str:
    """SHA-256 of all in plan.json that running depends on, without this checksum itself."""
    stored = {key: value for key, value in plan["artifact"].items() if key != "sha256"}
    covered = [plan.get("schema_version"), plan.get("recipe"), stored]
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FlatConfig:
    """config.json of artifacts before there were blocks: a record of a dense decoder whose layers are alike.

    Nothing is written so any more. Biases are not in it: the stored tensors tell.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    norm_placement: NormPlacement = "pre"
    qk_norm: QkNorm = "none"
    rotary_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rope_local_theta: float | None = None
    rope_layers: tuple[bool, ...] = ()
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    tied_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def spec(self, biases: Iterable[str] = ()) -> ModelSpec:
        """The model as a tree.

        Args:
            biases: the linear layers of every block that have one.

        Raises:
            Mismatch: a list of flags has another length than the model layers.
        """
        for name, flags in (("rope", self.rope_layers), ("sliding", self.sliding_layers)):
            if flags and len(flags) != self.num_layers:
                raise Mismatch(f"{len(flags)} {name} layer flags for {self.num_layers} layers")
        if not 0 < self.num_layers <= 1 << 16:
            raise Mismatch(f"num_layers is {self.num_layers}")
        biased = frozenset(biases)
        return ModelSpec(
            self.architecture,
            self.vocab_size,
            self.hidden_size,
            self.context_length,
            tuple(self._block(i).with_biases(biased) for i in range(self.num_layers)),
            Embedding(self.embed_scale),
            Norm(self.norm_eps),
            Head(tied=self.tied_head, softcap=self.logit_softcap),
            bos_token_id=self.bos_token_id,
            eos_token_ids=self.eos_token_ids,
        )

    def _block(self, layer: int) -> Block:
        slides = self.sliding_window is not None and bool(self.sliding_layers) and self.sliding_layers[layer]
        dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        rotary: Rotary | None = Rotary(dim, self.rope_theta, self.rope_scaling)
        if slides and self.rope_local_theta is not None:
            rotary = Rotary(dim, self.rope_local_theta)
        if self.rope_layers and not self.rope_layers[layer]:
            rotary = None
        mixer = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            window=self.sliding_window if slides else None,
            rotary=rotary,
            qk_norm=self.qk_norm,
            scale=self.query_scale,
            softcap=self.attention_softcap,
        )
        feed_forward = FeedForward(self.intermediate_size, activation=self.activation)
        return Block(mixer, feed_forward, Norms(self.norm_placement, self.norm_eps))


def config_json(spec: ModelSpec) -> dict[str, Any]:
    """config.json of an artifact: the fields without a default, and those that differ from theirs."""
    return _without_defaults(spec)


def config_from(data: bytes, where: str, tensors: Iterable[str] = ()) -> ModelSpec:
    """The model in a config.json. Its types are right; its numbers were not compared with each other.

    Args:
        data: the file's bytes.
        where: what errors call it.
        tensors: canonical names of what is stored; they tell the biases of an older artifact.

    Raises:
        ArtifactError: it is no JSON, or a field is missing, unknown or of a wrong type.
    """
    try:
        values = json.loads(data)
        if isinstance(values, Mapping) and "blocks" not in values and "num_layers" in values:
            biases = (name.split(".")[2] for name in tensors if re.fullmatch(r"layers\.\d+\.\w+\.bias", name))
            return noun_from(FlatConfig, values, "").spec(biases)
        return noun_from(ModelSpec, values, "")
    except UnknownField as wrong:
        raise ArtifactError(f"{where}: {wrong}", hint=_NEWER) from None
    except (ValueError, RecursionError) as wrong:
        raise ArtifactError(f"{where} cannot be read: {wrong!s:.300}", hint=AGAIN) from None


def format_digest() -> str:
    """Differs where the fields of what an artifact stores, or their defaults, do: part of the keys of caches.

    A cache must not take a default for a field that it could have read from the model's own files.
    """
    known = [
        [kind.__name__, [(one.name, str(one.type), _default(one)) for one in fields(kind)]]
        for kind in _nouns(ModelSpec, Stored, StoredRecipe, FormatParts)
    ]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _default(one: Field[Any]) -> str:
    """A field's default as text that is the same in every process (the marker for none shows an address)."""
    return "" if one.default is MISSING else repr(one.default)


def _nouns(*kinds: Any, found: list[Any] | None = None) -> list[Any]:
    """Dataclasses and those that their fields hold."""
    found = [] if found is None else found
    for kind in kinds:
        if is_dataclass(kind) and kind not in found:
            found.append(kind)
            for hint in _hints(cast(type, kind)).values():
                _nouns(hint, *get_args(hint), found=found)
        else:
            inner = [one for one in get_args(kind) if is_dataclass(one) or get_args(one)]
            _nouns(*inner, found=found)
    return found


def _known_version(where: str, name: str, holder: Mapping[str, Any], known: Sequence[int]) -> int:
    found = holder.get(name)
    if type(found) is int and found in known:
        return found
    reads = " and ".join(map(str, known))
    is_newer = type(found) is int and found > max(known)
    raise ArtifactError(
        f"{where} has {name} {found!s:.40}, this program reads {reads}", hint=_NEWER if is_newer else AGAIN
    )


def _refuse_files(stored: Stored, piece_bytes: int) -> None:
    if stored.piece_bytes != piece_bytes:
        raise Mismatch(f"artifact.piece_bytes is {stored.piece_bytes}, this program has {piece_bytes}")
    for name in FILES:
        if name not in stored.files:
            raise Mismatch(f"artifact.files does not list {name}, on which answers depend")
    for name, record in stored.files.items():
        if name in ("", ".", "..", "plan.json") or "/" in name or "\\" in name or "\0" in name:
            raise Mismatch(f"artifact.files lists {name!r}, which is no file beside it")
        count = -(-record.bytes // piece_bytes)
        if record.bytes < 0 or len(record.xxh64) != count or not all(map(_SUM.fullmatch, record.xxh64)):
            raise Mismatch(
                f"artifact.files: {name} has {record.bytes} bytes and {len(record.xxh64)} checksums, "
                f"{max(count, 0)} of 16 digits belong there"
            )
    for name, total in stored.tensors.items():
        if not re.fullmatch(rf"({_SUM.pattern})*", total):
            raise Mismatch(f"artifact.tensors: {name} has the checksum {total!r:.60}")


def _refuse_formats(recipe: StoredRecipe) -> None:
    for name, version in recipe.formats.items():
        if name not in FORMATS:
            raise UnknownField(f"recipe.formats: this program does not know the format {name!r:.60}")
        if version != FORMATS[name].version:
            raise UnknownField(
                f"recipe.formats: {name} has version {version}, this program reads {FORMATS[name].version}"
            )
    for name, layout in recipe.layers.items():
        if recipe.formats and layout.name not in recipe.formats:
            raise Mismatch(f"recipe.formats lacks {layout.name}, which {name} has")


def _format_from(value: Any, where: str) -> Format:
    """A format by its name; before version 3 by bits, group and symmetric."""
    if isinstance(value, Mapping):
        return noun_from(FormatParts, value, where).format()
    if not isinstance(value, str):
        raise Mismatch(f"{where} must be the name of a format, got {value!r:.60}")
    if value not in FORMATS:
        raise UnknownField(f"{where}: this program does not know the format {value!r:.60}")
    return FORMATS[value]


def noun_from(kind: type[T], given: Any, where: str) -> T:
    """A frozen dataclass from plain values: the inverse of `as_json`, and strict.

    Args:
        kind: a dataclass of bool, int, float, str, Literal, tuples, mappings by text and other dataclasses.
        given: a mapping. Lists become tuples.
        where: what errors put before the field's name; empty for the document itself.

    Raises:
        UnknownField: a field that `kind` lacks, and it is not null.
        Mismatch: a field without a default is missing, or a value is of a wrong type.
    """
    if not isinstance(given, Mapping):
        raise Mismatch(f"{where or 'the document'} must be an object, got {given!r:.60}")
    assert is_dataclass(kind)
    hints = _hints(kind)
    inside = f"{where}." if where else ""
    for name, value in given.items():
        if name not in hints and value is not None:
            raise UnknownField(f"this program does not know the field {inside}{name} = {value!r:.60}")
    made: dict[str, Any] = {}
    for one in fields(kind):
        if one.name in given:
            made[one.name] = _typed(given[one.name], hints[one.name], f"{inside}{one.name}")
        elif one.default is MISSING and one.default_factory is MISSING:
            raise Mismatch(f"{inside}{one.name} is missing")
    return kind(**made)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as a field's annotation says."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and type(None) in inner:
            return None
        return _typed(value, next(one for one in inner if one is not type(None)), where)
    if origin is Literal:
        if not any(type(value) is type(one) and value == one for one in inner):
            raise Mismatch(f"{where} must be one of {', '.join(map(str, inner))}, got {value!r:.60}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise Mismatch(f"{where} must be a list, got {value!r:.60}")
        return tuple(_typed(one, inner[0], f"{where}[{i}]") for i, one in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise Mismatch(f"{where} must be an object, got {value!r:.60}")
        return {str(key): _typed(one, inner[1], f"{where}.{key}") for key, one in value.items()}
    if hint is Format:
        return _format_from(value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return noun_from(hint, value, where)
    return _plain(value, hint, where)


def _plain(value: Any, kind: Any, where: str) -> Any:
    if kind is float and type(value) is int and abs(value) < 1 << 1000:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        names = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
        raise Mismatch(f"{where} must be {names[kind]}, got {value!r:.60}")
    return value


def _without_defaults(noun: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in fields(noun):
        value = getattr(noun, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if default is MISSING or value != default:
            found[one.name] = _plain_json(value)
    return found


def _plain_json(value: Any) -> Any:
    if is_dataclass(value):
        return _without_defaults(value)
    return [_plain_json(one) for one in value] if isinstance(value, tuple) else as_json(value)
