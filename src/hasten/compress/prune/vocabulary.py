"""Vocabulary: rows of the embedding and the head go whose tokens a text has no use for.

What stays: special and added tokens and single bytes, then the tokens of the corpus by how often they come,
then the others in the order of their ids, which is the order they were learned in. With each token stays all
that its merges are built of, so that any text can still be written, in more tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from hasten.compress.calibration import Calibration
from hasten.compress.prune.pruned import PartPruned
from hasten.compress.prune.smaller_tokenizer import Vocabulary, rebuilt
from hasten.compress.taken import taken_rows
from hasten.errors import UsageError
from hasten.models.source import Source, once


def prune_vocabulary(
    source: Source, amount: float, calibration: Calibration
) -> tuple[Source, list[PartPruned]]:
    """Keep the part of the vocabulary that a text needs most.

    Ids are dense again: token by token, the order stays. Nothing is repaired: the rows that stay are the
    source's own bytes.

    Args:
        source: the model.
        amount: fraction of the embedding's rows that go.
        calibration: the corpus, as ids.

    Raises:
        UsageError: the tokenizer is of a kind that cannot be cut, or fewer tokens stay than any text needs.
        TokenizerError: the model has no tokenizer that can be built.
    """
    config = source.config
    tokenizer = source.tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    special = {*config.eos_token_ids, *tokenizer.eos_ids, config.bos_token_id, tokenizer.bos_id} - {None}
    kept = {i for i in vocabulary.needed() | special if i is not None and i < config.vocab_size}
    room = round((1 - amount) * config.vocab_size)
    if room < len(kept) or room >= config.vocab_size:
        raise UsageError(
            f"prune vocabulary: amount {amount:g} leaves {room:,} of {config.vocab_size:,} tokens; special "
            f"ones and single bytes alone are {len(kept):,}",
            hint=f"use an amount below {1 - len(kept) / config.vocab_size:.3f}",
        )
    counts = np.bincount(calibration.ids.reshape(-1), minlength=config.vocab_size)
    for token in np.lexsort((np.arange(len(counts)), -counts)).tolist():
        if len(kept) >= room:
            break
        parts = vocabulary.parts_of(token) if token in vocabulary.tokens else set()
        if len(kept) + len(parts - kept) <= room:
            kept |= parts
    order = sorted(kept)
    place = {old: new for new, old in enumerate(order)}
    smaller = rebuilt(tokenizer, place)
    rows = torch.tensor(order)
    tables = {name: source.tensors[name] for name in ("embed", "head") if name in source.tensors}
    shape = replace(
        config,
        vocab=len(order),
        bos_token_id=None if config.bos_token_id is None else place[config.bos_token_id],
        eos_token_ids=tuple(place[i] for i in config.eos_token_ids),
    )
    tensors = source.tensors | {name: taken_rows(table, rows) for name, table in tables.items()}
    result = replace(source, config=shape, tensors=tensors, load_tokenizer=once(lambda: smaller))
    return result, [PartPruned("vocabulary", len(order), config.vocab_size)]
