"""Tiny random models of every architecture, made with transformers: the ground truth of the decoder's tests.

Weights are rounded to bf16, so a bf16 engine differs from transformers in float32 by its activations alone,
and scaled so that logits spread over several units and greedy tokens vary. The vocabulary is 256 bytes, 6
merges and one special token: 263 entries, a prime, so that no kernel finds whole blocks in it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tiny_tokenizers import END, VOCAB, save_tokenizer

torch.set_num_threads(1)  # matrices this small are done before a second thread has woken up


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One tiny model: a transformers class, its settings, and how GGUF files call the architecture."""

    name: str
    model_type: str
    settings: Mapping[str, Any]
    gguf: str | None = None  # architecture of the GGUF file; None: GGUF cannot say what this model does
    seed: int = 0

    def config(self) -> Any:
        """Its transformers config."""
        from transformers import AutoConfig

        defaults = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": END,
            "pad_token_id": None,
            "attn_implementation": "eager",
        }
        return AutoConfig.for_model(self.model_type, **{**defaults, **self.settings})

    def model(self) -> Any:
        """The transformers model in float32, its weights bf16 values; the same ones each time."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(
            self.config(), attn_implementation="eager", dtype=torch.float32
        )
        fill(model, self.seed)
        return model.eval()


def _tiny(name: str, model_type: str, gguf: str | None = None, **settings: Any) -> Tiny:
    return Tiny(name, model_type, settings, gguf, _SEEDS[name])


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10_000.0, **parameters}


# With these seeds each greedy token of prompts()[0] wins by 0.034 of the logits' spread or more, mostly 0.05,
# several times what rounding activations to bf16 moves them.
_SEEDS = {
    "llama": 102,
    "llama-odd": 10,
    "llama-linear": 162,
    "llama-llama3": 16,
    "llama-yarn": 41,
    "llama-yarn-mscale": 15,
    "llama-dynamic": 27,
    "llama-wide": 33,
    "mistral": 120,
    "mistral-full": 56,
    "qwen2": 86,
    "qwen2-sliding": 20,
    "qwen3": 238,
    "qwen3-yarn": 100,
    "gemma3": 74,
    "gemma3-capped": 36,
    "phi3": 4,
    "phi3-sliding": 63,
    "smollm": 27,
    "smollm3": 56,
    "olmo2": 112,
}
_LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_SLIDE, _FULL = "sliding_attention", "full_attention"

TINY: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in [
        _tiny("llama", "llama", "llama"),
        _tiny(
            "llama-odd",
            "llama",
            hidden_size=66,
            intermediate_size=100,
            num_attention_heads=3,
            num_key_value_heads=1,
            attention_bias=True,
            mlp_bias=True,
            num_hidden_layers=2,
        ),
        _tiny("llama-linear", "llama", "llama", rope_parameters=_rope("linear", factor=2.5)),
        _tiny("llama-llama3", "llama", "llama", rope_parameters=_rope("llama3", **_LLAMA3)),
        _tiny("llama-yarn", "llama", "llama", rope_parameters=_rope("yarn", **_YARN)),
        _tiny(
            "llama-yarn-mscale",
            "llama",
            rope_parameters=_rope(
                "yarn", **_YARN, mscale=0.7, mscale_all_dim=1.3, truncate=False, beta_fast=16.0
            ),
        ),
        _tiny(
            "llama-dynamic", "llama", rope_parameters=_rope("dynamic", factor=3.0), max_position_embeddings=24
        ),
        # 256 columns everywhere, so that the K types of GGUF fit
        _tiny(
            "llama-wide",
            "llama",
            "llama",
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        _tiny("mistral", "mistral", sliding_window=7, head_dim=24),
        _tiny("mistral-full", "mistral", "llama", sliding_window=None, head_dim=32),
        _tiny("qwen2", "qwen2", "qwen2", tie_word_embeddings=True),
        _tiny("qwen2-sliding", "qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
        _tiny("qwen3", "qwen3", "qwen3", head_dim=24, rope_parameters=_rope("default", rope_theta=1e6)),
        _tiny("qwen3-yarn", "qwen3", "qwen3", head_dim=32, rope_parameters=_rope("yarn", **_YARN)),
        _tiny(
            "gemma3",
            "gemma3_text",
            "gemma3",
            num_hidden_layers=7,
            head_dim=24,
            query_pre_attn_scalar=24,
            sliding_window=7,
            tie_word_embeddings=True,
            rope_parameters={_FULL: _rope("linear", factor=8.0, rope_theta=1e6), _SLIDE: _rope("default")},
        ),
        _tiny(
            "gemma3-capped",
            "gemma3_text",
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=13,
            sliding_window=5,
            layer_types=[_SLIDE, _FULL, _SLIDE],
            attn_logit_softcapping=4.0,
            final_logit_softcapping=20.0,
            tie_word_embeddings=True,
        ),
        _tiny(
            "phi3",
            "phi3",
            "phi3",
            max_position_embeddings=128,
            original_max_position_embeddings=16,
            rope_parameters=_rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
                long_factor=[1.0, 1.5, 2.5, 4.0, 6.0, 8.0],
            ),
        ),
        _tiny("phi3-sliding", "phi3", sliding_window=9, head_dim=16),
        _tiny(
            "smollm",
            "llama",
            "llama",
            hidden_size=96,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        ),
        _tiny("smollm3", "smollm3", "smollm3", num_hidden_layers=5, tie_word_embeddings=True),
        _tiny("olmo2", "olmo2", "olmo2"),
    ]
}


def fill(model: Any, seed: int) -> None:
    """Random weights for every parameter, each a bf16 value, from `seed` alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    gemma = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                noise = _norm_centre(name, gemma) + 0.2 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif "embed_tokens" not in name and "lm_head" not in name:
                noise = 1.6 * noise * parameter.shape[1] ** -0.5
            elif "embed_tokens" in name and gemma:
                noise = 0.1 * noise
            parameter.copy_(noise.bfloat16().float())


def _norm_centre(name: str, gemma: bool) -> float:
    """Gemma's norms multiply by 1 + weight. Without loud layers and a loud final norm, its scaled and tied
    embedding would make every model repeat its last token."""
    if not gemma:
        return 1.0
    if "post_" in name:
        return 2.0
    return 7.0 if name == "model.norm.weight" else 0.0


def save_folder(tiny: Tiny, folder: Path, dtype: str = "bfloat16", shards: bool = False) -> Path:
    """The model as a Hugging Face folder: config, safetensors (in several files if `shards`), tokenizer."""
    model = tiny.model().to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "5GB")
    save_tokenizer(folder)
    return folder


def write_old_config(folder: Path) -> None:
    """Rewrites config.json as transformers 4 did: rope_theta and rope_scaling, no rope_parameters."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if _FULL in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope[_SLIDE]["rope_theta"]
        rope = rope[_FULL]
        config.pop("layer_types", None)
        config["sliding_window_pattern"] = 6
    config["rope_theta"] = rope.pop("rope_theta")
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        config["partial_rotary_factor"] = partial
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, "rope_type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    path.write_text(json.dumps(config))


def prompts(count: int = 3, seed: int = 5) -> list[list[int]]:
    """Ragged prompts of 21, 3, 34, 1 and 13 tokens: shorter and longer than every window and threshold."""
    rng = np.random.default_rng(seed)
    return [[int(t) for t in rng.integers(0, VOCAB - 1, length)] for length in [21, 3, 34, 1, 13][:count]]


@torch.inference_mode()
def logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """What transformers gives, float32 [T, V]; computed as a whole, without a cache."""
    if "dynamic" in json.dumps(model.config.rope_parameters):
        model(
            torch.tensor([[0]]), use_cache=False
        )  # a short sequence makes transformers forget grown frequencies
    # transformers documents Gemma 3's cap on attention scores and then does not hand it on: so we do
    capped = {"softcap": cap} if (cap := getattr(model.config, "attn_logit_softcapping", None)) else {}
    return model(torch.tensor([list(tokens)]), use_cache=False, **capped).logits[0].float().numpy()


def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that transformers gives greedily, everything computed anew for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def int8_groups(x: np.ndarray) -> np.ndarray:
    """x rounded to int8 with one scale (largest magnitude / 127) a group of 32 inputs; float32 [T, cols].

    This is the rounding of the native engine's int8 activations (native/layout.h, kActGroup), undone again.
    """
    rows, cols = x.shape
    grouped = np.pad(x, ((0, 0), (0, -cols % 32))).reshape(rows, -1, 32)
    scale = np.abs(grouped).max(axis=-1, keepdims=True) / 127
    rounded = np.rint(grouped / np.maximum(scale, np.finfo(np.float32).tiny)) * scale
    return np.asarray(rounded.reshape(rows, -1)[:, :cols], np.float32)
