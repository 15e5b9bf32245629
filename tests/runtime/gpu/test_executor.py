"""The GPU executor against the CPU's, on tiny models: in plain torch, and on a GPU where there is one.

Logits differ by rounding (`BF16` of the spread); tokens must be equal where the CPU's own margin says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running_models import BF16, FP8, GREEDY, answers, is_greedy, patient, running

from hasten.core import Recipe, ServingOptions
from hasten.engine.grammar import Grammar
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.errors import MachineError, ModelError, UsageError
from hasten.models.open import open_model
from hasten.models.source import Source
from hasten.runtime import executor as executors
from hasten.runtime.executor import Draw, Part
from hasten.runtime.gpu import batch_weights
from hasten.runtime.gpu import executor as gpu
from hasten.runtime.gpu.shape import PAGE
from hasten.runtime.gpu.tiles import matrix_of, weight_bytes
from hasten.runtime.pages import CachedSequence, DeviceMemory
from hasten.runtime.sampling import SamplingOptions, SequenceSampler
from hasten.weights.packed import pack_model, values_of
from tiny_models import Tiny, greedy, logits, prompts, save_folder

KINDS = [
    "llama",
    "llama-wide",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3",
    "gemma3-capped",
    "phi3-sliding",
    "smollm3",
]
HEADS = Tiny("llama-64", "llama", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}, None, 33)
"""Heads that the persistent kernel holds in the common layout of keys and values."""
BIASED = Tiny("qwen2-64", "qwen2", {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}, None, 86)
"""The same with biases of keys, which every kernel takes off what hardly turns."""
KV8 = 0.03  # of the logits' spread: keys and values rounded to int8


def fitting(source: Source, room: int) -> list[list[int]]:
    return [prompt for prompt in prompts() if len(prompt) + room <= source.config.context]


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_greedy_tokens_are_the_cpu_engines(
    name: str, device: str, tiny_folder: Callable[..., Path]
) -> None:
    source = open_model(tiny_folder(name))
    count = min(24, source.config.context - len(prompts()[0]))
    with running(source, "cpu") as cpu, running(source) as other:
        for prompt in fitting(source, 0):
            wanted, got = cpu.logits(prompt), other.logits(prompt)
            assert np.sqrt(np.mean((got - wanted) ** 2)) < BF16 * wanted.std()
        first = list(prompts()[0])
        assert list(other.stream(first, count, GREEDY)) == list(cpu.stream(first, count, GREEDY))


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_greedy_tokens_are_transformers(
    name: str, device: str, tiny_folder: Callable[..., Path], tiny_model: Callable[[str], Any]
) -> None:
    source, right = open_model(tiny_folder(name)), tiny_model(name)
    with running(source) as model:
        for prompt in fitting(source, 0):
            wanted, got = logits(right, prompt), model.logits(prompt)
            assert np.sqrt(np.mean((got - wanted) ** 2)) < BF16 * wanted.std()
        first = list(prompts()[0])
        count = min(32, source.config.context - len(first))
        assert list(model.stream(first, count, GREEDY)) == greedy(right, first, count)


def test_chunks_pages_and_company_change_nothing(device: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("qwen3"))
    requests = [Request(tuple(prompt), 40 + 7 * i, GREEDY) for i, prompt in enumerate(fitting(source, 70))]
    with running(source, max_sequences=8) as model:
        found = [[answers(model, [one], speculate=False)[0] for one in requests]]
        found += [answers(model, requests, speculate=False), answers(model, requests)]
        model.executor.chunk = 7
        found.append(answers(model, requests, prefix_cache=False))
        for one in found:
            for request, tokens in zip(requests, one, strict=True):
                assert len(tokens) == request.max_new_tokens
                assert is_greedy(model, request.prompt, tokens)


@pytest.mark.parametrize("recipe", ["bf16", "bf16-kv8"])
def test_features_together_give_what_each_request_gets_alone(
    recipe: str,
    device: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefix cache, its disk tier, drafts, chunks, preemption, grammars, penalties, log-probabilities, n."""
    patient(monkeypatch)
    start, free = tuple(prompts()[2]), {"temperature": 0.8, "ignore_eos": True}
    punished = SamplingOptions(repetition_penalty=1.3, presence_penalty=0.5, seed=5, **free)
    requests = [
        Request(tuple(prompts()[0]), 100, GREEDY),
        Request(start[5:25], 95, GREEDY),
        Request(start, 40, GREEDY),
        Request((*start, 9), 40, SamplingOptions(top_p=0.9, seed=3, **free), logprobs=2),
        Request((*start, 10), 30, punished),
        Request(start, 30, SamplingOptions(1.0, seed=4), grammar=Grammar("regex", "[a-f]{5,20}[xyz]")),
        Request(start[:20], 20, SamplingOptions(seed=8, **free), n=2),
        Request((*start, 11), 1, GREEDY, prompt_logprobs=1),
    ]
    source, stats = open_model(tiny_folder("qwen3")), list[Any]()
    with running(source, recipe=recipe) as model:
        size = model.executor.page_bytes
    with running(source, recipe=recipe, max_sequences=8, context=4 * PAGE, kv_gb=6.5 * size / 1e9) as model:
        alone = [answers(model, [one], speculate=False, prefix_cache=False)[0] for one in requests]
        model.executor.chunk = 16
        together = [answers(model, requests, stats, kv_disk=tmp_path) for _ in range(2)]
        text = model.tokenizer.decode(together[1][5])
    assert stats[0].preemptions > 0 and stats[1].disk_hit_tokens > 0
    assert re.fullmatch("[a-f]{5,20}[xyz]", text)
    for found in together:
        equal = [np.mean(np.equal(a, b)) for a, b in zip(alone, found, strict=True) if len(a) == len(b)]
        # on a GPU prompts, answers and drafts round differently: a tie that turns changes all that follows
        # and how many drafts are tried, which decides the shapes of products, is a matter of time
        assert len(equal) == len(requests) and np.mean(equal) > (0.7 if device == "cpu" else 0.5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])
def test_int8_keys_and_values_round_as_the_cpu_engines_do(
    name: str, device: str, tiny_folder: Callable[..., Path]
) -> None:
    """Logits of a prompt and of answers: near the CPU's with int8 pages, and near those with bf16 pages."""
    source = open_model(tiny_folder(name))
    with running(source, "cpu", "bf16-kv8") as cpu, running(source, recipe="bf16-kv8") as other:
        assert other.executor.page_bytes < 0.8 * PAGE / cpu.executor.page_tokens * page_bytes(source, "bf16")
        for prompt in fitting(source, 0):
            wanted, got = cpu.logits(prompt), other.logits(prompt)
            assert np.sqrt(np.mean((got - wanted) ** 2)) < BF16 * wanted.std()
        first = list(prompts()[0])
        count = min(24, source.config.context - len(first))
        assert is_greedy(other, first, list(other.stream(first, count, GREEDY)))
    with running(source) as plain:
        wanted = plain.logits(prompt)
        assert np.sqrt(np.mean((got - wanted) ** 2)) < KV8 * wanted.std()


def page_bytes(source: Source, recipe: str) -> int:
    with running(source, "cpu", recipe) as cpu:
        return cpu.executor.page_bytes


@pytest.mark.parametrize("recipe", ["bf16", "bf16-kv8"])
def test_more_rows_than_own_products_take(recipe: str, device: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("llama"))
    prompts = np.random.default_rng(2).integers(0, 262, (70, 30)).tolist()
    requests = [Request(tuple(prompt), 12, GREEDY) for prompt in prompts]
    with running(source, recipe=recipe, context=64, max_sequences=70) as model:
        for prompt, tokens in zip(prompts, answers(model, requests, speculate=False), strict=True):
            assert is_greedy(model, prompt, tokens)


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("heads")
    save_folder(HEADS, folder, "bfloat16", False)
    return open_model(folder)


@pytest.fixture(scope="module")
def biased_heads(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("biased")
    save_folder(BIASED, folder, "bfloat16", False)
    source = open_model(folder)
    assert "k" in source.config.blocks[0].biases
    return source


def has_one_row(model: LanguageModel, device: str) -> bool:
    """Whether one sequence has a kernel of its own; True where none can have one."""
    executor: Any = model.executor
    return device == "cpu" or executor._one is not None or torch.cuda.get_device_capability()[0] != 9


def test_one_sequence_has_a_kernel_of_its_own(device: str, wide_heads: Source) -> None:
    prompt = prompts()[0]
    with running(wide_heads, "cpu") as cpu, running(wide_heads) as other:
        assert has_one_row(other, device)
        assert is_greedy(other, prompt, list(other.stream(prompt, 2 * PAGE, GREEDY)))
        assert is_greedy(cpu, prompt, list(other.stream(prompt, 2 * PAGE, GREEDY)))


def test_what_is_taken_off_keys_is_taken_off_by_every_kernel(
    device: str, biased_heads: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, one row and several rows: of a shift that one of them left out another would read too much."""
    shifts = {
        f"layers.{i}.key_shift": np.where(np.arange(128) % 32 > 16, 4.0, 0.0).astype(np.float32)
        for i in range(len(biased_heads.config.blocks))
    }
    with running(biased_heads) as plain:
        monkeypatch.setattr(batch_weights, "key_shifts", lambda config, vectors: shifts)
        with running(biased_heads) as other:
            assert has_one_row(other, device)
            requests = [Request(tuple(prompt), 2 * PAGE, GREEDY) for prompt in prompts()]
            alone = [answers(other, [request])[0] for request in requests]
            for found in (alone, answers(other, requests)):
                for request, tokens in zip(requests, found, strict=True):
                    assert is_greedy(plain, request.prompt, tokens)


def test_int8_pages_of_wide_heads(device: str, wide_heads: Source) -> None:
    """On a GPU these have a kernel of their own, which is right at every border of pages and splits."""
    rng = np.random.default_rng(6)
    requests = [Request(tuple(rng.integers(0, 262, n).tolist()), 40, GREEDY) for n in (1, 31, 32, 63, 300)]
    with running(wide_heads, recipe="bf16-kv8", max_sequences=8) as model:
        for request, tokens in zip(requests, answers(model, requests, speculate=False), strict=True):
            assert is_greedy(model, request.prompt, tokens)


@pytest.mark.parametrize("count", [1, 3])
def test_greedy_answers_without_numbers_end_with_an_error(
    count: int, device: str, wide_heads: Source
) -> None:
    """One token, of the three rows that hold it, overflows: its answer ends where it stands, others go on."""
    prompt = [int(token) for token in prompts()[0][:40]]
    with running(wide_heads, max_sequences=4) as model:
        wanted = [int(token) for token in model.stream(prompt, 8, GREEDY)]
        bad = next(token for token in range(262) if token not in (*prompt, *wanted))
        executor: Any = model.executor
        executor._weights.embed[bad] = float("inf")
        with model.engine(ServingOptions(speculate=False, prefix_cache=False)) as engine:
            for n in range(count):
                engine.add(
                    Request((*prompt, bad) if n == 1 or count == 1 else tuple(prompt), 8, GREEDY, id=str(n))
                )
            found: list[Any] = []
            while engine.busy:
                found += engine.step()
        for n in range(count):
            if count > 1 and n != 1:
                tokens = [t for one in found if one.request_id == str(n) for t in one.token_ids]
                assert len(tokens) == 8 and is_greedy(model, prompt, tokens)
    ended = [one for one in found if one.request_id == ("0" if count == 1 else "1") and one.finish_reason]
    assert [one.finish_reason for one in ended] == ["error"] and "no numbers" in ended[0].error


def test_a_greedy_token_without_numbers_is_said_in_mid_answer(device: str, wide_heads: Source) -> None:
    """The step that a GPU computes ahead, and one sequence's own kernel, say it too."""
    with running(wide_heads) as model:
        executor: Any = model.executor
        sequence, tokens = CachedSequence(), [int(token) for token in prompts()[0][:40]]
        decode(executor, sequence, tokens, 4)
        executor._weights.final_norm.fill_(float("nan"))
        if executor._tiled is not None:
            executor._tiled.tensors["final_norm"].fill_(float("nan"))
        sampler = SequenceSampler(GREEDY, [], executor.config.vocab)
        errors = []
        for _ in range(2):  # one of them may have been computed before
            part = Part(sequence, tokens[sequence.length :], draws=(Draw(sampler, len(tokens)),))
            (result,) = executor.collect(executor.submit([part]))
            errors.append(result.choices[0].error)
            tokens += result.choices[0].tokens or [0]
            executor.pool.truncate(sequence, len(tokens) - 1)
    assert "no numbers" in errors[-1]


def test_sampling_draws_what_the_cpu_engine_draws(device: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("llama"))
    sampling = SamplingOptions(0.9, top_p=0.9, seed=3, ignore_eos=True, repetition_penalty=1.2)
    request = Request(tuple(prompts()[0]), 24, sampling, logprobs=2)
    with running(source, "cpu") as cpu, running(source) as other:
        assert answers(other, [request]) == answers(cpu, [request])


def test_draws_from_the_highest_logits_are_those_from_all(
    device: str, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cut beside the others; a row without a cut beside them takes the whole row."""
    source, told = open_model(tiny_folder("llama")), list[int | None]()
    choose = gpu.choose_of_few

    def counted(*arguments: Any, **more: Any) -> list[int | None]:
        found = choose(*arguments, **more)
        told.extend(found)
        return found

    cuts: list[dict[str, Any]] = [
        {"top_k": 5},
        {"top_k": 20, "repetition_penalty": 1.2},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 0.0, "presence_penalty": 0.5},
        {},
    ]
    requests = [
        Request(
            tuple(prompts()[i % 3]),
            16,
            SamplingOptions(**{"temperature": 0.9, "seed": i, "ignore_eos": True} | c),
        )
        for i, c in enumerate(cuts)
    ]
    with running(source) as other:
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "_needs_few", lambda part: False)
            wanted = answers(other, requests)
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "choose_of_few", counted)
            assert answers(other, requests) == wanted
    assert sum(token is not None for token in told) >= 0.8 * 16 * 5


def decode(executor: Any, sequence: CachedSequence, tokens: list[int], count: int) -> list[int]:
    """So many steps of one token each, as the engine asks for them."""
    sampler = SequenceSampler(GREEDY, [], executor.config.vocab)
    for _ in range(count):
        new = tokens[sequence.length :]
        part = Part(sequence, new, draws=(Draw(sampler, len(tokens)),))
        (result,) = executor.collect(executor.submit([part]))
        tokens += result.choices[0].tokens
        executor.pool.truncate(sequence, len(tokens) - 1)
    return tokens


@pytest.mark.parametrize("recipe", ["bf16", "bf16-kv8"])
def test_a_step_ahead_leaves_no_trace(recipe: str, device: str, tiny_folder: Callable[..., Path]) -> None:
    """A sequence that runs ahead over page borders and is interrupted gets the tokens it would get alone."""
    source = open_model(tiny_folder("qwen3"))
    start = [int(token) for token in prompts()[0][:5]]
    with running(source, recipe=recipe) as model:
        executor: Any = model.executor
        free, whole = executor.pool.free, CachedSequence()
        wanted = decode(executor, whole, [*start], 2 * PAGE)
        assert executor._chain is not None, "nothing ran ahead"
        assert is_greedy(model, start, wanted[5:])
        one, other = CachedSequence(), CachedSequence()
        first = decode(executor, one, [*start], PAGE - 5)
        decode(executor, other, [9, 8, 7], 3)  # the step ahead of the first is thrown away
        assert decode(executor, one, first, 2 * PAGE - (PAGE - 5)) == wanted
        for sequence in (whole, one, other):
            executor.pool.truncate(sequence, 0)
        assert executor.pool.free == free


def test_a_sampled_sequence_has_the_kernel_too(device: str, wide_heads: Source) -> None:
    prompt = tuple(prompts()[0])
    cold = Request(prompt, 24, SamplingOptions(1e-3, seed=3, ignore_eos=True), logprobs=1)
    with running(wide_heads) as model:
        assert is_greedy(model, prompt, answers(model, [cold], speculate=False)[0])


@pytest.mark.parametrize("recipe", ["w4", "w8-g64", "w6", "w4-head8"])
def test_integers_decode_as_their_values(recipe: str, device: str, wide_heads: Source) -> None:
    """One sequence is decoded with the integers themselves on a GPU, a prompt with their values in bf16."""
    prompt = prompts()[0]
    with running(wide_heads, recipe=recipe) as model:
        assert has_one_row(model, device)
        assert is_greedy(model, prompt, list(model.stream(prompt, 40, GREEDY)))


@pytest.mark.parametrize("layout", ["fp8-e4m3", "fp8-e4m3-tensor", "fp8-e4m3-block", "mxfp4"])
def test_tables_mean_on_the_device_what_they_mean_in_numpy(
    layout: str, device: str, wide_heads: Source
) -> None:
    linear = pack_model(wide_heads, Recipe.parse(layout), 1).linears["layers.0.down"]
    assert np.array_equal(matrix_of(linear, device).cpu().numpy(), values_of(linear))


@pytest.mark.parametrize("recipe", ["fp8", "fp8-head16"])
def test_fp8_computes_with_a_vocabulary_of_any_size(recipe: str, device: str, wide_heads: Source) -> None:
    """Its 263 rows are no multiple of 16."""
    prompt = prompts()[0]
    with running(wide_heads, recipe=recipe) as model:
        assert is_greedy(model, prompt, list(model.stream(prompt, 20, GREEDY)), FP8)


def test_a_replaced_layer_counts_from_the_next_step(device: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("llama"))
    w4 = pack_model(source, Recipe.parse("w4"), 1)
    with running(source) as model, running(source, recipe="w4") as wanted:
        before = model.logits(prompts()[0])
        for name, linear in w4.linears.items():
            model.replace(name, linear)
        after, right = model.logits(prompts()[0]), wanted.logits(prompts()[0])
        assert np.abs(after - before).max() > 0.1
        assert np.sqrt(np.mean((after - right) ** 2)) < BF16 * right.std()


@pytest.mark.parametrize("name", ["foo", "layers.0.x", "layers.0.q"])
def test_a_layer_that_cannot_be_replaced_is_named(
    name: str, device: str, tiny_folder: Callable[..., Path]
) -> None:
    source = open_model(tiny_folder("llama"))
    with running(source) as model, pytest.raises(UsageError, match=f"{name} cannot be replaced"):
        model.replace(name, model.packed.linears["layers.0.down"])


@pytest.mark.parametrize("recipe", ["bf16", "bf16-kv8"])
def test_pages_travel(recipe: str, device: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("llama"))
    with running(source, recipe=recipe) as model:
        executor: Any = model.executor
        sequence = CachedSequence()
        executor.hidden(sequence, list(range(PAGE)))
        data = executor.read_page(sequence.pages[0])
        assert data.nbytes == executor.page_bytes and data.any()
        executor.pool.ensure(1)
        page = executor.pool.take()
        executor.write_page(page, data)
        assert np.array_equal(executor.read_page(page), data)


def test_what_it_cannot_do_is_named(device: str, tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="olmo2") as olmo, running(open_model(tiny_folder("olmo2"))):
        pass
    assert "--device cpu" in olmo.value.hint
    with pytest.raises(ModelError, match="longrope") as phi, running(open_model(tiny_folder("phi3"))):
        pass
    assert "--context 16" in phi.value.hint
    llama = open_model(tiny_folder("llama"))
    with (
        pytest.raises(UsageError, match="one context of 512") as small,
        running(llama, context=512, kv_gb=1e-5),
    ):
        pass
    assert small.value.hint


def test_a_model_too_large_for_the_gpu_is_told_what_fits(
    tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = open_model(tiny_folder("llama"))
    monkeypatch.setitem(executors.EXECUTORS, "cuda", executors.EXECUTORS["torch"])
    monkeypatch.setattr(executors, "choose_device", lambda wanted: (wanted, "in a test"))
    bf16, fp8 = (weight_bytes(llama.config, kind, kind) for kind in ("bf16", "fp8"))
    for left, hint in (((bf16 + fp8) // 2, "--recipe fp8"), (fp8 // 2, "--device cpu")):
        monkeypatch.setattr(
            gpu.TorchExecutor, "_memory", lambda self, _, left=left: DeviceMemory(left, 80 << 30, 0)
        )
        said = "the weights take .* GB .*free on the GPU"
        with pytest.raises(MachineError, match=said) as refused, running(llama):
            pass
        assert hint in (refused.value.hint or "") and "--device cpu" in (refused.value.hint or "")


def test_gpu_memory_sets_the_pages(device: str, tiny_folder: Callable[..., Path]) -> None:
    llama = open_model(tiny_folder("llama"))
    with running(llama, max_sequences=64) as model:
        executor: Any = model.executor
        pages = executor._limit + 1 + 40
        wanted = f"{gpu._RESERVE + executor._weights.bytes + pages * executor.page_bytes}B"
    if device == "cpu":  # on a GPU CUDA's own blocks count too
        with running(llama, max_sequences=64, gpu_memory=wanted) as small:
            assert f"--gpu-memory {wanted}" in small.executor.summary
            assert small.executor.pool.pages == 40
            assert list(small.stream([5, 6, 7], 4, GREEDY))
    with pytest.raises(UsageError, match="--gpu-memory"), running(llama, gpu_memory="lots"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_takes_the_cpu(tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(MachineError, match="no usable GPU") as wrong:
        executors.choose_device("cuda")
    assert "--device cpu" in wrong.value.hint
    device, because = executors.choose_device("auto")
    assert device == "cpu" and because
