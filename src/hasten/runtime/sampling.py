"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.errors import HastenError, UsageError
from hasten.machine.cores import usable_cores

Masks = npt.NDArray[np.uint32]  # [rows, ceil(V / 32)]: bit t % 32 of word t / 32 allows token t

MOST_BIAS = 100.0  # to either side, as in OpenAI's API
_MOST_TOP_K = 2**31 - 1  # more than any vocabulary: the native engine counts in int32


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its natural-log probability in the model's own distribution: before penalties, bias,
    grammar and temperature."""

    token: int
    logprob: float
    rank: int  # 1 = the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the likeliest, best first


@dataclass(frozen=True)
class SamplingOptions:
    """Bias, then penalties change the logits, temperature scales them, top-k, top-p and min-p cut them.

    Sources: transformers' generate() for the cuts and the repetition penalty (Keskar et al., CTRL, 2019),
    OpenAI's API for bias, presence and frequency.

    Raises:
        UsageError: a value outside its range or not of its type.
    """

    temperature: float = 0.0  # 0 = greedy: the largest logit, the lowest id of equals
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # with the position it fixes the draw, whatever else is in the batch
    ignore_eos: bool = False  # go on past the end token: for benchmarks
    repetition_penalty: float = 1.0  # prompt and answer: logits above 0 are divided by it, others multiplied
    presence_penalty: float = 0.0  # the answer: taken from the logits of its tokens, once
    frequency_penalty: float = 0.0  # the answer: taken from the logits of its tokens, each time they came
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # token id: added to its logit

    def __post_init__(self) -> None:
        self._need(_real(self.temperature) >= 0.0, "temperature", "0 or more")
        self._need(_whole(self.top_k) >= 0, "top_k", "0 (all) or more")
        self._need(0.0 < _real(self.top_p) <= 1.0, "top_p", "above 0, at most 1")
        self._need(0.0 <= _real(self.min_p) <= 1.0, "min_p", "from 0 to 1")
        self._need(0 <= _whole(self.seed) < 2**64, "seed", "from 0 to 2^64 - 1")
        self._need(_real(self.repetition_penalty) > 0.0, "repetition_penalty", "above 0 (1 = none)")
        self._need(-2.0 <= _real(self.presence_penalty) <= 2.0, "presence_penalty", "from -2 to 2")
        self._need(-2.0 <= _real(self.frequency_penalty) <= 2.0, "frequency_penalty", "from -2 to 2")
        object.__setattr__(self, "logit_bias", _bias_of(self.logit_bias))

    def _need(self, good: bool, name: str, range_: str) -> None:
        if not good:
            raise UsageError(f"{name} is {getattr(self, name)!r}", hint=f"give a {name} {range_}")


def _real(value: Any) -> float:
    """The value as a float; NaN, which fits no range, if it is no finite number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:  # an int beyond the floats
        return math.nan
    return number if math.isfinite(number) else math.nan


def _whole(value: Any) -> int:
    """The value as an int; -1, which fits no range, if it is no whole number."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else -1


class _Checked(dict[int, float]):
    """A checked bias. The answers of a request share one: to check 10,000 tokens takes 15 ms."""

    @cached_property
    def arrays(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Tokens and what is added to their logits."""
        count = len(self)
        return np.fromiter(self, np.int32, count), np.fromiter(self.values(), np.float32, count)


def _bias_of(given: Any) -> _Checked:
    """A checked copy: what the caller does with theirs later changes nothing."""
    if isinstance(given, _Checked):
        return given
    if not isinstance(given, Mapping):
        raise UsageError(
            f"logit_bias is {type(given).__name__}",
            hint="give a mapping from token ids to numbers: {50: -1.5}",
        )
    for token, bias in given.items():
        if not 0 <= _whole(token) < 2**31:
            raise UsageError(
                f"logit_bias is for token {token!r}", hint="give token ids: whole numbers from 0"
            )
        if not abs(_real(bias)) <= MOST_BIAS:
            raise UsageError(
                f"logit_bias of token {token} is {bias!r}", hint="give each logit_bias from -100 to 100"
            )
    return _Checked((int(token), float(bias)) for token, bias in given.items())


class SequenceSampler:
    """Chooses one answer's tokens: its options, and the token counts that its penalties ask for.

    Memory: nothing without penalties; with them at most 32 bytes a distinct token of prompt and answer.

    Args:
        options: how to choose.
        prompt: token ids; the repetition penalty counts them.
        vocab_size: V, the width of the logits.

    Raises:
        UsageError: a token of the prompt or of logit_bias is not in the vocabulary.
    """

    __slots__ = ("_native", "options")

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], vocab_size: int) -> None:
        assert isinstance(options.logit_bias, _Checked)
        tokens, biases = options.logit_bias.arrays
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise UsageError(
                f"logit_bias is for token {tokens.max()}, the model has {vocab_size}",
                hint=f"give token ids from 0 to {vocab_size - 1}",
            )
        self.options = options
        self._native = _native.SequenceSampler(
            vocab_size,
            float(options.temperature),
            min(int(options.top_k), _MOST_TOP_K),
            float(options.top_p),
            float(options.min_p),
            int(options.seed),
            float(options.repetition_penalty),
            float(options.presence_penalty),
            float(options.frequency_penalty),
            tokens,
            biases,
        )
        if options.repetition_penalty != 1.0:
            try:
                self._native.add_prompt(prompt)
            except ValueError as wrong:
                raise UsageError(
                    f"the prompt's {wrong}", hint=f"give ids from 0 to {vocab_size - 1}"
                ) from None

    def accept(self, tokens: Sequence[int]) -> None:
        """Count answer tokens that choose() did not choose: of an answer that is computed again."""
        self._native.accept(tokens)


@dataclass
class Choice:
    """What one sequence got in a step."""

    tokens: list[int]  # the drafts that were drawn, and one more
    logprobs: list[TokenLogprob]  # one a token, if asked for
    # drafts that were verified: fewer than proposed where a grammar forbids the rest
    drafted: int = field(default=0, compare=False)
    error: str = ""  # why the token after `tokens` cannot be chosen; the sequence cannot go on


def choose(
    logits: npt.NDArray[np.float32],
    samplers: Sequence[SequenceSampler],
    drafts: Sequence[Sequence[int]],
    positions: Sequence[int],
    masks: Sequence[Masks | None],
    logprobs: Sequence[int | None],
    *,
    threads: int | None = None,
) -> list[Choice]:
    """The next tokens of all sequences of a step, and count them in their samplers.

    Sequence i has 1 + len(drafts[i]) rows, one after another. Row j is sampled as if drafts[i][:j] were part
    of the answer, and counts if they were drawn, so that the tokens are those of plain decoding.

    Args:
        logits: float32 [R, V].
        samplers: each sequence's own.
        drafts: tokens proposed for each sequence; none for plain decoding.
        positions: each sequence's place of row 0: with the seed it fixes the draw.
        masks: uint32 [rows, ceil(V / 32)] or None: bit t % 32 of word t / 32 allows token t. A mask may have
            fewer rows than the sequence: no further tokens are chosen then.
        logprobs: alternatives to report with each token, 0 = the chosen one alone, None = no logprobs.
        threads: of the native pool; None: `usable_cores`.

    Returns:
        A choice a sequence. A row with NaN, or without a token that is allowed, fails its own sequence alone:
        its choice has the tokens before that row, and an error.
    """
    chosen = _native.choose(
        logits,
        [sampler._native for sampler in samplers],
        drafts,
        positions,
        list(masks),
        list(logprobs),
        usable_cores() if threads is None else threads,
    )
    return [
        Choice(
            tokens,
            [TokenLogprob(*score) for score in scores],
            len(proposed),
            no_token(error, position + len(tokens)) if error else "",
        )
        for (tokens, scores, error), position, proposed in zip(chosen, positions, drafts, strict=True)
    ]


def choose_of_few(
    logits: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int32],
    totals: npt.NDArray[np.float64],
    samplers: Sequence[SequenceSampler],
    positions: Sequence[int],
    *,
    threads: int,
) -> list[int | None]:
    """What `choose` draws without masks and drafts, from the highest logits of each row alone; counts it.

    They tell all that top-k keeps, as long as penalties and biases only lower what is not among them; and
    what top-p or min-p keeps, as long as these few weigh enough. A row without any cut is never told.

    Args:
        logits: float32 [R, N], the N highest of each row.
        ids: int32 [R, N], their tokens, which rise.
        totals: float64 [R], the sum of e^((logit - largest) / temperature) over the whole row; needed where
            top-p is the only cut. As it is summed in another order, a draw that falls on the edge between two
            tokens may differ from that of `choose`.

    Returns:
        A token a row; None: the whole row is needed, and nothing was counted.
    """
    natives = [sampler._native for sampler in samplers]
    found = _native.choose_of_few(logits, ids, totals, natives, positions, threads)
    return [token if token >= 0 else None for token in found]


def no_token(error: str, position: int) -> str:
    """Why no token can be chosen at a position; `error` "nan": a logit is no number."""
    if error == "nan":
        return f"the model gave logits that are no numbers at position {position}"
    return f"no token may follow at position {position}: the grammar or the logits rule out all"


def score(
    logits: npt.NDArray[np.float32], targets: Sequence[int], top: int, *, threads: int | None = None
) -> list[TokenLogprob]:
    """Logprobs of given tokens: of a prompt.

    Args:
        logits: float32 [R, V].
        targets: R token ids, one a row.
        top: alternatives to report with each, 0 = none.
        threads: of the native pool; None: `usable_cores`.

    Raises:
        HastenError: a logit is NaN, or a row is all minus infinity.
    """
    count = usable_cores() if threads is None else threads
    scores = [TokenLogprob(*one) for one in _native.score(logits, targets, top, count)]
    for row, one in enumerate(scores):
        if math.isnan(one.logprob):
            raise _no_numbers(f"row {row}")
    return scores


def _no_numbers(where: str) -> HastenError:
    return HastenError(
        f"the model gave logits that are no numbers ({where})",
        hint="check the weights: hasten eval MODEL --recipe bf16",
    )
