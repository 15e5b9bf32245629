"""What compressing keeps: how much of it, for how long, and never what is in use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from hasten.compress.calibration import Calibration
from hasten.compress.compress import compress
from hasten.compress.quantise.layerwise import CalibratedLinears
from hasten.compress.quantise.statistics import Statistics
from hasten.compress.torch_model import write_state
from hasten.core import Format, Recipe
from hasten.errors import UsageError
from hasten.models.artifact import find_packed, keep_packed
from hasten.models.open import open_folder
from hasten.models.source import Source, locate
from hasten.weights.packed import pack_model
from hasten.weights.packed_store import PackedStore
from hasten.weights.work_store import IN_USE_S, STALE_S, WorkStore, touch, write_checked

DAY = 86400.0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HASTEN_CACHE_GB", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_folder(tiny_models.save_folder(tiny_models.TINY["qwen2"], tmp_path / "model"))


def text(seed: int = 0) -> Calibration:
    ids = np.random.default_rng(seed).integers(0, tiny_models.VOCAB - 1, (4, 32)).astype(np.int32)
    return Calibration("random", ids)


def kept(part: str, key: str, size: int, age_s: float) -> Path:
    """A folder with a file of about `size` bytes, last used so long ago."""
    store = WorkStore()
    entry = store.place(part, key)  # type: ignore[arg-type]
    write_state(entry / "layer-0.pt", "x 1", {"x": torch.zeros(size, dtype=torch.uint8)})
    store.mark(entry, "a/model")
    grow_old(entry, age_s)
    return entry


def grow_old(entry: Path, age_s: float) -> None:
    moment = time.time() - age_s
    for path in [*entry.rglob("*"), entry]:
        os.utime(path, (moment, moment))


def test_the_oldest_goes_and_what_is_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    older = kept("statistics", "a", 100_000, 3 * DAY)
    newer = kept("linears", "b", 100_000, 2 * DAY)
    used = kept("runs", "c", 100_000, IN_USE_S - 60)
    own = kept("statistics", "d", 100_000, 6 * DAY)  # begun long ago, gone on with now
    store = WorkStore()
    assert [one.in_use for one in store.held()] == [False, False, False, True]
    monkeypatch.setenv("HASTEN_CACHE_GB", "0.00045")
    store.make_room(own, 30_000)
    assert all(path.is_dir() for path in (older, newer, used, own))
    store.make_room(own, 100_000)
    assert not older.exists() and all(path.is_dir() for path in (newer, used, own))
    store.make_room(own, 10_000_000)  # more than the limit: all that may go
    assert not newer.exists() and used.is_dir() and own.is_dir()
    assert not list(store.folder.glob("*/.*"))


def test_runs_that_nobody_came_back_to_go(own_cache: Path) -> None:
    stale = kept("runs", "a", 1000, STALE_S + 60)
    left = kept("runs", "b", 1000, STALE_S - 600)
    old = kept("statistics", "c", 1000, 10 * STALE_S)  # no run: the limit alone says
    killed = own_cache / "compress" / "runs" / ".0123.old"
    killed.mkdir()
    grow_old(killed, DAY)
    WorkStore().make_room(own_cache / "compress" / "runs" / "new", 0)
    assert not stale.exists() and left.is_dir() and old.is_dir() and not killed.exists()


def test_one_limit_for_packed_weights_and_work(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PackedStore(WorkStore().folder.parent / "packed")
    recipe = Recipe.parse("w8")
    packed = pack_model(source, recipe)
    size = sum(one.bytes for one in packed.linears.values())
    _, origin = find_packed(store, locate(source.files[0].path.parent), recipe)
    assert origin is not None
    work, busy = kept("statistics", "a", size, DAY), kept("statistics", "b", size, 0)
    monkeypatch.setenv("HASTEN_CACHE_GB", str(2.5 * size / 1e9))
    entry = keep_packed(store, origin, recipe, packed, source)
    assert entry is not None and entry.is_dir() and not work.exists() and busy.is_dir()
    grow_old(entry, 2 * DAY)
    WorkStore().make_room(busy, size)
    assert not entry.exists() and busy.is_dir()


def test_statistics_and_matrices_say_that_they_are_used(source: Source) -> None:
    linears = CalibratedLinears(source, text())
    linears.linear("layers.0.q", Format.of(4, 32))
    store = WorkStore()
    assert {store.model(one.path) for one in store.held()} == {source.name}
    for one in store.held():
        grow_old(one.path, DAY)
    CalibratedLinears(source, text()).linear("layers.0.q", Format.of(4, 32))  # read
    assert {one.path.parent.name: one.in_use for one in store.held()} == {
        "statistics": False,
        "linears": True,
    }
    Statistics(source, text()).layer(0)
    assert all(one.in_use for one in store.held())
    assert all(store.verify(one.path) is None for one in store.held())


def test_measuring_makes_room(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Statistics(source, text(1))
    first.collect()
    grow_old(first.folder, DAY)
    monkeypatch.setenv("HASTEN_CACHE_GB", "0.00001")
    second = Statistics(source, text(2))
    second.collect()
    assert not first.folder.exists() and second.folder.is_dir()
    monkeypatch.setenv("HASTEN_CACHE_GB", "much")
    with pytest.raises(UsageError, match="HASTEN_CACHE_GB"):
        Statistics(source, text(3)).collect()


def test_statistics_removed_under_a_running_process_are_measured_again(source: Source) -> None:
    found = Statistics(source, text())
    found.collect()
    before = found.layer(0).grams["qkv"]
    found.layer(1)
    for path in found.folder.iterdir():
        path.unlink()
    assert torch.equal(found.layer(0).grams["qkv"], before)


def test_a_flipped_bit_in_statistics_is_measured_again(source: Source) -> None:
    found = Statistics(source, text())
    found.collect()
    before = found.layer(0).grams["qkv"]
    path = found.folder / "layer-0.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)
    assert WorkStore().verify(found.folder) is not None
    assert torch.equal(Statistics(source, text()).layer(0).grams["qkv"], before)


def test_every_kind_of_file_is_verified(source: Source) -> None:
    store = WorkStore()
    CalibratedLinears(source, text()).linear("layers.0.q", Format.of(4, 32))
    work = kept("runs", "a", 1000, 0)
    write_checked(work / "distil" / "teacher" / "00000.states", np.arange(1000).astype(np.uint8))
    write_state(work / "distil" / "distil.checkpoint", "x 1", {"step": 1, "x": torch.ones(100)})
    files = [path for one in store.held() for path in one.path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".pt", ".json", ".states", ".checkpoint"}
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + b"~" + whole[len(whole) // 2 + 1 :])
        assert sum(store.verify(one.path) is not None for one in store.held()) == 1, path
        path.write_bytes(whole)
    assert all(store.verify(one.path) is None for one in store.held())


def test_a_run_makes_room_and_leaves_its_statistics(source: Source, own_cache: Path) -> None:
    stale = kept("runs", "a", 1000, STALE_S + 60)
    compress(source.files[0].path.parent, "w4-gptq", text(), out=None)
    assert not stale.exists()
    assert [one.path.parent.name for one in WorkStore().held()] == ["statistics"]
    touch(own_cache / "none")  # nothing there: nothing made
    assert not (own_cache / "none").exists()
