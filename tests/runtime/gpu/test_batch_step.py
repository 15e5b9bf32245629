"""The batched decode step under Triton's interpreter (on the GPU where there is one), against the plain decoder."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")
if DEVICE == "cpu":
    import mended_interpreter

    mended_interpreter.mend()

from hasten.core import ModelConfig  # noqa: E402
from hasten.models.parameters import parameter_shapes  # noqa: E402
from hasten.models.reference import ReferenceDecoder  # noqa: E402
from hasten.rope_scaling import RopeScaling  # noqa: E402
from hasten.runtime.gpu import batch_weights  # noqa: E402
from hasten.runtime.gpu.batch_step import PAGE, BatchStep, StepOptions  # noqa: E402
from hasten.runtime.gpu.batch_tiles import AttentionTile  # noqa: E402

LLAMA = ModelConfig(
    "llama",
    67,
    64,
    96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    context_length=1024,
    norm_eps=1e-5,
)
MODELS = {
    "llama": LLAMA,
    "llama3 rope": replace(
        LLAMA,
        rope_scaling=RopeScaling(
            "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64
        ),
    ),
    "qwen3": replace(LLAMA, architecture="qwen3", qk_norm="head", head_dim=16, tied_head=True),
    "qwen2": replace(LLAMA, architecture="qwen2", num_kv_heads=1),
    "partial rotary": replace(LLAMA, architecture="phi3", rotary_dim=16),
    "odd head": replace(LLAMA, architecture="phi3", head_dim=24),
    "no rotary in layer 1": replace(LLAMA, architecture="smollm3", rope_layers=(True, False)),
    "window": replace(LLAMA, architecture="mistral", sliding_window=21, sliding_layers=(True, False)),
    "gemma3": replace(
        LLAMA,
        architecture="gemma3",
        activation="gelu_tanh",
        norm_placement="sandwich",
        qk_norm="head",
        rope_local_theta=100.0,
        sliding_window=40,
        sliding_layers=(True, False),
        query_scale=0.2,
        attention_softcap=3.0,
        logit_softcap=2.0,
        embed_scale=8.0,
        tied_head=True,
    ),
}
BIASES = {"qwen2": ("q", "k", "v", "o", "gate", "up", "down")}
SMALL = AttentionTile(split=32, block=16)
CONTEXT = 96  # tokens: three pages, three splits


def tensors_of(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors, bf16 values, of a size that makes logits differ by units."""
    generator, made = np.random.default_rng(seed), {}
    for key, shape in parameter_shapes(MODELS[name], BIASES.get(name, ())).items():
        noise = generator.standard_normal(shape)
        value = (
            1 + 0.2 * noise
            if key.endswith("norm")
            else noise * (1.5 if len(shape) == 1 else 1.5 * shape[1] ** -0.5)
        )
        made[key] = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
    return made


def step_of(name: str, rows: int, precision: str = "bf16", tiles=None, **options) -> BatchStep:
    tensors = tensors_of(name)

    def tensor_of(key):
        return torch.from_numpy(tensors[key]) if key in tensors else None

    weights = batch_weights.load(MODELS[name], tensor_of, CONTEXT, precision, DEVICE)
    wanted = StepOptions(rows=rows, pages=3 * rows, context=CONTEXT, keep_logits=True, **options)
    step = BatchStep(weights, wanted, tiles, lambda rows: SMALL)
    order = np.random.default_rng(5).permutation(3 * rows).reshape(rows, 3)
    step.table[:rows] = torch.from_numpy(order).to(DEVICE, torch.int32)
    return step


def sequence(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, LLAMA.vocab_size, length).tolist()


def reference(name: str, tokens: list[int], tensors=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits [T, V], keys and values [T, K, D] by name) of the plain decoder, which rounds where the step does."""
    seen: dict[str, torch.Tensor] = {}

    def rounded(key: str, value: torch.Tensor) -> torch.Tensor:
        seen[key] = value.to(torch.bfloat16).float()
        return seen[key]

    logits = ReferenceDecoder(MODELS[name], tensors or tensors_of(name), rounded).logits(tokens)
    return logits, seen


def remember(step: BatchStep, row: int, tokens: list[int], seen: dict[str, torch.Tensor]) -> None:
    """Put the keys and values of all tokens but the last into the row's pages, and that token into the row."""
    config = step.weights.config
    order = torch.from_numpy(batch_weights.rotary_order(config))
    for layer in range(config.num_layers):
        keys, values = seen[f"layers.{layer}.keys"][..., order], seen[f"layers.{layer}.values"]
        for t in range(len(tokens) - 1):
            page = int(step.table[row, t // PAGE])
            step.keys[layer][page, :, t % PAGE] = keys[t].to(step.keys[layer])
            step.values[layer][page, :, t % PAGE] = values[t].to(step.values[layer])
    step.tokens[row], step.positions[row] = tokens[-1], len(tokens) - 1


def poison(step: BatchStep) -> None:
    """What a step must write before it reads it."""
    buffers = step.buffers
    others = [
        buffers.residual,
        buffers.hidden,
        buffers.queries,
        buffers.attended,
        buffers.mixed,
        buffers.plain,
    ]
    others += [*buffers.squares, buffers.best, buffers.logits]
    angles = [t for pair in buffers.angles.values() for t in pair]
    for tensor in [*others, *angles, *buffers.parts.values()]:
        tensor.fill_(float("nan"))
    if buffers.peaks is not None:
        buffers.peaks.fill_(0x7F000000)
    buffers.places.fill_(2**30)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_plain_decoders(name: str) -> None:
    """Rows of one token, of a page and one token, and of several splits; one row without a sequence."""
    step, rows = step_of(name, 4), {0: sequence(75, 1), 1: sequence(1, 3), 3: sequence(33, 2)}
    expected = {}
    for row, tokens in rows.items():
        logits, seen = reference(name, tokens)
        expected[row] = logits[-1]
        remember(step, row, tokens, seen)
    poison(step)
    step.step(4, 80)
    for row, tokens in rows.items():
        assert error(step.buffers.logits[row], expected[row]) < 2e-2
        assert int(step.tokens[row]) == int(step.buffers.logits[row].argmax())
        assert int(step.emitted[row, len(tokens)]) == int(step.tokens[row])
        assert int(step.positions[row]) == len(tokens)
    assert int(step.positions[2]) == -1
