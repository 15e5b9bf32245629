"""The text that the GPU benchmark trains on: nothing of what judges, and samples that are the model's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_models
from hasten.compress.distil import Decoder
from hasten.models.open import open_folder
from hasten.quality.text import default_text

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distil_text

    return distil_text


def test_what_judges_is_never_trained_on(text: Any) -> None:
    evaluation = default_text().evaluation
    forbidden = text.Forbidden.of(evaluation)
    paragraphs = [p for p in evaluation.split("\n\n") if len(p.split()) > 20]
    quoted = " ".join(paragraphs[3].split()[2:18]).upper()  # 16 words from its middle, other case
    mixed = f"Our own words.\n\n{paragraphs[0]}\n\nAs they say, {quoted} and so on.\n\nMore words."
    assert forbidden.clean(mixed) == "Our own words.\n\nMore words."
    assert forbidden.clean(evaluation).count("\n\n") < 0.25 * evaluation.count("\n\n")
    own = "def add(a, b):\n    return a + b\n\n\nclass Adder:\n    pass"
    assert forbidden.clean(own) == own


def test_windows_that_quote_it_go(text: Any, tmp_path: Path) -> None:
    folder = tiny_models.save_folder(tiny_models.TINY["qwen2"], tmp_path)
    tokenizer = open_folder(folder).tokenizer()
    paragraph = next(
        p for p in default_text().evaluation.split("\n\n") if len(p.split()) > 60 and "--" not in p
    )
    rows = [tokenizer.encode(words, add_special=False)[:150] for words in (paragraph, "plain words " * 40)]
    kept = text.clean(str(folder), np.array(rows, np.int32), cores=1)
    assert kept.tolist() == [rows[1]]


def test_files_of_the_text_itself_are_left_out(text: Any) -> None:
    names = {path.as_posix() for path in text.source_files()}
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("pydoc_data" in name or "/test/" in name or "site-packages" in name for name in names)
    long = "Words that explain at length. " * 10
    source = f'"""{long}"""\ndef f():\n    """Short."""\n\nclass A:\n    """{long}"""'
    assert text.docstrings(source).count("explain at length") == 20
    assert text.docstrings("not python (") == ""


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3-capped", "olmo2", "phi3"])
def test_a_writer_that_remembers_computes_what_the_decoder_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distil_sample

    source = open_folder(tiny_models.save_folder(tiny_models.TINY[name], tmp_path))
    model = Decoder.of(source, torch.float32, torch.device("cpu"))
    openings = np.random.default_rng(0).integers(0, 262, (4, 20)).astype(np.int32)
    ids = distil_sample.sampled(model, openings, length=24, count=5, opening=6, batch=3, seed=1)
    assert ids.shape == (5, 24)
    begun = {tuple(row[at : at + 6]) for row in openings.tolist() for at in range(15)}
    assert all(tuple(row[:6]) in begun for row in ids.tolist())
    writer = distil_sample.Writer(model, 24, 5, seed=0)
    told = torch.from_numpy(ids).long()
    with torch.inference_mode():
        found = torch.stack([writer._step(told[:, at], at) for at in range(24)], dim=1)
        torch.testing.assert_close(found, model.hidden(told), rtol=1e-4, atol=1e-4)


def test_samples_follow_the_models_odds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step drawn 4,000 times: frequencies within five standard errors of the probabilities."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distil_sample

    source = open_folder(tiny_models.save_folder(tiny_models.TINY["qwen2"], tmp_path))
    model = Decoder.of(source, torch.float32, torch.device("cpu"))
    opening = np.arange(8, dtype=np.int32)[None]
    count = 4000
    ids = distil_sample.sampled(model, opening, length=9, count=count, opening=8, batch=count)
    with torch.inference_mode():
        state = model.hidden(torch.from_numpy(opening).long())[0, -1:]
        odds = model.logits(state, model.head())[0].softmax(-1).double().numpy()
    seen = np.bincount(ids[:, -1], minlength=odds.size) / count
    assert (np.abs(seen - odds) <= 5 * np.sqrt(odds * (1 - odds) / count) + 2 / count).all()
