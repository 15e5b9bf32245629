"""A smaller vocabulary: rows, tokenizer and ids follow one another, and any text can still be written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from hasten.compress.calibration import Calibration
from hasten.compress.prune.vocabulary import Vocabulary
from hasten.compress.torch_model import changed, tensor_values
from hasten.errors import UsageError
from hasten.models.open import open_folder
from hasten.models.source import Source, once
from hasten.models.text_stream import TokenizerFields
from hasten.models.tokenizer import Tokenizer
from hasten.quality.text import default_text
from prune_models import hidden, taken

SENTENCE = "the engine reads the weights and the weights are read again"


def trained(corpus: list[str], size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learned from a text, with two special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False), AddedToken("<|start|>")])
    end, start = backend.token_to_id("<|end|>"), backend.token_to_id("<|start|>")
    fields = TokenizerFields(start, (end,), backend.get_vocab_size(), {"eos_token": "<|end|>"})
    return Tokenizer(lambda: backend, fields)


@pytest.fixture(scope="module")
def large(tiny_folder: Callable[..., Path]) -> Source:
    """A tiny model with some hundred learned tokens, and 7 rows that no token has."""
    source = open_folder(tiny_folder("llama"))
    tokenizer = trained([default_text().calibration[:20_000], SENTENCE], 400)
    rows = tokenizer.vocab_size + 7
    config = replace(
        source.config,
        vocab=rows,
        bos_token_id=tokenizer.bos_id,
        eos_token_ids=tokenizer.eos_ids,
    )
    generator = torch.Generator().manual_seed(0)
    tables = {name: torch.randn(rows, 64, generator=generator).bfloat16() for name in ("embed", "head")}
    return replace(changed(source, tables, config=config), load_tokenizer=once(lambda: tokenizer))


def corpus(source: Source) -> Calibration:
    ids = source.tokenizer().encode(SENTENCE, add_special=False)
    return Calibration("sentence", np.array([ids], np.int32))


def test_what_the_corpus_says_is_written_as_before(large: Source) -> None:
    smaller, parts = taken("vocabulary", large, 0.25, corpus(large))
    before, after = large.tokenizer(), smaller.tokenizer()
    assert smaller.config.vocab == after.vocab_size == round(0.75 * large.config.vocab)
    assert [(part.kept, part.total) for part in parts] == [(after.vocab_size, large.config.vocab)]
    assert sorted(after.id_of(token) for token in Vocabulary.of(after).tokens.values()) == list(
        range(after.vocab_size)
    )
    old, new = before.encode(SENTENCE), after.encode(SENTENCE)
    spelled = [Vocabulary.of(t).tokens for t in (before, after)]
    assert [spelled[0][i] for i in old] == [spelled[1][i] for i in new]
    np.testing.assert_array_equal(hidden(smaller, np.array(new)), hidden(large, np.array(old)))


def test_rows_and_ends_follow_their_tokens(large: Source) -> None:
    smaller, _ = taken("vocabulary", large, 0.3, corpus(large))
    before, after = large.tokenizer(), smaller.tokenizer()
    for table in ("embed", "head"):
        old, new = (tensor_values(one.tensors[table]) for one in (large, smaller))
        for index, token in Vocabulary.of(after).tokens.items():
            assert torch.equal(new[index], old[before.id_of(token)]), token
    assert smaller.config.eos_token_ids == after.eos_ids == (after.id_of("<|end|>"),)
    assert smaller.config.bos_token_id == after.bos_id == after.id_of("<|start|>")
    assert after.decode(after.encode("a<|end|>")) == "a"
    assert after.special_ids == {after.id_of("<|end|>"), after.id_of("<|start|>")}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=40))
def test_any_text_comes_back(large: Source, written: str) -> None:
    tokenizer = _smallest(large).tokenizer()
    ids = tokenizer.encode(written, add_special=False)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids, skip_special=False) == written


_MADE: dict[int, Source] = {}


def _smallest(large: Source) -> Source:
    """Hardly more than the bytes."""
    if id(large) not in _MADE:
        amount = 1 - 262 / large.config.vocab
        _MADE[id(large)] = taken("vocabulary", large, amount, corpus(large))[0]
    return _MADE[id(large)]


def test_a_saved_tokenizer_loads_again(large: Source, tmp_path: Path) -> None:
    smaller, _ = taken("vocabulary", large, 0.3, corpus(large))
    smaller.tokenizer().save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(SENTENCE) == smaller.tokenizer().encode(SENTENCE)
    assert loaded.digest == smaller.tokenizer().digest != large.tokenizer().digest


def test_more_than_can_go_is_refused(large: Source) -> None:
    with pytest.raises(UsageError, match="special ones and single bytes alone are 258") as refused:
        taken("vocabulary", large, 0.9, corpus(large))
    most = float(refused.value.hint.split()[-1])
    taken("vocabulary", large, most - 0.003, corpus(large))


def test_tokenizers_of_other_kinds_are_refused(large: Source) -> None:
    backend = Backend(models.Unigram([("a", -1.0), ("b", -2.0)]))
    unigram = Tokenizer(lambda: backend, TokenizerFields(vocab_size=2))
    with pytest.raises(UsageError, match="of kind Unigram") as refused:
        taken("vocabulary", replace(large, load_tokenizer=once(lambda: unigram)), 0.3, corpus(large))
    assert refused.value.hint is not None


def test_posts_that_name_tokens_are_renumbered(large: Source) -> None:
    from tokenizers.processors import TemplateProcessing

    first = large.tokenizer()
    backend = Backend.from_str(first.to_json())
    start = first.id_of("<|start|>")
    backend.post_processor = TemplateProcessing("<|start|> $A", None, [("<|start|>", start)])
    framed = replace(large, load_tokenizer=once(lambda: Tokenizer(lambda: backend, first.fields)))
    smaller = taken("vocabulary", framed, 0.3, corpus(large))[0].tokenizer()
    assert smaller.encode("a")[0] == smaller.id_of("<|start|>") != start
    assert json.loads(smaller.to_json())["post_processor"]["special_tokens"]["<|start|>"]["ids"] == [
        smaller.id_of("<|start|>")
    ]
