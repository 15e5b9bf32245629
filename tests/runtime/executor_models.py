"""Tiny random models, one for each family, that the suite of all executors runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hasten.core import EngineOptions, ModelSpec, Recipe, RopeScaling
from hasten.errors import ModelError
from hasten.runtime.executor import EXECUTORS, Executor, Part, open_executor
from hasten.runtime.sampling import SamplingOptions
from hasten.weights.packed import PackedModel, pack_model
from hasten.weights.tensors import SourceTensor
from specs import changed, spec

DEVICES = [name for name in EXECUTORS if name != "cuda" or Path("/dev/nvidiactl").exists()]
EXACT = [name for name in DEVICES if name not in ("cuda", "torch")]  # they round in more than one way
VOCAB, CONTEXT = 263, 128
GREEDY = SamplingOptions(ignore_eos=True)
LLAMA = spec("llama", VOCAB, 64, 96, 2, 4, 2, 16, context_length=512)
LLAMA3 = RopeScaling("llama3", 4.0, original_context_length=64)
LONGROPE = RopeScaling(
    "longrope", original_context_length=16, short_factor=(1, 1.1, 1.2, 1.4, 1.7, 2),
    long_factor=(1, 1.5, 2.5, 4, 6, 8),
)  # fmt: skip
MODELS: dict[str, ModelSpec] = {
    "llama": LLAMA,
    "llama, scaled": changed(LLAMA, rope_scaling=LLAMA3),
    "llama, odd": changed(
        LLAMA, hidden_size=66, intermediate_size=100, num_heads=3, num_kv_heads=1, head_dim=22,
        biases=("q", "k", "v", "o", "gate", "up", "down"),
    ),
    "mistral": changed(
        LLAMA, architecture="mistral", head_dim=24, sliding_window=7, sliding_layers=(True, True)
    ),
    "qwen2": changed(LLAMA, architecture="qwen2", biases=("q", "k", "v"), tied_head=True),
    "qwen3": changed(LLAMA, architecture="qwen3", qk_norm="head", head_dim=24, rope_theta=1e6),
    "gemma3": changed(
        LLAMA, architecture="gemma3", num_layers=3, activation="gelu_tanh", norm_placement="sandwich",
        qk_norm="head", rope_theta=1e6, rope_scaling=RopeScaling("linear", 8.0), rope_local_theta=1e4,
        sliding_window=5, sliding_layers=(True, True, False), query_scale=0.2, attention_softcap=4.0,
        logit_softcap=20.0, embed_scale=8.0, tied_head=True,
    ),
    "phi3": changed(LLAMA, architecture="phi3", rotary_dim=12, rope_scaling=LONGROPE),
    "smollm3": changed(LLAMA, architecture="smollm3", rope_layers=(True, False), tied_head=True),
    "olmo2": changed(LLAMA, architecture="olmo2", norm_placement="post", qk_norm="full"),
}  # fmt: skip
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_each_exact_device = pytest.mark.parametrize("device", EXACT)
of_each_family = pytest.mark.parametrize("name", MODELS)


def text(seed: int, length: int) -> list[int]:
    """Letters of the tiny vocabulary."""
    return np.random.default_rng(seed).integers(97, 122, length).tolist()


@cache
def packed(name: str, recipe: str | Recipe = "bf16") -> PackedModel:
    """Random weights of a size that lets logits differ by units."""
    generator, tensors = np.random.default_rng(len(name)), {}
    for key, shape in MODELS[name].parameter_shapes().items():
        noise = generator.standard_normal(shape)
        if key == "embed" and MODELS[name].head.tied:
            noise *= 0.3 / MODELS[name].embedding.scale  # or each token would be followed by itself
        elif len(shape) == 2:
            noise *= 1.3 * shape[1] ** -0.5
        else:
            noise = 0.3 * noise + ("norm" in key)
        values = noise.astype(np.float32)
        tensors[key] = SourceTensor(key, shape, "F32", values.view(np.uint8).reshape(-1))
    wanted = Recipe.parse(recipe) if isinstance(recipe, str) else recipe
    return pack_model(SimpleNamespace(name=name, config=MODELS[name], tensors=tensors), wanted, 1)


def options(device: str, **more: Any) -> EngineOptions:
    return EngineOptions(**{"threads": 1, "context": CONTEXT, "max_sequences": 4, "device": device, **more})


@cache
def shared(device: str, name: str) -> Executor:
    """An executor for several tests. What a device says it does not run is skipped, but by the exact ones."""
    try:
        return open_executor(packed(name), options(device))
    except ModelError as refused:
        if device in EXACT:
            raise
        pytest.skip(refused.message)


def compute(executor: Executor, *parts: Part) -> list[Any]:
    return executor.collect(executor.submit(parts))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over the spread of what is wanted."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / wanted.std())
