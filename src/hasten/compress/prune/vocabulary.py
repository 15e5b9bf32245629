"""Vocabulary: rows of the embedding and the head go whose tokens a text has no use for.

What stays: special and added tokens and single bytes, then the tokens of the corpus by how often they come,
then the others in the order of their ids, which is the order they were learned in. With each token stays all
that its merges are built of, so that any text can still be written, in more tokens. Merges that stay keep
their order. Where a text's tokens all stay, and with them all that was merged on the way, the smaller
tokenizer merges the same pairs in the same order and gives the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from hasten.compress.calibration import Calibration
from hasten.compress.prune import Observer, PartPruned, Parts, Pruner
from hasten.compress.torch_model import taken_rows
from hasten.core import ModelSpec
from hasten.errors import UsageError
from hasten.models.source import Source, once
from hasten.models.text_stream import BYTE_TOKEN, byte_alphabet
from hasten.models.tokenizer import Tokenizer
from hasten.recipe import Pruning

_HINT = "leave prune: vocabulary out, or open a model with a BPE tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and merges of a BPE tokenizer."""

    tokens: Mapping[int, str]  # added ones included
    ids: Mapping[str, int]  # of the model's own tokens
    ranks: Mapping[tuple[str, str], int]  # of merges: the lowest goes first
    added: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """What a tokenizer holds.

        Raises:
            UsageError: it is no plain BPE.
        """
        document = _document(tokenizer)
        model = document["model"]
        _check(model)
        ids = model["vocab"]
        added = {entry["id"]: entry["content"] for entry in document.get("added_tokens", [])}
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        return cls(
            {**{index: token for token, index in ids.items()}, **added},
            ids,
            {(left, right): rank for rank, (left, right) in enumerate(merges)},
            frozenset(added),
        )

    def needed(self) -> set[int]:
        """Tokens that stay whatever the text: added ones, single bytes and the unknown."""
        letters = set(byte_alphabet().values())
        bytes_ = {i for token, i in self.ids.items() if token in letters or BYTE_TOKEN.fullmatch(token)}
        unknown = {self.ids[token] for token in ("<unk>", "\u2581") if token in self.ids}
        return bytes_ | unknown | self.added

    def parts_of(self, token: int) -> set[int]:
        """A token with all that is merged on the way to it; ids."""
        if token in self.added:
            return {token}
        text = self.tokens[token]
        parts = list(text)
        seen = {text, *parts}
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            at = min(range(len(pairs)), key=lambda i: self.ranks.get(pairs[i], _NEVER))
            if pairs[at] not in self.ranks:
                break  # a token that no merges give: it is taken whole, or never
            parts[at : at + 2] = ["".join(pairs[at])]
            seen.add(parts[at])
        return {self.ids[part] for part in seen if part in self.ids}


_NEVER = 1 << 60


def rebuilt(tokenizer: Tokenizer, place: Mapping[int, int]) -> Tokenizer:
    """The tokenizer of some tokens, under new ids.

    Args:
        place: old id -> new id, of every token that stays; closed under `Vocabulary.parts_of`.

    Raises:
        UsageError: a part of the tokenizer names tokens in a way that is not known.
    """
    from tokenizers import Tokenizer as Backend

    document = _document(tokenizer)
    model = document["model"]
    model["vocab"] = {token: place[i] for token, i in model["vocab"].items() if i in place}
    model["merges"] = [merge for merge in model["merges"] if _stays(merge, model["vocab"])]
    document["added_tokens"] = [
        entry | {"id": place[entry["id"]]}
        for entry in document.get("added_tokens", [])
        if entry["id"] in place
    ]
    document["post_processor"] = _processor(document.get("post_processor"), place)
    document["padding"] = document["truncation"] = None
    backend = Backend.from_str(json.dumps(document))
    fields = tokenizer.fields
    return Tokenizer(
        lambda: backend,
        replace(
            fields,
            bos_id=None if fields.bos_id is None else place[fields.bos_id],
            eos_ids=tuple(place[i] for i in fields.eos_ids),
            vocab_size=backend.get_vocab_size(),
        ),
    )


def _document(tokenizer: Tokenizer) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tokenizer.to_json())
    return document


def _check(model: Mapping[str, Any]) -> None:
    kind = model.get("type")
    if kind != "BPE":
        raise UsageError(
            f"prune vocabulary: the tokenizer is of kind {kind}; only BPE can be cut, because its tokens are "
            "built of others",
            hint=_HINT,
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UsageError(
                f"prune vocabulary: the tokenizer has a {name.replace('_', ' ')}, {model[name]!r}, which "
                "is not supported",
                hint=_HINT,
            )


def _stays(merge: str | list[str], ids: Mapping[str, int]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in ids and right in ids and left + right in ids


def _processor(spec: Any, place: Mapping[int, int]) -> Any:
    """A post-processor with new ids: what puts special tokens around a text."""
    if spec is None:
        return None
    kind = spec["type"]
    if kind == "Sequence":
        return spec | {"processors": [_processor(part, place) for part in spec["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: entry | {"ids": [place[i] for i in entry["ids"]]}
            for name, entry in spec["special_tokens"].items()
        }
        return spec | {"special_tokens": special}
    if kind in ("RobertaProcessing", "BertProcessing"):
        return spec | {name: [spec[name][0], place[spec[name][1]]] for name in ("sep", "cls")}
    if kind == "ByteLevel":
        return spec
    raise UsageError(
        f"prune vocabulary: the tokenizer has a post-processor of kind {kind}, which is not supported",
        hint=_HINT,
    )


class Words(Pruner):
    """`vocabulary`: keep the part of the vocabulary that a text needs most.

    Ids are dense again: token by token, the order stays. Nothing is repaired: the rows that stay are the
    source's own bytes.
    """

    unit = "tokens"
    because = "a smaller head is read for every token"

    def after(self, config: ModelSpec, pruning: Pruning) -> ModelSpec:
        return config  # which tokens fit shows when the text is counted

    def run(self, source: Source, pruning: Pruning, text: Calibration | None, step: Observer) -> Parts:
        assert text is not None
        config = source.config
        tokenizer = source.tokenizer()
        vocabulary = Vocabulary.of(tokenizer)
        special = {*config.eos_token_ids, *tokenizer.eos_ids, config.bos_token_id, tokenizer.bos_id} - {None}
        kept = {i for i in vocabulary.needed() | special if i is not None and i < config.vocab}
        room = round((1 - pruning.amount) * config.vocab)
        if room < len(kept) or room >= config.vocab:
            raise UsageError(
                f"prune vocabulary: amount {pruning.amount:g} leaves {room:,} of {config.vocab:,} "
                f"tokens; special ones and single bytes alone are {len(kept):,}",
                hint=f"use an amount below {1 - len(kept) / config.vocab:.3f}",
            )
        counts = np.bincount(text.ids.reshape(-1), minlength=config.vocab)
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
        return result, [PartPruned("vocabulary", len(order), config.vocab)]

    def inputs(self, config: ModelSpec) -> int:
        """Nothing is fitted."""
        return 1

    def notes(self, config: ModelSpec, pruning: Pruning) -> tuple[str, ...]:
        because = "rows that stay are the original's, and no other token stands for one that went"
        return (f"not repaired: {because}",) if pruning.repair else ()
