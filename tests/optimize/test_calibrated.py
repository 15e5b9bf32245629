"""The calibration text, cut in two."""

from __future__ import annotations

import pytest

from hasten.optimize.calibrated import split
from hasten.quality.text import default_text


def test_every_line_is_in_one_part_alone() -> None:
    lines = [f"line {i}: {'x' * (i % 37)}" for i in range(400)]
    calibrate, held_out = (part.splitlines() for part in split("\n".join(lines) + "\n"))
    assert sorted([*calibrate, *held_out]) == sorted(lines)
    assert not set(calibrate) & set(held_out)
    assert len(held_out) == pytest.approx(100, abs=12)


def test_a_text_without_lines_is_cut_all_the_same() -> None:
    assert [len(part) for part in split("abcdefgh" * 100)] == [600, 200]


def test_nothing_is_nothing() -> None:
    assert split("") == ("", "")


def test_the_default_text_gives_both_enough() -> None:
    text = default_text()
    calibrate, held_out = split(text.calibration)
    assert len(held_out) > 12_000  # characters: some three thousand tokens
    assert len(calibrate) > 36_000
    assert held_out[:2000] not in text.evaluation
