"""What a family of models is: its names, its defaults, what sets it apart, and how its tensors are called.

A family file fills a `Family`; decoder.py reads files with it. Sources of the tensor names: the modules of
transformers' models, and gguf's (gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hasten.core import Attention, Block, FeedForward, ModelSpec, NormPlacement, Norms, QkNorm, Rotary
from hasten.errors import ModelError

Flags = tuple[bool, ...]
"""One a layer."""

ATTENTION_BIAS: dict[str, tuple[str, ...]] = {"attention_bias": ("q", "k", "v", "o")}
MLP_BIAS: dict[str, tuple[str, ...]] = {"mlp_bias": ("gate", "up", "down")}
"""Keys of a config.json -> the linear layers that have a bias where the key is true."""

_REQUIRED: Any = object()


class Fields:
    """A mapping read by type.

    None counts as missing, but keeps the defaults of `defaults` from being used: Mistral's
    `"sliding_window": null` says that there is no window, where a missing key means 4096.

    Args:
        values: the fields.
        where: what errors call them: a file name.
        prefix: put before every key ("llama." for GGUF metadata).
        defaults: used where a key is missing, before the default of the call.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        where: str,
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = values
        self.where = where
        self.prefix = prefix
        self._defaults = dict(defaults or {})

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value, or the default where it is missing or None."""
        name = self.prefix + key
        value = self.values[name] if name in self.values else self._defaults.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = 1 << 24) -> Any:
        """An integer from low to high (or the default, unchecked).

        Raises:
            ModelError: missing without a default, not an integer, or out of range.
        """
        value = _unquoted(self._value(key, default))
        if value is default:
            return value
        if isinstance(value, float) and value.is_integer():  # some writers have no other numbers
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0) -> Any:
        """A finite number greater than `low` (or the default, unchecked).

        Raises:
            ModelError: missing without a default, no number, not finite or too small.
        """
        value = _unquoted(self._value(key, default))
        if value is default:
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not -1e300 < value < 1e300 or not value > low:  # a NaN fails the first comparison
            raise self.error(key, f"a number greater than {low:g}", value)
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or False, which may be written as 1 or 0.

        Raises:
            ModelError: something else is there.
        """
        value = self._value(key, default)
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string (or the default).

        Raises:
            ModelError: missing without a default, or no string.
        """
        value = self._value(key, default)
        if value is not default and not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def numbers(self, key: str, length: int | None = None) -> tuple[float, ...]:
        """A list of finite numbers, () where it is missing.

        Raises:
            ModelError: no list of numbers, or of another length.
        """
        value = self.get(key)
        if value is None:
            return ()
        is_list = isinstance(value, (list, tuple)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e300 for v in value
        )
        if not is_list or (length is not None and len(value) != length):
            wanted = "a list of numbers" if length is None else f"a list of {length} numbers"
            raise self.error(key, wanted, value)
        return tuple(float(v) for v in value)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A nested object, empty where it is missing.

        Raises:
            ModelError: something else is there.
        """
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "an object", value)
        return value

    def error(self, key: str, wanted: str, found: Any) -> ModelError:
        """A ModelError: which field, what belongs there, what was found."""
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ModelError(f"{self.where}: {self.prefix}{key} must be {wanted}, got {shown}")

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.where}: {self.prefix}{key} is missing")
        return value


def bf16_rounded(value: float) -> float:
    """The nearest bfloat16, ties to even; finite positive values only."""
    mantissa, exponent = math.frexp(value)  # 0.5 <= mantissa < 1: eight bits of it are kept
    return math.ldexp(round(math.ldexp(mantissa, 8)), exponent - 8)


_HF_NORMS: dict[NormPlacement, dict[str, str]] = {
    "pre": {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"},
    "sandwich": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attn_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    },
    "post": {
        "post_attention_layernorm": "post_attn_norm",
        "post_feedforward_layernorm": "post_mlp_norm",
    },
}
_HF_BLOCK: dict[str, tuple[str, ...]] = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "self_attn.qkv_proj": ("q", "k", "v"),
    "self_attn.q_norm": ("q_norm",),
    "self_attn.k_norm": ("k_norm",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}
_GGUF_NORMS: dict[NormPlacement, dict[str, str]] = {
    "pre": {"attn_norm": "attn_norm", "ffn_norm": "mlp_norm"},
    "sandwich": {
        "attn_norm": "attn_norm",
        "post_attention_norm": "post_attn_norm",
        "ffn_norm": "mlp_norm",
        "post_ffw_norm": "post_mlp_norm",
    },
    "post": {"post_attention_norm": "post_attn_norm", "post_ffw_norm": "post_mlp_norm"},
}
_GGUF_BLOCK: dict[str, tuple[str, ...]] = {
    "attn_q": ("q",),
    "attn_k": ("k",),
    "attn_v": ("v",),
    "attn_output": ("o",),
    "attn_qkv": ("q", "k", "v"),
    "attn_q_norm": ("q_norm",),
    "attn_k_norm": ("k_norm",),
    "ffn_gate": ("gate",),
    "ffn_up": ("up",),
    "ffn_down": ("down",),
}


# What training wraps around a model, or parts of it, and some scripts leave in the names that they save:
# DistributedDataParallel, torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = re.compile(
    r"^base_model\.model\.(?=model\.|lm_head\.)|(?<![^.])"
    r"(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class NameTable:
    """Names of one file format and architecture."""

    top: dict[str, tuple[str, ...]]  # module -> canonical names
    block: dict[str, tuple[str, ...]]  # module inside a block -> canonical names inside a layer
    block_prefix: re.Pattern[str]  # group 1: layer, group 2: module; the kind is cut off before
    prefixes: tuple[str, ...]  # tried in order, the longest first
    ignored: re.Pattern[str]  # names with no use here

    def parts(self, name: str) -> tuple[str, ...] | None:
        """The parameters a file's tensor fills, in the order of its rows; None: none of ours."""
        module, _, kind = _WRAPPERS.sub("", name).rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        suffix = ".bias" if kind == "bias" else ""
        for prefix in self.prefixes:
            if not module.startswith(prefix):
                continue
            inner = module.removeprefix(prefix)
            if inner in self.top:
                return tuple(part + suffix for part in self.top[inner])
            match = self.block_prefix.fullmatch(inner)
            if match and match[2] in self.block:
                return tuple(f"layers.{match[1]}.{part}{suffix}" for part in self.block[match[2]])
        return None

    def ignores(self, name: str) -> bool:
        """Whether a tensor may be there without being used."""
        return self.ignored.search(name) is not None


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def _unquoted(value: Any) -> Any:
    """A number that was written as text (YAML has 1e-05 so) as a number; all else as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def no_layer(fields: Fields, layers: int) -> Flags:
    """No layer has it."""
    return (False,) * layers


def every_layer(fields: Fields, layers: int) -> Flags:
    """All layers have it."""
    return (True,) * layers


def own_local_theta(fields: Fields, rotary: Rotary) -> float | None:
    """Theta of layers with a window in GGUF metadata, where it is another than that of all others."""
    given = fields.number("rope.freq_base_swa", None)
    return None if given is None or given == rotary.theta else float(given)


@dataclass(frozen=True)
class Family:
    """One family: what its files leave unsaid, and where it differs from Llama.

    Functions get the fields of a file and the number of layers, and read what is the family's own.
    """

    name: str  # `ModelSpec.architecture`, and `model_type` of a config.json
    hf_class: str  # as config.json names the model's class
    gguf: str  # `general.architecture`; of two families with one name the first in the table reads it
    model_types: tuple[str, ...] = ()  # those of a config.json; empty: the name
    nested_types: tuple[str, ...] = ()  # of them, those whose text half is in `text_config`
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of transformers' configuration class
    theta: float = 10_000.0
    placement: NormPlacement = "pre"
    qk_norm: QkNorm = "none"
    always_biased: tuple[str, ...] = ()  # linear layers with a bias, whatever a file says
    bias_keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of config.json -> linear layers
    sliding: Callable[[Fields, int], Flags] = no_layer  # config.json: which layers have its window
    rotating: Callable[[Fields, int], Flags] = every_layer
    hf_local_theta: float | None = None  # of layers with a window where config.json names none
    long_ropes: tuple[str, ...] = ("su",)  # kinds of rope scaling that mean longrope
    hf_finish: Callable[[ModelSpec, Fields, str], ModelSpec] = lambda spec, fields, embed_dtype: spec
    stored_less_one: bool = False  # a checkpoint's norms are weight - 1
    is_permuted: bool = False  # GGUF: q and k rows lie for llama.cpp's interleaved rotation
    has_fused_up: bool = False  # GGUF: `ffn_up` holds gate and up, one after the other
    implied_window: Callable[[int], int | None] = lambda layers: None  # GGUF that names none, by its layers
    window_pattern: int = 1  # GGUF with a window and no pattern: every n-th layer does not slide
    local_theta: Callable[[Fields, Rotary], float | None] = own_local_theta
    gguf_finish: Callable[[ModelSpec, Fields, str], ModelSpec] = lambda spec, fields, embed_dtype: spec

    @property
    def hf_names(self) -> NameTable:
        """Names of a safetensors checkpoint: a causal model, its base alone, or the text half of Gemma 3."""
        norms = {name: (ours,) for name, ours in _HF_NORMS[self.placement].items()}
        return NameTable(
            top={"embed_tokens": ("embed",), "norm": ("final_norm",), "lm_head": ("head",)},
            block={**_HF_BLOCK, **norms},
            block_prefix=re.compile(r"layers\.(0|[1-9]\d{0,3})\.(.+)"),
            prefixes=("language_model.model.", "model.language_model.", "language_model.", "model.", ""),
            ignored=re.compile(
                r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(^|\.)position_ids$"
                r"|(^|\.)self_attn\.(bias|masked_bias|causal_mask)$"  # masks, which are made anew
                # of keys and values in fp8, which other engines keep
                r"|(^|\.)self_attn\.((attn\.)?[qkv]_scale|prob_(output_)?scale|[kv]_proj\.output_scale)$"
                r"|(^|\.)(vision_tower|multi_modal_projector|mtp|v_head)\."
            ),
        )

    @property
    def gguf_names(self) -> NameTable:
        """Names of a GGUF file."""
        norms = {name: (ours,) for name, ours in _GGUF_NORMS[self.placement].items()}
        fused: dict[str, tuple[str, ...]] = {"ffn_up": ("gate", "up")} if self.has_fused_up else {}
        return NameTable(
            top={"token_embd": ("embed",), "output_norm": ("final_norm",), "output": ("head",)},
            block={**_GGUF_BLOCK, **norms, **fused},
            block_prefix=re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)"),
            prefixes=("",),
            ignored=re.compile(
                r"^(rope_freqs|rope_factors_long|rope_factors_short)\.weight$|\.attn_rot_embd\."
            ),
        )


@dataclass(frozen=True)
class LayerKinds:
    """In what the layers of a decoder differ: windows, and how they turn."""

    window: int | None
    slides: Flags  # which layers have the window
    rotates: Flags
    rotary: Rotary
    local: Rotary | None = None  # of layers with the window; None: as all others

    def blocks(self, attention: Attention, feed_forward: FeedForward, norms: Norms) -> tuple[Block, ...]:
        """The blocks, all else alike."""
        window = self.window if any(self.slides) else None
        found = []
        for slides, rotates in zip(self.slides, self.rotates, strict=True):
            own = window if slides else None
            turn = self.local if own is not None and self.local is not None else self.rotary
            mixer = replace(attention, window=own, rotary=turn if rotates else None)
            found.append(Block(mixer, feed_forward, norms))
        return tuple(found)


def layer_types(fields: Fields, layers: int) -> Flags | None:
    """Which layers have the window by `layer_types` of a config.json; None where it has no such list."""
    types = fields.get("layer_types")
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise fields.error("layer_types", f"{layers} of {' and '.join(known)}", types)
    return tuple(t == "sliding_attention" for t in types)


def _is_used(value: Any) -> bool:
    if isinstance(value, list | np.ndarray):
        return any(_is_used(one) for one in value)
    return value is not None and value is not False and value != 0 and value != {}


def refuse(features: Mapping[str, Any], where: str) -> None:
    """Refuse what no family here has.

    Args:
        features: what it is in words -> its value in the file; None, 0, False, {} and arrays of them mean
            unused.

    Raises:
        ModelError: one is used.
    """
    for feature, given in features.items():
        value = given.tolist() if isinstance(given, np.ndarray) else given
        if _is_used(value):
            raise ModelError(
                f"{where}: {feature} is not supported (found {value!r:.60})",
                hint="dense decoders are supported, such as Llama, Qwen, Gemma and Phi",
            )
