"""The store of packed weights: the same bits at the second start, and never those of another file."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.cache.store import flush
from hasten.compress.compress import compress
from hasten.core import EngineOptions, Format, Recipe
from hasten.engine.loaded import fingerprint
from hasten.engine.model import LanguageModel
from hasten.errors import DiskError, UsageError
from hasten.weights import packed_store
from hasten.weights.packed import PackedLinear
from hasten.weights.packed_store import PackedStore, open_store

OPTIONS = EngineOptions(threads=1, context=64, max_sequences=1)
PROMPT = [5, 9, 40, 2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, switched on."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HASTEN_CACHE_PACKED", "1")
    monkeypatch.delenv("HASTEN_CACHE_GB", raising=False)
    monkeypatch.setattr(packed_store, "_said", set())
    yield tmp_path / "cache" / "packed"
    flush()


@pytest.fixture
def folder(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("qwen3"), tmp_path / "model"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models whose source was opened: each was packed."""
    import hasten.models.open as module

    names: list[str] = []
    real = module.open_place

    def counted(place: Any) -> Any:
        names.append(place.name)
        return real(place)

    monkeypatch.setattr(module, "open_place", counted)
    return names


def start(ref: Path, recipe: str | Recipe | None = "w4", **options: Any) -> LanguageModel:
    """Load, and what was put off is done."""
    model = hasten.load(ref, recipe, options=OPTIONS, **options)
    flush()
    return model


def settle(path: Path) -> None:
    """Wait until the files' times prove something."""
    newest = max(p.stat().st_ctime for p in (path.rglob("*") if path.is_dir() else [path]))
    time.sleep(max(0.0, newest + 0.08 - time.time()))


def damage(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def entry(cache: Path) -> Path:
    (only,) = PackedStore(cache).entries()
    return only


@pytest.mark.parametrize("recipe", [None, "w4", "w4-head8-kv8", "bf16"])
def test_the_second_start_reads_the_store(folder: Path, opened: list[str], recipe: str | None) -> None:
    settle(folder)
    first = start(folder, recipe)
    second = start(folder, recipe)
    assert opened == ["model"]
    assert fingerprint(first) == fingerprint(second)
    assert list(first.stream(PROMPT, 8)) == list(second.stream(PROMPT, 8))
    assert second.recipe == first.recipe and second.name == first.name
    assert first.generate(["hello"], 5)[0].text == second.generate(["hello"], 5)[0].text


@pytest.mark.parametrize("dtype", ["BF16", "Q4_0"])
def test_gguf(tiny_gguf: Callable[..., Any], opened: list[str], dtype: str, cache: Path) -> None:
    path, _ = tiny_gguf("llama", dtype)
    settle(path)
    first, second = start(path, None), start(path, None)
    assert len(opened) == 1 and fingerprint(first) == fingerprint(second)
    assert PackedStore(cache).tally("hits") == 1
    about = PackedStore(cache).about(entry(cache))
    assert about["files"] == [str(path)] and about["recipe"] == "source"


def test_nothing_is_read_of_a_known_source(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(folder)
    start(folder)
    real = packed_store.digest
    read: list[str] = []
    monkeypatch.setattr(packed_store, "digest", lambda path: read.append(path.name) or real(path))
    start(folder)
    assert opened == ["model"] and read == ["plan.json"]


def test_a_young_source_is_read_but_not_packed_again(folder: Path, opened: list[str]) -> None:
    for path in folder.iterdir():
        path.touch()
    start(folder)
    start(folder)
    assert opened == ["model"]


def test_other_recipes_are_other_entries(folder: Path, opened: list[str], cache: Path) -> None:
    for recipe in ("w4", "w8", Recipe("mine", Format.of(8), layers={"layers.1.up": Format.of(4)})):
        start(folder, recipe)
    start(folder, Recipe("other name", Format.of(4)))
    assert opened == ["model"] * 3
    assert len(PackedStore(cache).entries()) == 3


def change_weights(folder: Path) -> None:
    """Another value somewhere, same size."""
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-2:] = b"\x40\x40" if data[-2:] != b"\x40\x40" else b"\x00\x41"
    file.write_bytes(data)


@pytest.mark.parametrize("wait", [True, False], ids=["settled", "young"])
def test_a_changed_source_of_equal_size_and_time(folder: Path, opened: list[str], wait: bool) -> None:
    file = next(folder.glob("*.safetensors"))
    if wait:
        settle(folder)
    first = start(folder)
    before = file.stat()
    change_weights(folder)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    second = start(folder)
    assert len(opened) == 2 and fingerprint(first) != fingerprint(second)
    fresh = hasten.load(folder, "w4", options=OPTIONS, store=False)
    assert fingerprint(second) == fingerprint(fresh)


def test_a_source_replaced_with_all_its_times(folder: Path, opened: list[str], tmp_path: Path) -> None:
    settle(folder)
    first = start(folder)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    change_weights(other)
    file = next(folder.glob("*.safetensors"))
    shutil.copystat(file, other / file.name)
    (other / file.name).replace(file)
    assert fingerprint(start(folder)) != fingerprint(first) and len(opened) == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_changed_small_file(folder: Path, opened: list[str], name: str) -> None:
    settle(folder)
    start(folder)
    text = (folder / name).read_text()
    (folder / name).write_text(text.replace("assistant: ", "helper: ") + "\n")
    start(folder)
    assert len(opened) == 2


def test_copied_moved_or_touched_is_found_again(
    folder: Path, opened: list[str], tmp_path: Path, cache: Path
) -> None:
    settle(folder)
    start(folder)
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))
    assert start(copy).name == "copy"
    shutil.move(copy, tmp_path / "moved")
    start(tmp_path / "moved")
    for path in folder.iterdir():
        os.utime(path)
    start(folder)
    assert opened == ["model"]
    assert len(PackedStore(cache).entries()) == 1 and PackedStore(cache).tally("hits") == 3


@pytest.mark.parametrize(
    "where", ["weights.safetensors", "tokenizer.json", "plan.json", "config.json", "entry.json"]
)
def test_flipped_bits_are_dropped_logged_and_made_anew(
    folder: Path, opened: list[str], cache: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    settle(folder)
    wanted = fingerprint(start(folder))
    size = (entry(cache) / where).stat().st_size
    for count, at in enumerate(np.random.default_rng(3).integers(0, size, 4)):
        damage(entry(cache) / where, int(at))
        caplog.clear()
        assert PackedStore(cache).verify(entry(cache)) is not None
        assert fingerprint(start(folder)) == wanted
        assert "damaged" in caplog.text
        assert len(opened) == count + 2
    assert PackedStore(cache).verify(entry(cache)) is None
    start(folder)
    assert len(opened) == 5


@pytest.mark.parametrize("where", ["weights.safetensors", "plan.json", "entry.json", "tokenizer_config.json"])
@pytest.mark.parametrize("cut", [0, -2, None])
def test_torn_entries(folder: Path, opened: list[str], cache: Path, where: str, cut: int | None) -> None:
    settle(folder)
    wanted = fingerprint(start(folder))
    file = entry(cache) / where
    file.unlink() if cut is None else file.write_bytes(file.read_bytes()[:cut])
    assert fingerprint(start(folder)) == wanted
    start(folder)
    assert len(opened) == 2


def test_an_entry_under_anothers_name(folder: Path, opened: list[str], cache: Path) -> None:
    """Whole and well, but of another recipe: its key says so."""
    start(folder, "w8")
    eight = entry(cache)
    four = start(folder, "w4")
    (other,) = set(PackedStore(cache).entries()) - {eight}
    shutil.rmtree(other)
    eight.rename(other)
    assert fingerprint(start(folder, "w4")) == fingerprint(four)
    assert len(opened) == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("step", [1, 2, 5, 9])
def test_a_disk_that_fails(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, number: int, step: int
) -> None:
    """The `step`-th file that is opened for writing cannot be: the model runs, one warning, no rubbish."""
    settle(folder)
    real, calls = os.open, [0]

    def failing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_WRONLY and str(path).startswith(str(cache)):
            calls[0] += 1
            if calls[0] >= step:
                raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", failing)
    for _ in range(2):
        assert list(start(folder).stream(PROMPT, 3))
    if calls[0] >= step:
        monkeypatch.setattr(os, "open", real)
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(warnings) <= 1
        assert list(cache.rglob("*.tmp")) == []
    assert fingerprint(start(folder)) == fingerprint(start(folder))


@pytest.mark.parametrize("where", ["file", "/proc/none", "/dev/null"])
def test_a_folder_that_cannot_be_made(
    folder: Path, tmp_path: Path, monkeypatch: Any, caplog: Any, where: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / where))
    for _ in range(2):
        assert list(start(folder).stream(PROMPT, 3))
    assert caplog.text.count("not kept") == 1


def test_no_home(folder: Path, monkeypatch: Any, caplog: Any) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    for name in ("HASTEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert list(start(folder).stream(PROMPT, 3))
    assert "no home folder" in caplog.text


def test_switched_off(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]) -> None:
    start(folder, store=False)
    monkeypatch.setenv("HASTEN_CACHE_PACKED", "0")
    start(folder)
    monkeypatch.setenv("HASTEN_CACHE_PACKED", "1")
    monkeypatch.setenv("HASTEN_CACHE_GB", "0")
    start(folder)
    assert not cache.exists() and len(opened) == 3


@pytest.mark.parametrize("value", ["many", "-1", "nan", "inf", "1e30"])
def test_a_limit_that_is_no_number(folder: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HASTEN_CACHE_GB", value)
    with pytest.raises(UsageError, match="HASTEN_CACHE_GB") as caught:
        start(folder)
    assert caught.value.hint


def test_the_limit_drops_what_was_not_used_for_longest(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str]
) -> None:
    store = PackedStore(cache)
    for age, recipe in ((300, "w8"), (200, "w6"), (100, "w5")):
        before = set(store.entries())
        start(folder, recipe)
        (new,) = set(store.entries()) - before
        os.utime(new / "used", (time.time() - age,) * 2)
    start(folder, "w8")  # now the youngest
    assert len(opened) == 3
    monkeypatch.setenv("HASTEN_CACHE_GB", str((sum(one.bytes for one in store.held()) + 1000) / 1e9))
    start(folder, "w4")
    assert sorted(store.about(e)["recipe"] for e in store.entries()) == ["w4", "w5", "w8"]


@pytest.mark.parametrize("name", ["entry.json", "plan.json", "used", "config.json", "tokenizer.json"])
def test_pipes_in_place_of_small_files(
    folder: Path, opened: list[str], cache: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    settle(folder)
    wanted = fingerprint(start(folder))
    for path in (entry(cache) / name, cache / "hits", cache / "misses"):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    for path in (cache / "sources").iterdir():
        path.unlink()
        os.mkfifo(path)
    store = PackedStore(cache)
    assert (store.verify(entry(cache)) is None) == (name == "used")
    assert fingerprint(start(folder)) == wanted and fingerprint(start(folder)) == wanted
    assert len(opened) == (1 if name == "used" else 2) and store.verify(entry(cache)) is None


@pytest.mark.parametrize("is_read_only", [True, False])
def test_a_folder_that_cannot_be_written_is_named_as_that(
    folder: Path, tmp_path: Path, monkeypatch: Any, caplog: Any, is_read_only: bool
) -> None:
    """Not by its limit: a read-only file system has no room either, and more would not help."""
    monkeypatch.setattr("hasten.cache.store.os.access", lambda path, mode: False)
    flags = SimpleNamespace(f_flag=os.ST_RDONLY if is_read_only else 0)
    monkeypatch.setattr("hasten.cache.store.os.statvfs", lambda path: flags)
    monkeypatch.setattr("hasten.cache.folders.free_bytes", lambda path: 0)
    start(folder)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    said = record.getMessage()
    assert ("read-only file system" if is_read_only else "may not be written") in said
    assert "HASTEN_CACHE=DIR" in said and "may hold" not in said
    with pytest.raises(DiskError, match="read-only" if is_read_only else "may not be written"):
        compress(folder, "w4", out=tmp_path / "x.hasten")


def test_an_entry_of_another_format_is_made_anew(
    folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that the program learned since must be read from the model, not taken as by default."""
    settle(folder)
    start(folder)
    monkeypatch.setattr(packed_store, "format_digest", lambda: "grown")
    start(folder)
    start(folder)
    assert len(opened) == 2


def test_too_large_for_the_limit(folder: Path, cache: Path, monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setenv("HASTEN_CACHE_GB", "0.00001")
    start(folder)
    start(folder, "w8")
    assert PackedStore(cache).entries() == []
    assert caplog.text.count("not kept") == 1


def test_matrices_replaced_before_it_is_kept(folder: Path, opened: list[str]) -> None:
    settle(folder)
    model = hasten.load(folder, "w4", options=OPTIONS)
    wanted = fingerprint(model)
    old = model.packed.linears["layers.0.up"]
    model.replace("layers.0.up", PackedLinear(old.layout, old.rows, old.cols, np.zeros_like(old.data)))
    flush()
    assert fingerprint(start(folder)) == wanted and len(opened) == 1


def test_a_source_that_changes_while_it_is_packed(folder: Path, cache: Path, caplog: Any) -> None:
    settle(folder)
    hasten.load(folder, "w4", options=OPTIONS, threads=1)
    change_weights(folder)
    flush()
    if PackedStore(cache).entries():  # kept before the change: then it must not be found
        assert fingerprint(start(folder)) == fingerprint(
            hasten.load(folder, "w4", options=OPTIONS, store=False)
        )
    else:
        assert "changed while it was read" in caplog.text


def test_another_version_packs_anew(folder: Path, opened: list[str], monkeypatch: Any) -> None:
    start(folder)
    monkeypatch.setattr(hasten, "__version__", "9.9")
    start(folder)
    assert len(opened) == 2


def test_what_a_record_may_hold(folder: Path, cache: Path) -> None:
    """Records of another shape are damaged entries, not crashes."""
    start(folder)
    for text in ("[]", "{}", '{"key": 3}', '{"value": [1], "key": {}}', "\x00"):
        (entry(cache) / "entry.json").write_text(text)
        store = open_store()
        assert store is not None and store.about(entry(cache)) == {} and store.verify(entry(cache))
    for path in (cache / "sources").glob("*.json"):
        path.write_text(json.dumps({"value": 5}))
    start(folder)
    assert PackedStore(cache).verify(entry(cache)) is None


def test_leftovers_of_killed_processes_go(folder: Path, cache: Path) -> None:
    left = [cache / "models" / ".dead.tmp" / "entry", cache / "models" / ".dead.old"]
    for path in left:
        path.mkdir(parents=True)
        (path / "file").write_text("x")
    for path in (cache / "models").glob(".dead.*"):
        os.utime(path, (time.time() - 100,) * 2)
    (cache / "models" / ".young.tmp").mkdir()
    start(folder)
    assert [p.name for p in (cache / "models").glob(".*")] == [".young.tmp"]
