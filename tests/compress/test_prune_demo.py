"""Pruning the demo model: the smaller vocabulary of a real tokenizer."""

from __future__ import annotations

import pytest

from hasten.compress.calibration import cut
from hasten.compress.prune import prune
from hasten.models.open import open_model
from hasten.quality.text import default_text
from hasten.recipe import Pruning

pytestmark = pytest.mark.demo


def test_half_the_vocabulary_still_writes_any_text() -> None:
    source, text = open_model("demo"), default_text()
    calibration = cut("default", text.calibration, source.tokenizer(), tokens=4096)
    smaller = prune(source, Pruning("vocabulary", 0.5), calibration).source
    before, after = source.tokenizer(), smaller.tokenizer()
    part = text.evaluation[:100_000]
    assert after.decode(after.encode(part)) == part
    assert len(after.encode(part)) < 1.05 * len(before.encode(part))
    odd = "\u03a9 \u4f60\u597d \U0001f389 <|im_end|> x"
    assert after.decode(after.encode(odd), skip_special=False) == odd
    assert smaller.config.eos_token_ids == (after.id_of("<|im_end|>"),)
    assert max(after.encode(part + odd)) < smaller.config.vocab <= source.config.vocab / 2
