"""The reference decoder against transformers, through every way a model can be opened."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import tiny_gguf as gguf_files
from ggml_blocks import dequantize
from hasten.errors import ModelError, UsageError
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.runtime.reference import ReferenceDecoder
from specs import changed, flat_of
from tiny_models import TINY, Tiny, greedy, int8_groups, logits, prompts

IN_GGUF = [name for name, tiny in TINY.items() if tiny.gguf]
WINDOWED = [name for name in TINY if name in ("mistral", "qwen2-sliding", "gemma3", "phi3-sliding")]


def reference(source: Source) -> ReferenceDecoder:
    return ReferenceDecoder(source.config, {name: dequantize(t) for name, t in source.tensors.items()})


def assert_same_logits(decoder: ReferenceDecoder, model, tolerance: float = 2e-5) -> None:
    """Largest difference within `tolerance` of the logits' spread, for prompts of several lengths.

    The model computes in float64: on some processors its float32 sums err more than this decoder's.
    """
    exact = copy.deepcopy(model).double()
    for prompt in prompts():
        wanted = logits(exact, prompt)
        got = decoder.logits(prompt)
        assert np.abs(got - wanted).max() <= tolerance * wanted.std()


@pytest.mark.parametrize("name", TINY)
def test_folder_gives_the_logits_and_tokens_of_transformers(name, tiny_model, tiny_folder):
    decoder, model = reference(open_model(tiny_folder(name))), tiny_model(name)
    assert_same_logits(decoder, model)
    continuations = [decoder.generate(prompt, 32) for prompt in prompts(2)]
    assert continuations == [greedy(model, prompt, 32) for prompt in prompts(2)]
    # a model that repeats a token would let almost any decoder pass
    assert len({token for tokens in continuations for token in tokens}) >= 8


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_gives_the_logits_and_tokens_of_transformers(name, tiny_gguf):
    path, model = tiny_gguf(name)
    decoder = reference(open_model(path))
    assert_same_logits(decoder, model)
    prompt = prompts()[0]
    assert decoder.generate(prompt, 32) == greedy(model, prompt, 32)


@pytest.mark.parametrize("dtype", gguf_files.TYPES)
def test_gguf_values_of_every_type_are_kept(dtype, tiny_gguf):
    path, model = tiny_gguf("llama-wide", dtype)
    source = open_model(path)
    assert {t.dtype for t in source.tensors.values()} == {"F32", dtype}
    assert_same_logits(reference(source), model)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "Q5_1"])
@pytest.mark.parametrize("name", ["gemma3", "phi3", "smollm3", "qwen2"])
def test_quantised_gguf_of_other_architectures(name, dtype, tiny_gguf):
    path, model = tiny_gguf(name, dtype)
    assert_same_logits(reference(open_model(path)), model)


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3", "phi3", "qwen3-yarn"])
@pytest.mark.parametrize(
    "how", [{"shards": True}, {"dtype": "float32"}, {"dtype": "float16"}, {"old_config": True}]
)
def test_folder_of_another_make(name, how, tiny_model, tiny_folder):
    folder = tiny_folder(name, **how)
    assert ("shards" in how) == (len(list(folder.glob("*.safetensors"))) > 1)
    assert_same_logits(reference(open_model(folder)), tiny_model(name), 1e-4)


@pytest.mark.parametrize("name", TINY)
def test_ragged_batch_equals_each_sequence_alone(name, tiny_folder):
    decoder = reference(open_model(tiny_folder(name)))
    batch = prompts(5)
    alone = np.concatenate([decoder.logits(prompt) for prompt in batch])
    np.testing.assert_allclose(decoder.logits(batch), alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_matter_in_these_tests(name, tiny_folder):
    """The prompts are longer than the windows: without them the logits would differ."""
    import dataclasses

    source = open_model(tiny_folder(name))
    wide = dataclasses.replace(source, config=changed(source.config, sliding_window=10_000))
    prompt = prompts()[0]
    difference = reference(source).logits(prompt) - reference(wide).logits(prompt)
    assert np.abs(difference[: flat_of(source.config).sliding_window]).max() < 1e-4
    assert np.abs(difference[-1]).max() > 0.1


def test_batched_transformers_with_padding_agrees(tiny_model, tiny_folder):
    """transformers' own ragged batch (left padding and a mask) gives what a packed batch gives here."""
    import torch

    model, decoder = tiny_model("qwen3"), reference(open_model(tiny_folder("qwen3")))
    batch = prompts()
    width = max(map(len, batch))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in batch])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        padded = model(ids, attention_mask=mask, position_ids=positions).logits
    wanted = torch.cat([row[width - len(p) :] for row, p in zip(padded, batch, strict=True)])
    np.testing.assert_allclose(decoder.logits(batch), wanted.numpy(), rtol=0, atol=1e-3)


def test_int8_groups_round_within_half_a_step():
    noise = np.random.default_rng(3).standard_normal((5, 70))
    x = (noise * np.logspace(-3, 3, 5)[:, None]).astype(np.float32)
    x[2] = 0
    rounded = int8_groups(x)
    assert rounded.shape == x.shape
    for first in range(0, 70, 32):
        group = x[:, first : first + 32]
        step = np.abs(group).max(-1, keepdims=True) / 127
        steps = np.divide(rounded[:, first : first + 32], step, out=np.zeros_like(group), where=step > 0)
        assert np.abs(steps - steps.round()).max() < 1e-3
        assert (np.abs(rounded[:, first : first + 32] - group) <= step * 0.5001).all()


def test_on_value_sees_and_replaces_what_an_engine_stores(tiny_folder):
    source = open_model(tiny_folder("qwen2"))
    config = source.config
    tensors = {name: dequantize(t) for name, t in source.tensors.items()}
    seen = {}

    def halve(name, x):
        seen[name] = tuple(x.shape)
        return x / 2 if name == "embed" else x

    prompt = prompts()[1]
    halved = ReferenceDecoder(config, tensors, on_value=halve).logits(prompt)
    np.testing.assert_allclose(halved * 2, ReferenceDecoder(config, tensors).logits(prompt), atol=1e-4)
    wanted = {name: (len(prompt), cols) for name, (_, cols) in config.linear_shapes().items()}
    for layer in range(len(config.blocks)):
        for name, heads in [
            ("queries", config.blocks[0].mixer.heads),
            ("keys", config.blocks[0].mixer.kv_heads),
            ("values", config.blocks[0].mixer.kv_heads),
        ]:
            wanted[f"layers.{layer}.{name}"] = (len(prompt), heads, config.blocks[0].mixer.head_dim)
    assert seen == wanted


@pytest.mark.parametrize("tokens", [[], [-1], [263], [5, 10_000]])
def test_bad_tokens_are_refused(tokens, tiny_folder):
    decoder = reference(open_model(tiny_folder("llama")))
    with pytest.raises(UsageError):
        decoder.hidden(tokens)


def test_missing_and_misshapen_tensors_are_named(tiny_folder):
    source = open_model(tiny_folder("llama"))
    tensors = {name: dequantize(t) for name, t in source.tensors.items()}
    with pytest.raises(ModelError, match=r"layers\.1\.k"):
        ReferenceDecoder(source.config, {n: t for n, t in tensors.items() if n != "layers.1.k"})
    with pytest.raises(ModelError, match="final_norm"):
        ReferenceDecoder(source.config, {**tensors, "final_norm": tensors["final_norm"][:-1]})


def test_every_architecture_is_here():
    architectures = {(Tiny.config(tiny).model_type, tiny.gguf) for tiny in TINY.values()}
    assert {a for a, _ in architectures} == {
        "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "smollm3", "olmo2",
    }  # fmt: skip
