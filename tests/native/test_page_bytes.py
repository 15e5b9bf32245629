"""Pages leave the cache as bytes and come back, into other slots and engines: not a bit of a result moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hasten
from executor_step import hidden_after
from hasten.core import EngineOptions
from hasten.engine.model import LanguageModel
from hasten.runtime.pages import CachedSequence

TEXT = np.random.default_rng(3).integers(0, 262, 120, dtype=np.int32)
CASES = [
    ("qwen3", "bf16"),
    ("qwen3", "w4-kv8"),
    ("gemma3", "bf16"),
    ("llama-odd", "bf16"),
    ("phi3", "bf16-kv8"),
]


def open_tiny(folder: Path, recipe: str) -> LanguageModel:
    return hasten.load(folder, recipe, options=EngineOptions(threads=1, max_sequences=3))


def computed(model: LanguageModel, tokens: np.ndarray, length: int) -> CachedSequence:
    """A sequence that holds `tokens` and is going to be `length` long."""
    sequence = CachedSequence()
    sequence.kv_class = model.executor.kv_class(length, True)
    hidden_after(model.executor, [(sequence, tokens)], as_prompt=True)
    return sequence


@pytest.mark.parametrize("name, recipe", CASES)
def test_a_page_in_another_place_gives_the_same_bits(
    isa: str, tiny_folder: Callable[..., Path], name: str, recipe: str
) -> None:
    one, other = (open_tiny(tiny_folder(name), recipe) for _ in range(2))
    kept = one.executor.page_tokens * 3
    full = computed(one, TEXT[:kept], len(TEXT))
    pages = [one.executor.read_page(page) for page in full.pages]
    (expected,) = hidden_after(one.executor, [(full, TEXT[kept:])], as_prompt=True)

    computed(other, TEXT[::-1][:40], 40)  # what lies there now is something else, and the slots are others
    moved = computed(other, TEXT[:kept][::-1].copy(), len(TEXT))
    assert moved.pages != full.pages[:3]
    for page, data in zip(moved.pages, pages, strict=True):
        other.executor.write_page(page, data)
    (found,) = hidden_after(other.executor, [(moved, TEXT[kept:])], as_prompt=True)
    assert len(found) == len(TEXT) - kept
    np.testing.assert_array_equal(found, expected)
    for page, data in zip(moved.pages[:3], pages, strict=True):
        np.testing.assert_array_equal(other.executor.read_page(page), data)


def test_what_is_read_is_a_copy_and_neighbours_stay(tiny_folder: Callable[..., Path]) -> None:
    executor = open_tiny(tiny_folder("qwen3"), "bf16").executor
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 256, executor.page_bytes, dtype=np.uint8) for _ in range(4)]
    for index, page in enumerate(pages):
        executor.write_page(index, page)
    for index, page in enumerate(pages):
        np.testing.assert_array_equal(executor.read_page(index), page)
    executor.read_page(1)[:] = 0
    executor.write_page(2, pages[0])
    for index, page in enumerate([pages[0], pages[1], pages[0], pages[3]]):
        np.testing.assert_array_equal(executor.read_page(index), page)


def test_wrong_pages_and_sizes_are_refused(tiny_folder: Callable[..., Path]) -> None:
    executor = open_tiny(tiny_folder("qwen3"), "bf16").executor
    size = executor.page_bytes
    for page in (-1, 1 << 30):
        with pytest.raises((ValueError, TypeError)):
            executor.read_page(page)
        with pytest.raises((ValueError, TypeError)):
            executor.write_page(page, np.zeros(size, np.uint8))
    for wrong in (np.zeros(size - 1, np.uint8), np.zeros(size + 1, np.uint8), np.zeros(0, np.uint8)):
        with pytest.raises(ValueError):
            executor.write_page(0, wrong)
    for strange in (np.zeros(size, np.int8), np.zeros(2 * size, np.uint8)[::2]):
        with pytest.raises(TypeError):
            executor.write_page(0, strange)


@pytest.mark.parametrize("name, recipe", [("qwen3", "bf16"), ("llama-odd", "bf16-kv8")])
def test_dropped_pages_are_gone_and_their_neighbours_stay(
    tiny_folder: Callable[..., Path], name: str, recipe: str
) -> None:
    """Pages of odd sizes begin inside pages of the system, which neighbours share."""
    executor = open_tiny(tiny_folder(name), recipe).executor
    rng = np.random.default_rng(1)
    pages = [rng.integers(1, 256, executor.page_bytes, dtype=np.uint8) for _ in range(9)]
    for index, page in enumerate(pages):
        executor.write_page(index, page)
    executor._decoder.drop_pages(2, 4)
    for index in (0, 1, 6, 7, 8):
        np.testing.assert_array_equal(executor.read_page(index), pages[index])
    inside = executor.read_page(3)
    assert (inside[: inside.size // 2] == 0).any(), "gone"
    assert ((inside == 0) | (inside == pages[3])).all(), "or where it shares a page of the system, as it was"
    for index in (2, 3, 4, 5):
        executor.write_page(index, pages[index])
        np.testing.assert_array_equal(executor.read_page(index), pages[index])


def test_dropped_pages_take_no_memory(tiny_folder: Callable[..., Path]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    executor = open_tiny(tiny_folder("qwen3"), "bf16").executor
    count = min(executor.pool.pages, (40 << 20) // executor.page_bytes)
    page = np.ones(executor.page_bytes, np.uint8)
    for index in range(count):
        executor.write_page(index, page)
    before = resident()
    executor._decoder.drop_pages(0, count)
    assert before - resident() > 0.9 * count * executor.page_bytes


@pytest.mark.parametrize("first, count", [(-1, 1), (0, -1), (0, 1 << 30), (1 << 30, 1), (2**31 - 1, 2)])
def test_only_pages_of_the_cache_are_dropped(
    tiny_folder: Callable[..., Path], first: int, count: int
) -> None:
    with pytest.raises((ValueError, TypeError)):
        open_tiny(tiny_folder("qwen3"), "bf16").executor._decoder.drop_pages(first, count)
