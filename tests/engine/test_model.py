"""LanguageModel: batches, completions, requests that cannot be, and options out of range."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions, Format, Recipe
from hasten.engine.model import LanguageModel, load_packed
from hasten.engine.request import Request
from hasten.errors import HastenError, ModelError, UsageError
from hasten.models.open import open_model
from hasten.runtime.sampling import SamplingOptions
from hasten.weights.packed import pack_linear, pack_model

OPTIONS = EngineOptions(threads=1, context=128, max_sequences=3, prefill_chunk=16)
GREEDY = SamplingOptions(ignore_eos=True)
PROMPTS = ["the cat sat", "in an hour", "x", "你好, world", "the end of the beginning of the end"]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> LanguageModel:
    return hasten.load(tiny_folder("qwen3"), "w4", options=OPTIONS)


@pytest.fixture(scope="module")
def ends(model: LanguageModel, tiny_folder: Callable[..., Path], tmp_path_factory: Any) -> LanguageModel:
    """The same model, but the fourth token it says to the first prompt is an end token."""
    folder = Path(shutil.copytree(tiny_folder("qwen3"), tmp_path_factory.mktemp("ends") / "model"))
    said = model.generate(PROMPTS[:1], 4, chat=False)[0].token_ids[-1]
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**config, "eos_token_id": [262, said]}))
    return hasten.load(folder, "w4", options=OPTIONS)


def alone(model: LanguageModel, prompt: str, count: int, **options: Any) -> list[int]:
    return list(model.stream(model.tokenizer.encode(prompt), count, SamplingOptions(**options)))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}], ids=str)
def test_a_batch_gives_each_what_it_gets_alone(model: LanguageModel, options: dict[str, Any]) -> None:
    """Five prompts in groups of three."""
    before = model.executor.pool.free
    completions = model.generate(PROMPTS, 12, chat=False, **options)
    assert [c.token_ids for c in completions] == [alone(model, p, 12, **options) for p in PROMPTS]
    assert model.executor.pool.free == before
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.prompt_tokens == len(model.tokenizer.encode(prompt))
        assert completion.text == model.tokenizer.decode(completion.token_ids)
        assert completion.ttft_ms and completion.decode_tok_per_s
        assert completion.finish_reason == ("length" if len(completion.token_ids) == 12 else "stop")


def test_an_end_token_ends_one_of_a_batch(ends: LanguageModel, model: LanguageModel) -> None:
    first, *others = ends.generate(PROMPTS[:3], 10, chat=False)
    assert first.finish_reason == "stop" and first.token_ids[-1] in ends.tokenizer.eos_ids
    assert len(first.token_ids) <= 4
    for completion, prompt in zip(others, PROMPTS[1:3], strict=True):
        assert completion.token_ids == alone(ends, prompt, 10)


def test_chat_goes_through_the_template(model: LanguageModel) -> None:
    ids = model.tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    completion = model.generate(["hello"], 5)[0]
    assert completion.prompt_tokens == len(ids) > len(model.tokenizer.encode("hello"))
    assert completion.token_ids == list(model.stream(ids, 5))


def test_nothing_asked_for(model: LanguageModel) -> None:
    assert model.generate([], 5) == []
    completion = model.generate(["hello"], 0)[0]
    assert completion.token_ids == [] and completion.text == "" and completion.finish_reason == "length"
    assert completion.ttft_ms is None and completion.decode_tok_per_s is None
    assert model.generate(["hello"], 1)[0].decode_tok_per_s is None


@pytest.mark.parametrize(
    "prompts, options, word",
    [
        ("one string", {}, "list of prompts"),
        ([""], {}, "empty"),
        (["fine", ""], {"chat": False}, "empty"),
        (["the " * 200], {}, "tokens"),
        (["fine"], {"max_new_tokens": -1}, "-1"),
        (["fine"], {"temperature": -1.0}, "temperature"),
        (["fine"], {"top_p": 0.0}, "top_p"),
    ],
)
def test_requests_that_cannot_be(
    model: LanguageModel, prompts: Any, options: dict[str, Any], word: str
) -> None:
    before = model.executor.pool.free
    with pytest.raises(UsageError, match=word) as caught:
        model.generate(prompts, **{"max_new_tokens": 3, **options})
    assert caught.value.hint
    assert model.executor.pool.free == before


def test_a_batch_left_early_gives_its_pages_back(model: LanguageModel) -> None:
    before = model.executor.pool.free
    with model.engine() as engine:
        batch = engine.run([Request(ids, 9, GREEDY) for ids in ((1, 2, 3), (4,), (5, 6), (7,))])
        for _ in range(5):
            next(batch)
        assert model.executor.pool.free < before
    assert model.executor.pool.free == before


def test_more_tokens_than_the_context_holds(model: LanguageModel) -> None:
    prompts = [tuple(range(1, 126)), (5,) * 120, (9,)]
    tokens = dict.fromkeys("012", 0)
    with model.engine() as engine:
        for output in engine.run([Request(ids, 11, GREEDY, id=str(i)) for i, ids in enumerate(prompts)]):
            tokens[output.request_id] += len(output.token_ids)
    assert tokens == {"0": 3, "1": 8, "2": 11}


def test_hidden_and_logits(model: LanguageModel) -> None:
    ids = np.arange(40, dtype=np.int32)
    hidden = model.hidden(ids)
    assert hidden.shape == (40, 64) and hidden.dtype == np.float32
    np.testing.assert_array_equal(model.logits(ids), model.logits_of(hidden))
    assert model.hidden(np.zeros(0, np.int32)).shape == (0, 64)
    assert model.logits_of(hidden[:0]).shape == (0, 263)
    assert model.logits(ids)[-1].argmax() == next(model.stream(ids.tolist(), 1))
    for bad, word in (([263], "263"), ([-1], "-1"), ([0] * 129, "context")):
        with pytest.raises(UsageError, match=word):
            model.hidden(np.array(bad, np.int32))


def test_a_layer_replaced(tiny_folder: Callable[..., Path]) -> None:
    """As the search does: one layer in another layout, and back."""
    source = open_model(tiny_folder("qwen3"))
    model = load_packed(pack_model(source, Recipe.parse("w4"), 1), source, OPTIONS)
    ids, bits, old = list(range(50)), model.bits_per_weight, model.packed.linears["layers.1.up"]
    before = model.logits(ids)
    model.replace("layers.1.up", pack_linear(source.tensors["layers.1.up"], Format.of(16), threads=1))
    recipe = Recipe("mix", Format.of(4), None, {"layers.1.up": Format.of(16)})
    wanted = load_packed(pack_model(source, recipe, 1), source, OPTIONS)
    np.testing.assert_array_equal(model.logits(ids), wanted.logits(ids))
    assert model.bits_per_weight == wanted.bits_per_weight > bits
    assert (model.logits(ids) != before).any()
    model.replace("layers.1.up", old)
    np.testing.assert_array_equal(model.logits(ids), before)


def test_weights_that_overflow_are_named_not_spoken(tiny_folder: Callable[..., Path]) -> None:
    """Logits that are NaN end in an error, whatever the recipe."""
    source = open_model(tiny_folder("qwen3"))
    for recipe in ("bf16", "w4", "w8-kv8"):
        packed = pack_model(source, Recipe.parse(recipe), 1)
        packed.vectors["layers.1.mlp_norm"] = np.full(64, np.float32(3e38))
        with pytest.raises(HastenError, match="no numbers") as caught:
            list(load_packed(packed, source, OPTIONS).stream([1, 2, 3], 3))
        assert caught.value.hint


def test_closed_twice(tiny_folder: Callable[..., Path]) -> None:
    model = hasten.load(tiny_folder("llama"), threads=1)
    model.close()
    model.close()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"threads": 0}, "0 threads"),
        ({"threads": -3}, "-3 threads"),
        ({"threads": 10_000}, "10000 threads"),
        ({"context": 0}, "context of 0"),
        ({"context": 1 << 20}, "made for"),
        ({"options": EngineOptions(max_sequences=0)}, "0 sequences"),
    ],
    ids=str,
)
def test_engine_options_out_of_range(
    tiny_folder: Callable[..., Path], options: dict[str, Any], word: str
) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        hasten.load(tiny_folder("llama"), **options)
    assert caught.value.hint


@pytest.mark.parametrize("recipe", ["w3", "", "w4-", "bf16-g64", "w4-g48", "w4_head8"])
def test_recipes_that_do_not_exist(tiny_folder: Callable[..., Path], recipe: str) -> None:
    with pytest.raises(UsageError) as caught:
        hasten.load(tiny_folder("llama"), recipe)
    assert caught.value.hint


def test_models_that_do_not_exist(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for ref in (tmp_path / "empty", tmp_path / "none.gguf", "no such/model/here"):
        with pytest.raises(HastenError) as caught:
            hasten.load(ref)
        assert caught.value.hint


def test_widths_that_groups_do_not_divide(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="66 inputs"):
        hasten.load(tiny_folder("llama-odd"), "w4", threads=1)


def test_damaged_weights_are_named(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder("llama", "float32"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for recipe in ("bf16", "w4"):
        with pytest.raises(ModelError, match=r"layers\.1\.(up|mlp)"):
            hasten.load(folder, recipe, threads=1)


def test_an_instruction_set_this_machine_lacks(tiny_folder: Callable[..., Path]) -> None:
    code = (
        "import sys, hasten\nfrom hasten.errors import MachineError\n"
        "try: hasten.load(sys.argv[1])\nexcept MachineError as e: print(e.message, e.hint); sys.exit(7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder("llama"))],
        env={**os.environ, "HASTEN_ISA": "neon9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    assert "neon9" in done.stdout and "scalar" in done.stdout


def test_no_torch_on_the_way(tiny_folder: Callable[..., Path]) -> None:
    code = (
        "import sys, hasten\nmodel = hasten.load(sys.argv[1], 'w4', threads=1)\n"
        "assert model.generate(['the'], 3, chat=False)[0].token_ids\n"
        "assert not {'torch', 'transformers', 'gguf'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_folder("qwen3"))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
