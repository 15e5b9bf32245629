"""One entry for all kinds: what it reports, and what it refuses before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hasten.compress.calibration import Calibration
from hasten.compress.prune import prune
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.recipe import Pruning
from prune_models import hidden, text

SMALLER = {"ffn": 0.25, "heads": 0.5, "layers": 0.4, "width": 0.4, "vocabulary": 0.01}


@pytest.mark.parametrize("kind", SMALLER)
def test_smaller_models_get_faster_and_say_so(kind: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("qwen2"))
    told: list[tuple[int, int]] = []
    found = prune(source, Pruning(kind, SMALLER[kind]), text(), lambda d, t: told.append((d, t)))  # type: ignore[arg-type]
    assert found.gets_faster
    assert found.weights_after == found.source.config.weights_stored < found.weights_before
    assert found.bytes_after < found.bytes_before
    assert found.lines()[2].startswith("faster here: ")
    assert len(found.lines()) == 3 + len(found.parts) + len(found.notes)
    assert kind == "vocabulary" or told[-1][0] == told[-1][1] > 0
    ids = text(1).ids[0] % found.source.config.vocab
    assert np.isfinite(hidden(found.source, ids)).all()


@pytest.mark.parametrize("kind", ["magnitude", "wanda", "sparsegpt"])
def test_zeros_do_not_and_say_why(kind: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("qwen2"))
    found = prune(source, Pruning(kind, 0.5), text())  # type: ignore[arg-type]
    assert not found.gets_faster
    assert found.bytes_after == found.bytes_before
    zeros = found.weights_before - found.weights_after
    matrices = found.weights_before - source.config.vocab * source.config.width
    assert zeros == pytest.approx(matrices / 2, rel=0.02)
    assert "zeros are stored" in found.lines()[2]


def test_steps_compose(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("smollm3"))
    for kind, amount in (("layers", 0.2), ("heads", 0.5), ("ffn", 0.3), ("width", 0.4), ("wanda", 0.5)):
        source = prune(source, Pruning(kind, amount), text()).source  # type: ignore[arg-type]
    config = source.config
    block = config.blocks[0]
    assert (len(config.blocks), block.mixer.kv_heads, block.feed_forward.width, config.width) == (
        4, 1, 64, 32,
    )  # fmt: skip
    assert any(block.mixer.rotary is None for block in config.blocks)
    assert np.isfinite(hidden(source, text(1).ids[0])).all()


def test_what_is_left_undone_is_said(tiny_folder: Callable[..., Path]) -> None:
    gemma = open_folder(tiny_folder("gemma3"))
    found = prune(gemma, Pruning("layers", 0.3), text())
    assert "not repaired" in found.notes[0] and found.notes[0] in found.lines()
    assert "not repaired" in prune(gemma, Pruning("vocabulary", 0.01), text()).notes[0]
    assert "tied" in prune(open_folder(tiny_folder("qwen2")), Pruning("width", 0.4), text()).notes[0]
    assert prune(gemma, Pruning("ffn", 0.3), text()).notes == ()


class Untouched:
    """Stands for a calibration text: reading its ids is work."""

    tokens = 10**6

    @property
    def ids(self) -> None:
        raise AssertionError("work before the request was checked")


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (Pruning("ffn", 0.97), "leaves no channel"),
        (Pruning("width", 0.1), "takes no hidden dimension out"),
        (Pruning("heads", 0.01), "leaves none or takes none out"),
        (Pruning("layers", 0.1), "takes no layer out"),
        (Pruning("wanda", 0.5, (2, 5)), "pattern 2:5 does not divide"),
        (Pruning("magnitude", 0.5, (1, 7), repair=False), "pattern 1:7 does not divide"),
    ],
)
def test_refused_before_any_work(pruning: Pruning, message: str, tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("llama"))
    with pytest.raises(UsageError, match=message) as refused:
        prune(source, pruning, Untouched())  # type: ignore[arg-type]
    assert refused.value.hint


def test_too_little_text_is_refused(tiny_folder: Callable[..., Path]) -> None:
    source = open_folder(tiny_folder("llama"))
    with pytest.raises(UsageError, match="needs calibration text, got none"):
        prune(source, Pruning("ffn", 0.25), None)
    few = Calibration("few", np.zeros((1, 50), np.int32))
    with pytest.raises(UsageError, match="50 tokens of calibration text are too few") as refused:
        prune(source, Pruning("ffn", 0.25), few)
    assert "96 tokens" in (refused.value.hint or "")
    prune(source, Pruning("ffn", 0.25, repair=False), few)
    prune(source, Pruning("magnitude", 0.25, repair=False), None)
