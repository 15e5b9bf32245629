"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.errors import HastenError, UsageError


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its natural-log probability in the model's own distribution: before penalties, bias, grammar
    and temperature."""

    token: int
    logprob: float
    rank: int  # 1 = the likeliest
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob) of the likeliest, best first


@dataclass(frozen=True)
class SamplingOptions:
    """Temperature first, then top-k, top-p and min-p cut the candidates, as in transformers.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0  # 0 = greedy: the largest logit, the lowest id of equals
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0  # with the position it fixes the draw, whatever else is in the batch
    ignore_eos: bool = False  # go on past the end token: for benchmarks

    def __post_init__(self) -> None:
        self._need(0.0 <= self.temperature < float("inf"), "temperature", self.temperature, "0 or more")
        self._need(self.top_k >= 0, "top_k", self.top_k, "0 (all) or more")
        self._need(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0, at most 1")
        self._need(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 to 1")
        self._need(0 <= self.seed < 2**64, "seed", self.seed, "from 0 to 2^64 - 1")

    def _need(self, good: bool, name: str, value: float, range_: str) -> None:
        if not good:
            raise UsageError(f"{name} is {value}", hint=f"give a {name} {range_}")


def sample(
    logits: npt.NDArray[np.float32], options: SamplingOptions, positions: npt.NDArray[np.int64]
) -> list[int]:
    """Next tokens.

    Args:
        logits: float32 [R, V].
        options: the same for every row.
        positions: int64 [R], each row's place in its sequence: with the seed it fixes the draw.

    Returns:
        R token ids.

    Raises:
        HastenError: a logit is NaN, which means that the weights are damaged or overflow.
    """
    try:
        tokens = _native.sample(
            logits,
            options.temperature,
            min(options.top_k, logits.shape[1]),
            options.top_p,
            options.min_p,
            options.seed,
            positions,
        )
    except ValueError as wrong:
        raise HastenError(
            f"the model gave logits that are no numbers ({wrong})",
            hint="check the weights: hasten eval MODEL --recipe bf16",
        ) from None
    return [int(token) for token in tokens]
