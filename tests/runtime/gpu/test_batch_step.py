"""The batched decode step against the plain decoder: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")
if DEVICE == "cpu":
    import mended_interpreter

    mended_interpreter.mend()

from hasten.core import RopeScaling  # noqa: E402
from hasten.errors import ModelError, UsageError  # noqa: E402
from hasten.runtime.gpu import batch_step, batch_weights  # noqa: E402
from hasten.runtime.gpu.batch_step import MOST_ROWS, PAGE, BatchStep, StepOptions  # noqa: E402
from hasten.runtime.gpu.batch_weights import AttentionTile, Tile  # noqa: E402
from hasten.runtime.gpu.plain import PagedCache  # noqa: E402
from hasten.runtime.reference import ReferenceDecoder  # noqa: E402
from specs import changed, spec  # noqa: E402

LLAMA = spec(
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
    "one layer": changed(LLAMA, num_layers=1),
    "llama3 rope": changed(
        LLAMA,
        rope_scaling=RopeScaling(
            "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64
        ),
    ),
    "qwen3": changed(LLAMA, architecture="qwen3", qk_norm="head", head_dim=16, tied_head=True),
    "qwen2": changed(
        LLAMA, architecture="qwen2", num_kv_heads=1, biases=("q", "k", "v", "o", "gate", "up", "down")
    ),
    "partial rotary": changed(LLAMA, architecture="phi3", rotary_dim=16),
    "odd head": changed(LLAMA, architecture="phi3", head_dim=24),
    "no rotary in layer 1": changed(LLAMA, architecture="smollm3", rope_layers=(True, False)),
    "window": changed(LLAMA, architecture="mistral", sliding_window=21, sliding_layers=(True, False)),
    "gemma3": changed(
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
SMALL = AttentionTile(split=32, block=16)
CONTEXT = 96  # tokens: three pages, three splits


def tensors_of(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors, bf16 values, of a size that makes logits differ by units."""
    generator, made = np.random.default_rng(seed), {}
    for key, shape in MODELS[name].parameter_shapes().items():
        noise = generator.standard_normal(shape)
        value = (
            1 + 0.2 * noise
            if key.endswith("norm")
            else noise * (1.5 if len(shape) == 1 else 1.5 * shape[1] ** -0.5)
        )
        made[key] = torch.from_numpy(value).to(torch.bfloat16).float().numpy()
    return made


def step_of(
    name: str, rows: int, precision: str = "bf16", tiles=None, is_kv_int8: bool = False, **options
) -> BatchStep:
    tensors = tensors_of(name)

    def tensor_of(key):
        return torch.from_numpy(tensors[key]) if key in tensors else None

    weights = batch_weights.load(MODELS[name], tensor_of, CONTEXT, precision, DEVICE)
    wanted = StepOptions(rows=rows, pages=3 * rows, context=CONTEXT, keep_logits=True, **options)
    cache = PagedCache(MODELS[name], 3 * rows, DEVICE, is_kv_int8)
    step = BatchStep(weights, wanted, tiles, lambda rows, is_int8: SMALL, cache)
    order = np.random.default_rng(5).permutation(3 * rows).reshape(rows, 3)
    step.table[:rows] = torch.from_numpy(order).to(DEVICE, torch.int32)
    return step


def sequence(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, LLAMA.vocab, length).tolist()


def reference(
    name: str, tokens: list[int], hook=None, matrices=None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The plain decoder's logits [T, V], rounding where the step does; keys, values [T, K, D] by name."""
    seen: dict[str, torch.Tensor] = {}

    def rounded(key: str, given: np.ndarray) -> np.ndarray:
        value = torch.from_numpy(given).to(torch.bfloat16).float()
        seen[key] = value if hook is None else hook(key, value)
        return seen[key].numpy()

    tensors = tensors_of(name)
    if matrices is not None:
        tensors = {key: matrices(t).numpy() if is_matrix(key) else t for key, t in tensors.items()}
    return torch.from_numpy(ReferenceDecoder(MODELS[name], tensors, rounded).logits(tokens)), seen


def is_matrix(key: str) -> bool:
    return key == "head" or (
        key.startswith("layers.") and key.rsplit(".", 1)[-1] in ("q", "k", "v", "o", "gate", "up", "down")
    )


def in_e4m3(rows) -> torch.Tensor:
    """Each row rounded to e4m3 with a scale of its own."""
    rows = torch.as_tensor(rows)
    scale = rows.abs().amax(-1, keepdim=True) / 448
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def remember(step: BatchStep, row: int, tokens: list[int], seen: dict[str, torch.Tensor]) -> None:
    """Put keys and values of all tokens but the last into the row's pages, and that token into the row."""
    config = step.weights.config
    order = torch.from_numpy(batch_weights.rotary_order(config))
    for layer in range(len(config.blocks)):
        keys, values = seen[f"layers.{layer}.keys"][..., order], seen[f"layers.{layer}.values"]
        for t in range(len(tokens) - 1):
            page = int(step.table[row, t // PAGE])
            at = torch.tensor([page * PAGE + t % PAGE], device=DEVICE)
            step.cache.put(layer, at, keys[t : t + 1].to(DEVICE), values[t : t + 1].to(DEVICE))
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


def filled(
    name: str, lengths: dict[int, int], rows: int, **options
) -> tuple[BatchStep, dict[int, torch.Tensor]]:
    """A step whose rows hold sequences of these lengths, and the logits that each is to give."""
    step, expected = step_of(name, rows, **options), {}
    for row, length in lengths.items():
        logits, seen = reference(name, sequence(length, length))
        expected[row] = logits[-1]
        remember(step, row, sequence(length, length), seen)
    return step, expected


@pytest.mark.parametrize("rounds_itself", [16, 0])
def test_fp8_rounds_weights_and_inputs_by_row(monkeypatch, rounds_itself: int) -> None:
    """Both ways of rounding inputs, in the product and before it, give the plain decoder's logits."""
    monkeypatch.setattr(batch_step, "_ROUNDS_ITSELF", rounds_itself)
    step = step_of("one layer", 2, "fp8")
    inputs = lambda key, value: in_e4m3(value) if is_matrix(key) else value  # noqa: E731
    logits, seen = reference("one layer", sequence(40, 4), inputs, in_e4m3)
    remember(step, 1, sequence(40, 4), seen)
    poison(step)
    step.step(2, 40)
    assert error(step.buffers.logits[1], logits[-1]) < 7e-2  # a value that rounds the other way is 6 %
    in_bf16, _ = reference("one layer", sequence(40, 4))
    assert error(step.buffers.logits[1], logits[-1]) < 0.7 * error(in_bf16[-1], logits[-1])


def in_int8(heads) -> torch.Tensor:
    """Each token's head rounded to int8 with a scale of its own."""
    scale = heads.abs().amax(-1, keepdim=True) / 127
    return (heads / scale).round() * scale


@pytest.mark.parametrize("name", ["llama", "qwen3", "odd head", "window", "gemma3"])
def test_int8_pages_give_the_logits_of_rounded_keys_and_values(name: str) -> None:
    """Rows of one token, of a page and one token, and of several splits, beside what ends of pages hold."""
    step, rows = (
        step_of(name, 4, is_kv_int8=True),
        {0: sequence(75, 1), 1: sequence(1, 3), 3: sequence(33, 2)},
    )
    for part in step.cache.arrays[2:]:
        part.fill_(float("nan"))  # of other sequences, or of none
    expected = {}
    for row, tokens in rows.items():
        kept = lambda key, value: in_int8(value) if key.endswith(("keys", "values")) else value  # noqa: E731
        logits, seen = reference(name, tokens, kept)
        expected[row] = logits[-1], {k: v[-1] for k, v in seen.items() if k.endswith(("keys", "values"))}
        remember(step, row, tokens, seen)
    poison(step)
    step.step(4, 80)
    order = torch.from_numpy(batch_weights.rotary_order(MODELS[name]))
    for row, (logits, new) in expected.items():
        assert error(step.buffers.logits[row], logits) < 2e-2
        at = len(rows[row]) - 1
        page, slot = step.table[row, at // PAGE].view(1), at % PAGE
        keys, values = (part[:, slot].float() for part in step.cache.take(0, page, PAGE))
        assert error(keys, new["layers.0.keys"][..., order]) < 1e-2
        assert error(values, new["layers.0.values"]) < 1e-2


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "partial rotary"])
def test_sizes_of_keys_that_int8_evens_out_change_no_score(name: str) -> None:
    """Keys are divided by powers of two and queries multiplied: their products are the same to the bit.

    Where keys have biases (qwen2), what hardly turns of those is taken off too, which rounds otherwise.
    """
    tensors = {key: torch.from_numpy(value) for key, value in tensors_of(name).items()}
    for key, value in tensors.items():
        if key.endswith((".k", ".k_norm", ".k.bias")):
            value[3::5] *= 16
    found = []
    for is_kv_int8 in (False, True):
        weights = batch_weights.load(
            MODELS[name], tensors.get, CONTEXT, "bf16", DEVICE, is_kv_int8=is_kv_int8
        )
        step = BatchStep(weights, StepOptions(1, 3, CONTEXT, True), None, lambda rows, is_int8: SMALL)
        step.table[0] = torch.arange(3)
        step.positions[0] = 0
        for token in sequence(3, 4):
            step.tokens[0] = token
            step.step(1, 4)
        found.append((step.buffers.logits[0].clone(), step.keys[0].float().abs().amax((0, 1, 2))))
    assert error(found[1][0], found[0][0].cpu()) < (2e-2 if name == "qwen2" else 1e-30)
    spread = [float(sizes.log2().std()) for _, sizes in found]
    assert spread[1] < (1 if name == "qwen2" else 0.8) * spread[0]


def test_splits_of_a_product_are_summed() -> None:
    step, expected = filled(
        "llama", {0: 5}, 1, tiles=lambda product, m: Tile(32, 16, 1 if product == "head" else 3)
    )
    poison(step)
    step.step(1, 6)
    assert error(step.buffers.logits[0], expected[0]) < 2e-2
    assert not step.buffers.arrivals.any() and not step.buffers.row_arrivals.any()


def test_company_and_place_change_no_bit() -> None:
    """One sequence alone, then in another row beside others of other lengths: the same logits and token."""
    found = []
    for row, lengths in ((0, {0: 70}), (2, {0: 3, 1: 90, 2: 70})):
        step, _ = filled("qwen3", lengths, 3)
        step.step(3, 91)
        found.append((step.buffers.logits[row].clone(), int(step.tokens[row])))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_each_variation_matters() -> None:
    """What the plain decoder gives without a window, a soft-cap or rotary embedding is far away."""
    for name in ("window", "gemma3", "no rotary in layer 1", "partial rotary"):
        logits, _ = reference(name, sequence(75, 1))
        config = changed(
            MODELS[name], sliding_window=None, attention_softcap=None, rope_layers=(), rotary_dim=None
        )
        without = torch.from_numpy(ReferenceDecoder(config, tensors_of(name)).logits(sequence(75, 1)))
        assert error(without[-1], logits[-1]) > 5e-2


def test_rows_past_the_batch_are_not_touched() -> None:
    step, _ = filled("llama", {0: 3, 1: 9}, 2)
    keys = [cache.clone() for cache in step.keys]
    step.step(1, 10)
    assert int(step.positions[1]) == 8
    page = int(step.table[1, 0])
    assert all(torch.equal(now[page], before[page]) for now, before in zip(step.keys, keys, strict=True))


def test_a_row_of_nan_picks_no_token() -> None:
    step, _ = filled("llama", {0: 3, 1: 9}, 2)
    step.values[0][int(step.table[0, 0])] = float("nan")
    step.step(2, 10)
    assert int(step.tokens[0]) == -1 and int(step.tokens[1]) == int(step.buffers.logits[1].argmax())
    step.step(2, 11)  # the next one finds an embedding all the same
    assert int(step.tokens[0]) == -1 and step.buffers.logits[1].isfinite().all()


def test_what_is_not_computed_is_refused() -> None:
    with pytest.raises(ModelError, match="olmo2"):
        batch_weights.load(
            changed(LLAMA, architecture="olmo2", qk_norm="full"), lambda name: None, 64, "bf16", DEVICE
        )
    with pytest.raises(ModelError, match="multiples of 32"):
        batch_weights.load(changed(LLAMA, hidden_size=66), lambda name: None, 64, "bf16", DEVICE)
    with pytest.raises(ModelError, match="'embed' is missing"):
        batch_weights.load(LLAMA, lambda name: None, 64, "bf16", DEVICE)
    with pytest.raises(UsageError, match="97 tokens"):
        step_of("llama", 1).shape(1, 97)
    with pytest.raises(UsageError, match=f"1 to {MOST_ROWS} rows"):
        step_of("llama", MOST_ROWS + 1)
