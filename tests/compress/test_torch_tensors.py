"""Files of torch: no bit of them may differ from what was written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.compress.torch_model import read_state, write_state
from hasten.errors import DiskError
from hasten.weights.work_store import state_damage

STATE = {"x": torch.arange(5000.0), "n": 3, "layout": (4, 32, True), "inner": {"y": torch.ones(3).bool()}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_state(tmp_path / "a" / "b.pt", "x 1", STATE)
    found = read_state(path, "x 1")
    assert found is not None and state_damage(path) is None
    assert torch.equal(found["x"], STATE["x"]) and torch.equal(found["inner"]["y"], STATE["inner"]["y"])
    assert found["n"] == 3 and found["layout"] == (4, 32, True)


def test_a_flipped_bit_anywhere_in_a_tensor_is_seen(tmp_path: Path) -> None:
    path = write_state(tmp_path / "b.pt", "x 1", STATE)
    whole = path.read_bytes()
    first = whole.index(STATE["x"].numpy().tobytes())
    for at in (first, first + 7777, first + 19_999):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        torch.load(path, weights_only=True)  # torch does not look
        assert "checksum" in str(state_damage(path)) and read_state(path, "x 1") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_torn_file_is_a_miss(tmp_path: Path, share: float) -> None:
    path = write_state(tmp_path / "b.pt", "x 1", STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "torn" in str(state_damage(path)) and read_state(path, "x 1") is None


def test_another_kind_or_version_is_a_miss(tmp_path: Path) -> None:
    path = write_state(tmp_path / "b.pt", "x 1", STATE)
    assert read_state(path, "x 2") is None and read_state(path, "y 1") is None
    torch.save(STATE, path)  # one that says nothing of itself
    assert read_state(path, "x 1") is None
    torch.save([1, 2], path)
    assert read_state(path, "x 1") is None


def test_no_file_is_a_miss_and_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    assert read_state(tmp_path / "none.pt", "x 1") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError):
        write_state(tmp_path / "file" / "b.pt", "x 1", STATE)
