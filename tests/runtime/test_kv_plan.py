"""How many pages a model gets: by what is free when it is loaded."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from hasten.core import EngineOptions, ModelSpec
from hasten.errors import UsageError
from hasten.machine.memory import MemoryRoom
from hasten.models.open import open_model
from hasten.runtime.pages import PAGE_TOKENS, DeviceMemory, KvPlan, kv_plan, plan_pages
from hasten.speed.cost import page_bytes
from specs import changed

GB = 1_000_000_000
PAGE = 16 << 20  # 32 tokens of 512 KB: Llama 2 7B


@pytest.fixture
def llama(tiny_folder) -> ModelSpec:
    """A model of 512 KB a token and next to no weights."""
    tiny: Path = tiny_folder("llama")
    return changed(
        open_model(tiny).config,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        context_length=32_768,
    )


def plan(config: ModelSpec, free: float, reserve: float = 0.25, **options: object) -> KvPlan:
    room = MemoryRoom(lambda: int(free * GB), int(reserve * GB))
    size = page_bytes(config, False, PAGE_TOKENS)
    return kv_plan(config, size, EngineOptions(**options), room)  # type: ignore[arg-type]


def test_a_large_machine_has_room_for_all_sequences(llama: ModelSpec) -> None:
    found = plan(llama, 300)
    assert (found.context, found.pages, found.page_bytes) == (32_768, 16 * 1024, PAGE)
    assert found.because == "16 sequences of 32768 tokens"


def test_a_small_machine_has_as_many_pages_as_fit_beside_the_reserve(llama: ModelSpec) -> None:
    found = plan(llama, 20)
    assert found.context == 32_768 and 1024 < found.pages < 16 * 1024
    assert found.bytes <= 19.75 * GB < found.bytes + 2 * PAGE
    assert "GB are free" in found.because and "tokens in at most 19.7" in found.summary


def test_a_default_context_is_cut_to_what_fits_and_says_so(
    llama: ModelSpec, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hasten"):
        found = plan(llama, 3)
    assert found.context % 32 == 0 and found.context == found.pages * 32
    assert found.bytes <= 2.75 * GB < found.bytes + 2 * PAGE
    assert f"the context is {found.context} tokens and not 32768" in caplog.text


def test_a_default_context_asks_other_models_for_no_more_than_usual(llama: ModelSpec) -> None:
    """One model's long context must not empty the other models' caches."""
    asked: list[int] = []

    class Room(MemoryRoom):
        def ask(self, size: int, patience_s: float = 3.0) -> int:
            asked.append(size)
            return super().ask(size, patience_s)

    room = Room(lambda: 20 * GB, GB // 4)
    assert kv_plan(llama, PAGE, EngineOptions(), room).context == 32_768
    kv_plan(llama, PAGE, EngineOptions(context=32_768), room)
    assert asked[1] - asked[0] == (1024 - 256) * PAGE


def test_a_context_that_was_asked_for_is_refused_with_one_that_fits(llama: ModelSpec) -> None:
    with pytest.raises(UsageError, match=r"4096 tokens take 2\.15 GB, 1\.7\d GB are free") as refused:
        plan(llama, 2, context=4096)
    fits = int(refused.value.hint.removeprefix("use --context "))
    assert plan(llama, 2, context=fits).pages * 32 == fits
    with pytest.raises(UsageError):
        plan(llama, 2, context=fits + 1)


def test_nothing_fits(llama: ModelSpec) -> None:
    for free in (0, 0.2, 0.4):
        with pytest.raises(UsageError, match="keys and values of 32768 tokens") as refused:
            plan(llama, free)
        assert refused.value.hint == "end other programs, or use a smaller model"


def test_kv_gb_is_the_users_word_as_far_as_it_is_free(llama: ModelSpec) -> None:
    asked = {"context": 8192}
    assert plan(llama, 10, kv_gb=5, **asked).pages == 5 * GB // PAGE
    with pytest.raises(UsageError, match=r"20 GB are asked for .* 9\.7\d GB are free") as refused:
        plan(llama, 10, kv_gb=20, **asked)
    fits = float(refused.value.hint.removeprefix("use --kv-gb "))
    assert plan(llama, 10, kv_gb=fits, **asked).pages > 256
    with pytest.raises(UsageError, match="less than one context") as small:
        plan(llama, 10, kv_gb=1, **asked)
    least = float(small.value.hint.split()[2])
    assert plan(llama, 10, kv_gb=least, **asked).pages >= 256
    with pytest.raises(UsageError) as both:
        plan(llama, 3, kv_gb=5, **asked)
    assert both.value.hint == "use a smaller --context, and no --kv-gb"


def test_kv_gb_shortens_a_default_context(llama: ModelSpec, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hasten"):
        found = plan(llama, 10, kv_gb=1)
    assert found.pages == GB // PAGE and found.context == 32 * found.pages
    assert f"the context is {found.context} tokens and not 32768: --kv-gb holds no more" in caplog.text


def test_what_other_models_cache_counts_as_free(llama: ModelSpec) -> None:
    """They give it back when this one needs it; what they promised does not count."""

    class Other:
        def held_bytes(self) -> int:
            return 20 * GB

        def promised_bytes(self) -> int:
            return GB

        def give_back_meanwhile(self) -> None:
            """Nobody asks."""

    room, other = MemoryRoom(lambda: 20 * GB, 0), Other()
    room.join(other)
    assert 38.9 * GB < kv_plan(llama, PAGE, EngineOptions(), room).bytes <= 39 * GB


def test_a_limit_of_address_space_counts(llama: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.runtime.pages.address_space_left", lambda: 6 * GB)
    found = plan(llama, 100)
    assert found.context == found.pages * 32 and found.bytes <= 5.75 * GB


def test_int8_pages_are_smaller(llama: ModelSpec) -> None:
    room = MemoryRoom(lambda: 10 * GB, GB // 4)
    size = page_bytes(llama, True, PAGE_TOKENS)
    assert kv_plan(llama, size, EngineOptions(), room).pages > 1.9 * plan(llama, 10).pages


GIB = 1 << 30


def device_plan(config: ModelSpec, memory: DeviceMemory, reserve: int = GIB, **options: object) -> KvPlan:
    size = page_bytes(config, False, PAGE_TOKENS)
    wanted = EngineOptions(**options)  # type: ignore[arg-type]
    return plan_pages(config, size, wanted, memory.room(reserve), at_once=True)


def test_pages_of_a_gpu_come_from_what_is_free_or_what_the_user_gives(llama: ModelSpec) -> None:
    card = DeviceMemory(60 * GIB, 80 * GIB, 16 * GIB)
    whole = device_plan(llama, card, max_sequences=32)
    assert whole.pages == 59 * GIB // PAGE and "on the GPU" in whole.because
    some = device_plan(llama, replace(card, limit="30GiB"), max_sequences=32)
    assert some.pages == 13 * GIB // PAGE and "--gpu-memory 30GiB" in some.because
    half = device_plan(llama, replace(card, limit=0.5), max_sequences=32)
    assert half.pages == 23 * GIB // PAGE and "--gpu-memory 0.5" in half.because
    more = device_plan(llama, replace(card, limit=0.99), max_sequences=32)
    assert more.pages == whole.pages  # others hold the rest
    assert device_plan(llama, card, max_sequences=2).pages == 1024  # one full context
    few = device_plan(llama, card, max_sequences=6)
    assert (few.context, few.pages, few.because) == (32_768, 6 * 256, "6 sequences of 8192 tokens")


def test_a_context_that_does_not_fit_a_gpu_says_which_does(llama: ModelSpec) -> None:
    card = DeviceMemory(60 * GIB, 80 * GIB, 16 * GIB, "19GiB")
    with pytest.raises(UsageError, match="of --gpu-memory 19GiB") as refused:
        device_plan(llama, card, context=8192)
    context, memory = re.fullmatch(  # type: ignore[union-attr]
        r"use --context (\d+) or --gpu-memory ([\d.]+GiB)", refused.value.hint or ""
    ).groups()
    assert device_plan(llama, card, context=int(context)).context == int(context)
    assert device_plan(llama, replace(card, limit=memory), context=8192).context == 8192
    assert device_plan(llama, card).context == int(context)  # a default one is cut
    with pytest.raises(UsageError) as none:
        device_plan(llama, replace(card, limit=None, free=GIB))
    assert "close what else runs on the GPU" in (none.value.hint or "")
