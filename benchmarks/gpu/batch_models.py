"""The models whose batched decode is measured: random weights at real shapes."""

from __future__ import annotations

import statistics

import torch

from hasten.core import ModelSpec, RopeScaling
from hasten.runtime.gpu.batch_weights import BatchWeights, Precision, load
from hasten.weights.plan import FlatConfig

CONTEXT = 1024  # tokens a sequence may have in these measurements
MODELS = {
    "0.6B": FlatConfig(
        "qwen3", 151936, 1024, 3072, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
        context_length=40960, norm_eps=1e-6, qk_norm="head", rope_theta=1e6, tied_head=True,
    ).spec(),
    "8B": FlatConfig(
        "llama", 128256, 4096, 14336, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
        context_length=131072, norm_eps=1e-5, rope_theta=5e5,
        rope_scaling=RopeScaling(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=8192
        ),
    ).spec(),
}  # fmt: skip


def random_tensor(config: ModelSpec, name: str, device: str) -> torch.Tensor | None:
    """A parameter by canonical name, bf16; the same one for the same name."""
    shape = config.parameter_shapes().get(name)
    if shape is None:
        return None
    if device == "meta":
        return torch.empty(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(sum(ord(c) * 131**i for i, c in enumerate(name)) % 2**31)
    noise = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
    if name.endswith("norm"):
        return 1 + 0.1 * noise
    return noise * shape[-1] ** -0.5


def random_weights(model: str, precision: Precision, device: str = "cuda") -> BatchWeights:
    """All of a model."""
    config = MODELS[model]
    return load(config, lambda name: random_tensor(config, name, device), CONTEXT, precision, device)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 4 GB."""
    source = torch.randn(2**31, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.numel() * 2 / (statistics.median(times) / 1e3)
