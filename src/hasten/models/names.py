"""What the tensors of a file are called, and which of ours they fill.

Sources: the modules of transformers' models, and gguf's tensor names (gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from hasten.core import NormPlacement

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
        module, _, kind = name.rpartition(".")
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


def hf_names(placement: NormPlacement) -> NameTable:
    """Names of a safetensors checkpoint: a causal model, its base alone, or the text half of Gemma 3."""
    norms = {name: (ours,) for name, ours in _HF_NORMS[placement].items()}
    return NameTable(
        top={"embed_tokens": ("embed",), "norm": ("final_norm",), "lm_head": ("head",)},
        block={**_HF_BLOCK, **norms},
        block_prefix=re.compile(r"layers\.(0|[1-9]\d{0,3})\.(.+)"),
        prefixes=("language_model.model.", "model.language_model.", "language_model.", "model.", ""),
        ignored=re.compile(r"(^|\.)rotary_emb\.inv_freq$|(^|\.)(vision_tower|multi_modal_projector)\."),
    )


def gguf_names(placement: NormPlacement, has_fused_up: bool) -> NameTable:
    """Names of a GGUF file.

    Args:
        placement: of the norms.
        has_fused_up: Phi-3: `ffn_up` holds gate and up, one after the other.
    """
    norms = {name: (ours,) for name, ours in _GGUF_NORMS[placement].items()}
    fused: dict[str, tuple[str, ...]] = {"ffn_up": ("gate", "up")} if has_fused_up else {}
    return NameTable(
        top={"token_embd": ("embed",), "output_norm": ("final_norm",), "output": ("head",)},
        block={**_GGUF_BLOCK, **norms, **fused},
        block_prefix=re.compile(r"blk\.(0|[1-9]\d{0,3})\.(.+)"),
        prefixes=("",),
        ignored=re.compile(r"^(rope_freqs|rope_factors_long|rope_factors_short)\.weight$|\.attn_rot_embd\."),
    )
