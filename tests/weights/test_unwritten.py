"""Files of the right size that were not filled to their end."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from hasten.errors import FormatError
from hasten.models.gguf import GgufFile
from hasten.weights.tensors import Entry, open_safetensors, write_safetensors
from tiny_gguf import write_gguf
from tiny_models import TINY

ROWS, COLS = 64, 256


def written(path: Path, *zero: str, last: str = "f.weight") -> Path:
    """A file of six matrices, a bias in front, `zero` ones all zeros."""
    rng = np.random.default_rng(0)
    names = ["a.weight", "b.weight", "c.weight", "d.weight", "e.weight", last]
    values = {name: rng.standard_normal((ROWS, COLS)).astype(np.float32) for name in names}
    values = {"norm.bias": np.zeros(COLS, np.float32), **values}
    for name in zero:
        values[name][:] = 0

    def entry(name: str) -> Entry:
        return Entry(name, "F32", values[name].shape, lambda: [values[name]])

    write_safetensors(path, [entry(name) for name in values], lambda *_: None)
    return path


def unfilled(path: Path, first: int, end: int | None = None) -> Path:
    """Make a part of a file zeros, as a hole where the file system knows holes."""
    whole = path.read_bytes()
    end = len(whole) if end is None else end
    with path.open("wb") as file:
        file.write(whole[:first])
        file.seek(end)
        file.write(whole[end:])
        file.truncate(len(whole))
    return path


SIZE = ROWS * COLS * 4


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_download_that_stopped_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = written(tmp_path / "x.safetensors")
    unfilled(path, int(share * path.stat().st_size) // 4 * 4)
    with pytest.raises(FormatError, match=r"its last [\d,]+ bytes are zeros, .*f\.weight") as caught:
        open_safetensors(path)
    assert "download it again" in (caught.value.hint or "")


def test_a_gguf_file_too(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(TINY["llama"], path)
    size = path.stat().st_size
    GgufFile.open(path)
    unfilled(path, size * 4 // 5)
    with pytest.raises(FormatError, match="bytes are zeros"):
        GgufFile.open(path)
    unfilled(path, 200)
    with pytest.raises(FormatError, match="bytes at least are zeros"):
        GgufFile.open(path)


def test_a_hole_in_the_middle_is_refused(tmp_path: Path) -> None:
    """Several connections fill several parts of a file."""
    path = written(tmp_path / "x.safetensors")
    first = path.stat().st_size - 3 * SIZE
    unfilled(path, first + SIZE // 2, first + 2 * SIZE + SIZE // 2)
    with path.open("rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= path.stat().st_size:
            pytest.skip("this file system knows no holes")
    with pytest.raises(FormatError, match="were never written"):
        open_safetensors(path)


@pytest.mark.parametrize("zero", [(), ("c.weight",), ("f.weight",), ("e.weight", "f.weight")])
def test_zeros_that_were_written_are_opened(
    tmp_path: Path, zero: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter's second matrix, before it is trained; a layer that a method took out."""
    path = written(tmp_path / "x.safetensors", *zero)
    with caplog.at_level(logging.WARNING):
        assert len(open_safetensors(path)) == 7
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == ("f.weight" in zero)
    assert all("nothing but zeros" in one for one in said)


def test_padding_and_zero_points_may_be_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "x.safetensors", "z.zero_point", last="z.zero_point")
    unfilled(path, path.stat().st_size - SIZE - SIZE // 20)  # rows of padding before
    with caplog.at_level(logging.WARNING):
        open_safetensors(path)
    assert not caplog.records


def test_a_file_of_zeros_behind_its_header_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors")
    unfilled(path, path.stat().st_size - 6 * SIZE - COLS * 4)
    with pytest.raises(FormatError, match=r"a\.weight|f\.weight"):
        open_safetensors(path)
