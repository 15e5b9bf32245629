"""`hasten cache`: its verbs list, check and remove what is kept, and nothing else."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hasten
from hasten.cache import folders, store, write_record
from hasten.cache.folders import known_folders, remember_folder
from hasten.cli import main
from hasten.cli.cache import SUBCOMMANDS
from hasten.cli.frame import subparser_of
from hasten.compress.torch_model import write_state
from hasten.core import EngineOptions
from hasten.weights.work_store import WorkStore


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[..., Path]) -> Path:
    """A cache with one of each kind."""
    from hasten.cache.kv_disk import KvDisk

    folder = tmp_path / "cache"
    monkeypatch.setenv("HASTEN_CACHE", str(folder))
    monkeypatch.setenv("HASTEN_CACHE_PACKED", "1")
    monkeypatch.delenv("HASTEN_CACHE_GB", raising=False)
    for _ in range(2):
        hasten.load(tiny_folder("qwen3"), "w4", options=EngineOptions(threads=1, context=32, max_sequences=1))
        store.flush()
    write_record(folder / "optimize" / "x.json", {"a": 1}, 2)
    (folder / "bench" / "model").mkdir(parents=True)
    (folder / "bench" / "model" / "q8_0.gguf").write_bytes(bytes(1000))
    kept = WorkStore(folder / "compress").place("statistics", "ef" * 16)
    write_state(kept / "layer-0.pt", "x 1", {"x": torch.arange(1000)})
    WorkStore(folder / "compress").mark(kept, "a/model")
    disk = KvDisk(tmp_path / "kv", 1 << 20, "f" * 64, 4096)
    for i in range(3):
        disk.write(bytes([i]) * 32, np.full(4096, i, np.uint8), 1.0)
    disk.close()
    remember_folder("kv", tmp_path / "kv")
    return folder


def run(capsys: Any, *arguments: str, code: int = 0) -> Any:
    """Run with --json; the document."""
    capsys.readouterr()
    assert main(["cache", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def kinds(document: Any) -> list[str]:
    return [entry["kind"] for entry in document["entries"]]


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_ls(cache: Path, capsys: Any) -> None:
    found = run(capsys, "ls")
    assert set(kinds(found)) == {"packed", "compress", "kv", "exports", "records"}
    packed = next(entry for entry in found["entries"] if entry["kind"] == "packed")
    assert (
        packed["name"].endswith("w4")
        and packed["bytes"] > 10_000
        and packed["source"].endswith("safetensors")
    )
    assert abs(packed["last_used"] - time.time()) < 60
    work = next(entry for entry in found["entries"] if entry["kind"] == "compress")
    assert work["name"].startswith("statistics efef") and work["source"] == "a/model" and work["bytes"] > 8000
    assert kinds(run(capsys, "ls", "--kind", "exports", "--kind", "compress")) == ["exports", "compress"]
    assert main(["cache", "ls"]) == 0
    out = capsys.readouterr().out
    assert "exports" in out and "just now" in out and " records\n" in out


def test_ls_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "none"))
    for verb in ("ls", "verify", "clear", "stats"):
        assert main(["cache", verb]) == 0
    assert "nothing is kept" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_stats(cache: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE_GB", "3.5")
    found = run(capsys, "stats")
    assert found["packed"] == {"enabled": True, "limit_bytes": 3_500_000_000, "hits": 1, "misses": 0}
    assert found["kinds"]["exports"]["bytes"] == 1000
    assert main(["cache", "stats"]) == 0
    out = capsys.readouterr().out
    assert "together: at most 3.5 GB\n" in out and "found 1 times" in out and "switched off" not in out
    monkeypatch.setenv("HASTEN_CACHE_PACKED", "0")
    assert main(["cache", "stats"]) == 0
    assert "switched off" in capsys.readouterr().out


def test_the_limit_is_one_for_packed_weights_and_compress(
    cache: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "free_bytes", lambda path: 0)
    found = run(capsys, "stats")
    together = found["kinds"]["packed"]["bytes"] + found["kinds"]["compress"]["bytes"]
    assert found["packed"]["limit_bytes"] == together // 2


DAMAGED = {
    "packed": "cache/packed/models/*/weights.safetensors",
    "compress": "cache/compress/statistics/*/layer-0.pt",
    "kv": "kv/*/01/*",
    "records": "cache/optimize/*",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_verify(cache: Path, tmp_path: Path, capsys: Any, kind: str) -> None:
    found = run(capsys, "verify")
    assert found["count"]["damaged"] == 0 and found["count"]["unchecked"] == 1
    flip(only(tmp_path, DAMAGED[kind]))
    found = run(capsys, "verify", code=1)
    assert found["count"]["damaged"] == 1
    (bad,) = [entry for entry in found["entries"] if entry["state"] == "damaged"]
    assert bad["kind"] == kind and bad["reason"]
    assert main(["cache", "verify"]) == 1
    out, err = capsys.readouterr()
    assert "1 damaged" in out and "damaged: " in err and "--fix" in err
    assert run(capsys, "verify", "--fix")["count"]["removed"] == 1
    found = run(capsys, "verify")
    assert found["count"]["damaged"] == 0
    assert kind != "kv" or len(list((tmp_path / "kv").glob("*/??/*"))) == 2  # only the damaged page went


def test_verify_names_a_wrong_demo(cache: Path, capsys: Any) -> None:
    (cache / "demo").mkdir()
    (cache / "demo" / "m.gguf").write_bytes(b"GGUF")
    assert run(capsys, "verify", "--kind", "demo", code=1)["count"]["damaged"] == 1


def test_clear_asks(cache: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["cache", "clear"]) == 2
    assert "--yes" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdin, "readline", lambda: "n\n", raising=False)
    assert main(["cache", "clear"]) == 2
    assert len(run(capsys, "ls")["entries"]) > 4
    monkeypatch.setattr(sys.stdin, "readline", lambda: "y\n", raising=False)
    assert main(["cache", "clear"]) == 0
    assert run(capsys, "ls")["entries"] == []


def test_clear_a_kind(cache: Path, capsys: Any) -> None:
    three = ["packed", "compress", "kv"]
    removed = run(capsys, "clear", *(word for kind in three for word in ("--kind", kind)), "--yes")
    assert [entry["kind"] for entry in removed["removed"]] == three and removed["bytes"] > 10_000
    assert list((cache / "compress" / "statistics").iterdir()) == []
    assert set(kinds(run(capsys, "ls"))) == {"exports", "records"}


def test_clear_what_is_old(cache: Path, capsys: Any) -> None:
    old = only(cache, "optimize/*")
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    assert run(capsys, "clear", "--older-than", "4d", "--yes")["removed"] == []
    assert [e["path"] for e in run(capsys, "clear", "--older-than", "2.5d", "--yes")["removed"]] == [str(old)]
    assert not old.exists() and len(run(capsys, "ls")["entries"]) > 3


def test_a_folder_named_by_mistake_loses_nothing(cache: Path, tmp_path: Path, capsys: Any) -> None:
    mine = tmp_path / "photos"
    kept = [
        mine / "2024" / "ab" / "abcd",
        mine / "1-trip" / "me" / "a.jpg",
        mine / "1-trip" / "ab" / "notes.txt",
    ]
    for path in kept:
        path.parent.mkdir(parents=True)
        path.write_text("x")
    run(capsys, "clear", "--kv-disk", str(mine), "--yes")
    run(capsys, "verify", "--fix", "--kv-disk", str(mine))
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["ls", "--kind", "foo"], "no kind 'foo'"),
        (["clear", "--older-than", "soon", "--yes"], "no age"),
        (["lsa"], "no such command"),
        (["verify", "--fixx"], "did you mean --fix?"),
        (["--json"], "no such option"),
    ],
)
def test_mistakes(cache: Path, capsys: Any, arguments: list[str], word: str) -> None:
    assert main(["cache", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and word in err and "hint: " in err


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_help(name: str, capsys: Any) -> None:
    assert main(["cache", name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: hasten cache {name} ")
    for parameter in subparser_of("cache", name).params:
        assert parameter.help.endswith("."), parameter.name
    for arguments in (["cache"], ["cache", "--help"]):
        assert main(arguments) == 0
        assert f"  {name} " in capsys.readouterr().out
    page = Path(__file__).parents[2] / "docs" / "reference.md"  # a test of its own keeps it in step
    assert f"### hasten cache {name}\n" in page.read_text(encoding="utf-8")


def test_known_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    assert known_folders("kv") == []
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        remember_folder("kv", tmp_path / name)
    assert set(known_folders("kv")) == {tmp_path / "a", tmp_path / "b"}
    (tmp_path / "a").rmdir()
    assert known_folders("kv") == [tmp_path / "b"] and known_folders("other") == []
    for record in (tmp_path / "cache" / "folders").iterdir():
        flip(record)
    assert known_folders("kv") == []
    monkeypatch.setenv("HASTEN_CACHE", "/proc/none")
    remember_folder("kv", tmp_path)  # refuses: no error
