"""The calibration text, cut in two."""

from __future__ import annotations

import pytest

from hasten.optimize.calibrated import split
from hasten.quality.text import default_text


def test_every_line_is_in_one_part_alone() -> None:
    lines = [f"line {i}: {'x' * (i % 37)}" for i in range(400)]
    found = split("\n".join(lines) + "\n")
    calibrate, held_out = found.calibrate.splitlines(), found.held_out.splitlines()
    assert sorted([*calibrate, *held_out]) == sorted(lines)
    assert not set(calibrate) & set(held_out)
    assert len(held_out) == pytest.approx(100, abs=12)


def test_a_text_without_lines_is_cut_all_the_same() -> None:
    found = split("abcdefgh" * 100)
    assert len(found.held_out) == 200
    assert len(found.calibrate) == 600


def test_nothing_is_nothing() -> None:
    assert split("").held_out == ""


def test_the_default_text_gives_both_enough() -> None:
    text = default_text()
    found = split(text.calibration)
    assert len(found.held_out) > 12_000  # characters: some three thousand tokens
    assert len(found.calibrate) > 36_000
    assert found.held_out[:2000] not in text.evaluation
