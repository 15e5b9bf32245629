"""A model that is loaded: its weights, its tokenizer and the executor that runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import hasten
from hasten.core import EngineOptions, ModelSpec, Recipe, as_json
from hasten.errors import UsageError
from hasten.machine.cores import cores
from hasten.runtime.executor import open_executor, token_ids
from hasten.runtime.pages import CachedSequence
from hasten.weights.packed import checksum_of
from hasten.weights.plan import LAYOUT_VERSION

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer
    from hasten.weights.packed import PackedLinear, PackedModel

Floats = npt.NDArray[np.float32]


class LoadedModel:
    """What an engine runs: packed weights, tokenizer and executor.

    It computes hidden states and logits of whole texts itself. `LanguageModel` adds what generates.
    """

    def __init__(
        self,
        packed: PackedModel,
        tokenizer: Tokenizer,
        name: str,
        options: EngineOptions,
    ) -> None:
        self.name = name
        self.packed = packed
        self.tokenizer = tokenizer
        self.executor = open_executor(packed, options)
        self.options = replace(options, device=self.executor.device)

    def __getattr__(self, name: str) -> Any:  # of what is not there
        if name in ("executor", "packed"):
            raise UsageError("the model is closed", hint="load it again with hasten.load")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def config(self) -> ModelSpec:
        """The model's shape and variation points."""
        return self.packed.config

    @property
    def recipe(self) -> Recipe:
        """What was done to the weights."""
        return self.packed.recipe

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the linear layers, scales and head included."""
        return self.packed.bits_per_weight

    @property
    def weight_bytes(self) -> int:
        """Bytes of linear layers one decoded token reads."""
        return self.packed.weight_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all matrices in memory."""
        return self.packed.stored_bytes

    @property
    def sampling(self) -> Mapping[str, float]:
        """How the model's authors advise to sample, by the names of `SamplingOptions`; empty: unsaid."""
        return self.tokenizer.fields.sampling

    @property
    def threads(self) -> int:
        """Threads the engine uses."""
        return self.executor.threads

    @property
    def context(self) -> int:
        """Longest prompt plus output, tokens."""
        return self.executor.context

    @property
    def device(self) -> str:
        """What computes: `cpu`, `cuda` ..."""
        return self.executor.device

    @property
    def device_because(self) -> str:
        """Why `device="auto"` is this device; empty where a device was named."""
        return self.executor.because

    @property
    def placement(self) -> dict[str, Any]:
        """What was decided about this machine when the model was loaded, and why: for logs."""
        because = cores().because if self.options.threads is None else ""
        why = {"threads_because": because} if because else {}
        if self.device_because:
            why["device_because"] = self.device_because
        return {
            "device": self.device,
            "threads": self.threads,
            **why,
            "context": self.context,
            "kv_cache": self.executor.summary,
        }

    def hidden(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """Hidden states of every token of a text read from an empty cache.

        Args:
            tokens: int32 [T].

        Returns:
            float32 [T, E], after the final norm.

        Raises:
            UsageError: more tokens than the context, or what is no id of the vocabulary.
        """
        sequence, ids = CachedSequence(), token_ids(tokens, self.config.vocab)
        try:
            return self.executor.hidden(sequence, ids)
        finally:
            self.executor.pool.truncate(sequence, 0)

    def hidden_before(self, opening: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Floats]:
        """The states that predict the tokens of several continuations of one text, which is computed once.

        Args:
            opening: token ids, one or more.
            continuations: token ids of each, one or more.

        Returns:
            Of each continuation float32 [its tokens, E], after the final norm: row r predicts its token r.

        Raises:
            UsageError: more tokens than the context, or what is no id of the vocabulary.
        """
        start, longest = len(opening), max(map(len, continuations))
        kv_class = self.executor.kv_class
        if kv_class(start, True) != kv_class(start + longest, True):  # nothing of the text can be shared
            return [self.hidden([*opening, *one[:-1]])[start - 1 :] for one in continuations]
        sequence, found = CachedSequence(), []
        try:
            first = self.executor.hidden(sequence, token_ids(opening, self.config.vocab))[-1:]
            for one in continuations:
                rows = [first]
                if len(one) > 1:
                    rows.append(self.executor.hidden(sequence, one[:-1]))
                    self.executor.pool.truncate(sequence, start)
                found.append(np.concatenate(rows))
        finally:
            self.executor.pool.truncate(sequence, 0)
        return found

    def logits_of(self, hidden: Floats) -> Floats:
        """float32 [R, E] hidden states -> float32 [R, V] logits, soft-capped where the model does."""
        return self.executor.head(hidden)

    def logits(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> Floats:
        """float32 [T, V]: what the model predicts after each token of a text. Mind the T x V floats."""
        return self.logits_of(self.hidden(tokens))

    def replace(self, name: str, linear: PackedLinear) -> None:
        """Run with another matrix in a linear layer's place.

        An open engine computes the texts that it continues anew.

        Raises:
            UsageError: another thread is computing.
        """
        self.executor.replace(name, linear)
        self.packed.linears[name] = linear

    def close(self) -> None:
        """Give weights and cache back; a second call does nothing. Whatever else is asked is a UsageError."""
        executor = self.__dict__.pop("executor", None)
        self.__dict__.pop("packed", None)
        if executor is not None:
            kind = type(executor)
            executor.close()
            del executor
            kind.give_back()


def fingerprint(model: LoadedModel) -> str:
    """Names a loaded model so exactly that keys, values and answers kept under it may be used again.

    It covers the packed weights, their layouts, norms and biases, the configuration, the kind of KV cache,
    the tokenizer with its chat templates, the layout version, the version of this program and the
    instruction set (two of them may differ by a rounding). A model has the same fingerprint whether it was
    packed just now or read from an artifact or the store. Threads, context and batch limits never change a
    bit: left out.

    Costs one pass over the weights where their checksums are not known yet (0.15 s a GB on two cores), and
    0.5 s with a large tokenizer that was not loaded from an artifact; what was stored has both.

    Args:
        model: it must not be closed. After `model.replace` the fingerprint is another.

    Returns:
        64 hexadecimal digits.
    """
    threads = model.threads
    linears = {
        name: [as_json(linear.layout), linear.rows, linear.cols, checksum_of(linear, threads)]
        for name, linear in model.packed.linears.items()
    }
    vectors = {
        name: hashlib.sha256(np.ascontiguousarray(values, np.float32).tobytes()).hexdigest()
        for name, values in model.packed.vectors.items()
    }
    parts = {
        "hasten": hasten.__version__,
        "layout_version": LAYOUT_VERSION,
        "isa": model.executor.name,
        "config": as_json(model.config),
        "kv": model.recipe.kv,
        "linears": linears,
        "vectors": vectors,
        "tokenizer": model.tokenizer.digest,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
