"""The demo model on the native engine against transformers in float32, over 4,096 tokens of real text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ggml_blocks import dequantize
from hasten import _native
from hasten.core import EngineOptions, Recipe
from hasten.engine.model import load_packed
from hasten.machine.cores import usable_cores
from hasten.models.open import open_model
from hasten.models.rope import rotations
from hasten.models.source import Source
from hasten.quality.text import default_text
from hasten.weights.packed import pack_model

pytestmark = pytest.mark.demo
WINDOWS, LENGTH, ROWS = 4, 1024, 256  # ROWS: logits compared at a time, 156 MB each side
_NAMES = {
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


def in_transformers(source: Source) -> Any:
    """transformers' Qwen2 in float32 with the values of the file."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    c, block = source.config, source.config.blocks[0]
    theta, size = rotations(c)[0].theta, block.mixer.head_dim
    config = Qwen2Config(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=block.feed_forward.width,
        num_hidden_layers=len(c.blocks),
        num_attention_heads=block.mixer.heads, num_key_value_heads=block.mixer.kv_heads,
        max_position_embeddings=c.context, rms_norm_eps=c.final_norm.eps, tie_word_embeddings=c.head.tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    state = {}
    for name, tensor in source.tensors.items():
        _, _, rest = name.partition("layers.")
        layer, _, part = rest.partition(".")
        stem, _, is_bias = part.partition(".bias") if part.endswith(".bias") else (part, "", None)
        top = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
        module = top.get(name) or f"model.layers.{layer}.{_NAMES[stem]}"
        suffix = "weight" if is_bias is None else "bias"
        state[f"{module}.{suffix}"] = torch.from_numpy(dequantize(tensor))
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    inverse = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    model.model.rotary_emb.inv_freq = inverse.float()  # a buffer: `meta` left it empty
    return model.eval()


@pytest.fixture(scope="module")
def reference() -> tuple[Source, list[np.ndarray], list[np.ndarray]]:
    """(the model, windows int32 [LENGTH], their final hidden states in transformers)."""
    import torch

    source = open_model("demo")
    ids = np.array(source.tokenizer().encode(default_text().evaluation)[: WINDOWS * LENGTH], np.int32)
    windows = list(ids.reshape(WINDOWS, LENGTH))
    model = in_transformers(source)
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    with torch.inference_mode():
        states = [model.model(torch.from_numpy(w)[None].long()).last_hidden_state[0].numpy() for w in windows]
    torch.set_num_threads(threads)
    return source, windows, states


@pytest.mark.parametrize(
    ("recipe", "limit"), [("bf16", 2e-4), ("w8", 2e-3), ("source", 2e-3), ("bf16-kv8", 3e-3)]
)
def test_mean_divergence_from_float32_is_small(recipe, limit, reference):
    import torch

    source, windows, states = reference
    head = torch.from_numpy(dequantize(source.tensors[source.config.head_name]))
    engine = load_packed(pack_model(source, Recipe.parse(recipe)), source, EngineOptions(max_sequences=1))
    divergences, agreements = [], []
    for window, state in zip(windows, states, strict=True):
        hidden = engine.hidden(window)
        for first in range(0, LENGTH, ROWS):
            wanted = (torch.from_numpy(state[first : first + ROWS]) @ head.T).numpy()
            got = engine.logits_of(hidden[first : first + ROWS])
            targets = np.zeros(ROWS, np.int32)
            kl, _, _, agree = _native.divergence(wanted, got, targets)
            divergences.append(kl)
            agreements.append(agree)
    engine.close()
    mean, agreement = float(np.mean(divergences)), float(np.mean(agreements))
    print(f"{recipe}: mean KL {mean:.2e}, top-1 agreement {agreement:.4f}")
    assert mean <= limit
    assert agreement > 0.95
