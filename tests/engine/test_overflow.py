"""A text whose values overflow ends in an error, and reaches nobody else: by pages, prefixes or disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hasten
from hasten.core import EngineOptions, ServingOptions
from hasten.engine.engine import Engine
from hasten.engine.model import LanguageModel
from hasten.engine.request import Request
from hasten.runtime.sampling import SamplingOptions

POISON = 40  # this token's keys and values overflow in the first layer, nobody else's do
RECIPES = ["bf16", "bf16-kv8"]
LENGTHS = (1, 5, 31, 32, 33, 64, 65, 100)
Answer = tuple[tuple[int, ...], str | None]


@pytest.fixture(scope="module")
def folder(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("overflow") / "model"
    shutil.copytree(tiny_folder("qwen3", "float32"), made)
    file = made / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])

    def tensor(name: str) -> np.ndarray:  # a view: writing it changes the file's bytes
        first, last = header[name]["data_offsets"]
        return np.frombuffer(raw, np.float32, (last - first) // 4, start + first).reshape(
            header[name]["shape"]
        )

    embedding = tensor("model.embed_tokens.weight")
    embedding[:, 0] = 0
    embedding[POISON] = 0
    embedding[POISON, 0] = 1
    for which in ("v_proj", "k_proj"):
        tensor(f"model.layers.0.self_attn.{which}.weight")[:, 0] = 3e38
    file.write_bytes(raw)
    return made


@pytest.fixture(params=RECIPES)
def model(request: pytest.FixtureRequest, folder: Path) -> LanguageModel:
    return hasten.load(
        folder, request.param, context=256, options=EngineOptions(max_sequences=2, prefill_chunk=64)
    )


def text(length: int) -> list[int]:
    return [(7 * length + i) % 36 + 3 for i in range(length)]


def answer(engine: Engine, prompt: list[int]) -> Answer:
    request = Request(tuple(prompt), max_new_tokens=8, sampling=SamplingOptions(ignore_eos=True))
    outputs = list(engine.stream(request))
    return tuple(t for output in outputs for t in output.token_ids), outputs[-1].finish_reason


@pytest.fixture
def alone(model: LanguageModel) -> dict[int, Answer]:
    """What innocent prompts get on pages that nobody used."""
    with model.engine(ServingOptions(prefix_cache=False)) as engine:
        answers = {length: answer(engine, text(length)) for length in LENGTHS}
    assert all(finish == "length" for _, finish in answers.values())
    return answers


def test_recycled_pages(model: LanguageModel, alone: dict[int, Answer]) -> None:
    with model.engine(ServingOptions(prefix_cache=False)) as engine:
        for turn, (length, wanted) in enumerate(alone.items()):
            assert answer(engine, [POISON] * (17 + 40 * turn % 200) + [5])[1] == "error"
            assert answer(engine, text(length)) == wanted
            assert list(model.stream(text(length), 8, SamplingOptions(ignore_eos=True))) == list(wanted[0])


def test_prefixes_of_a_text_that_overflows_later(
    model: LanguageModel, alone: dict[int, Answer], tmp_path: Path
) -> None:
    """What stands before the token that overflows is computed with it, and is as good as ever."""
    options = ServingOptions(kv_disk=tmp_path)
    with model.engine(options) as engine:
        for length in LENGTHS:
            assert answer(engine, [*text(length), POISON, POISON, 5])[1] == "error"
        hits = engine.counters.prefix_hit_tokens
        assert {length: answer(engine, text(length)) for length in LENGTHS} == alone
        assert engine.counters.prefix_hit_tokens > hits  # they were read from those pages, tails too
    with model.engine(options) as engine:
        assert {length: answer(engine, text(length)) for length in LENGTHS} == alone
        assert engine.counters.disk_hit_tokens > 0


def test_company(model: LanguageModel, alone: dict[int, Answer]) -> None:
    """In the same steps."""
    for length, (tokens, _) in alone.items():
        with model.engine() as engine:
            engine.add(Request((*text(9), POISON, 6), max_new_tokens=8, id="bad"))
            engine.add(Request(tuple(text(length)), 8, sampling=SamplingOptions(ignore_eos=True), id="good"))
            got: list[int] = []
            ends: dict[str, str | None] = {}
            while engine.busy:
                for output in engine.step():
                    got += output.token_ids if output.request_id == "good" else ()
                    ends[output.request_id] = output.finish_reason
        assert (tuple(got), ends) == (tokens, {"bad": "error", "good": "length"})
