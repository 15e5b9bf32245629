"""What models are judged on: no overlap, nested windows, targets one place ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.quality.text import Window, default_text, text_from_file, windows


class Letters:
    """One id a character; `opening` is put in front of a text, as models with a start token have it."""

    def __init__(self, opening: tuple[int, ...] = ()) -> None:
        self.opening = opening

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [*(self.opening if add_special else ()), *map(ord, text)]


ALPHABET = "".join(chr(0x1000 + i) for i in range(3000))  # every character once: a window shows where it is


def read(window: Window) -> list[int]:
    return [*window.inputs.tolist(), int(window.targets[-1])]


def test_default_text_is_long_and_its_parts_share_nothing() -> None:
    text = default_text()
    assert len(text.evaluation) > 200_000
    assert len(text.calibration) > 30_000

    def paragraphs(part: str) -> list[str]:
        return [" ".join(p.split()) for p in part.split("\n\n")]

    judged = paragraphs(text.evaluation)
    assert len(set(judged)) == len(judged)  # topics quote one another: each paragraph counts once
    assert not set(judged) & set(paragraphs(text.calibration))


def test_digest_depends_on_both_parts_and_their_border() -> None:
    from hasten.quality.text import Text

    texts = [Text("t", "ab", "c"), Text("t", "a", "bc"), Text("t", "ab", "d"), Text("t", "b", "c")]
    assert len({t.sha256 for t in texts}) == 4
    assert Text("other name", "ab", "c").sha256 == texts[0].sha256
    assert default_text().sha256 == default_text().sha256


def test_targets_are_what_comes_next() -> None:
    for window in windows(ALPHABET, Letters(), tokens=512, length=128):
        assert window.inputs.dtype == window.targets.dtype == np.int32
        assert window.inputs.size == window.targets.size == 128
        assert (window.targets == window.inputs + 1).all()


def test_every_target_is_judged_once() -> None:
    cut = windows(ALPHABET, Letters(), tokens=10**6, length=100)
    targets = np.concatenate([w.targets for w in cut])
    assert len(cut) == 29
    assert np.unique(targets).size == targets.size


def test_fewer_tokens_are_the_first_of_more_and_spread_out() -> None:
    many = windows(ALPHABET, Letters(), tokens=1600, length=100)
    few = windows(ALPHABET, Letters(), tokens=400, length=100)
    assert [read(w) for w in many[:4]] == [read(w) for w in few]
    places = sorted(int(w.inputs[0]) - 0x1000 for w in few)
    assert places[0] < 800
    assert places[-1] > 2000


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 100])
def test_order_visits_every_window_once(count: int) -> None:
    cut = windows(ALPHABET[: count * 20 + 1], Letters(), tokens=10**6, length=20)
    assert sorted(int(w.inputs[0]) - 0x1000 for w in cut) == [20 * i for i in range(count)]


def test_windows_open_with_the_start_token_of_the_model() -> None:
    for window in windows(ALPHABET, Letters((7,)), tokens=300, length=100):
        assert window.inputs[0] == 7
        assert window.targets.size == 100
        assert (window.targets[1:] == window.inputs[1:] + 1).all()
        assert 7 not in window.targets


def test_short_text_gives_one_short_window() -> None:
    (window,) = windows(ALPHABET[:50], Letters(), tokens=8192)
    assert window.inputs.size == 49


@pytest.mark.parametrize(("text", "tokens"), [("", 100), ("abc", 100), (ALPHABET, 0), (ALPHABET, -5)])
def test_too_little_is_refused(text: str, tokens: int) -> None:
    with pytest.raises(UsageError) as caught:
        windows(text, Letters(), tokens=tokens)
    assert caught.value.hint


def test_a_file_is_split_at_a_line_end(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("".join(f"line {i}\n" for i in range(1000)), encoding="utf-8")
    text = text_from_file(file)
    assert text.evaluation + text.calibration == file.read_text(encoding="utf-8")
    assert text.evaluation.endswith("\n")
    assert 0.7 < len(text.evaluation) / (len(text.evaluation) + len(text.calibration)) < 0.85
    file.write_text("x" * 1000, encoding="utf-8")  # no line end at all
    assert len(text_from_file(file).calibration) == 200


@pytest.mark.parametrize("content", [b"", b" \n\n ", b"caf\xe9 " * 50])
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"bad\.txt") as caught:
        text_from_file(file)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError):
        text_from_file(tmp_path / name)
