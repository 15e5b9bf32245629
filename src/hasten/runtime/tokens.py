"""Token ids as callers give them, checked and converted in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.errors import UsageError

Ids = npt.NDArray[np.int32]


def token_ids(ids: Sequence[int] | npt.NDArray[Any], vocab_size: int) -> Ids:
    """Token ids as the native engine takes them.

    Args:
        ids: whole numbers from 0 to `vocab_size` - 1: a sequence of ints, NumPy's included, or an array of
            any integer type, [N].
        vocab_size: of the model.

    Returns:
        int32 [N].

    Raises:
        UsageError: what was given is no such sequence (a bool, a float and a string are no ids), or an id is
            not in the vocabulary.
    """
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise _no_ids(f"an array of shape {ids.shape} and type {ids.dtype}")
        lowest, highest = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    else:
        try:
            ids = list(ids)
        except TypeError:
            raise _no_ids(repr(ids)) from None
        if not set(map(type, ids)) <= {int}:  # type() and not isinstance(): True is an int
            for one in ids:
                if isinstance(one, bool) or not isinstance(one, int | np.integer):
                    raise _no_ids(f"{one!r:.60} among them")
            ids = [int(one) for one in ids]
        lowest, highest = (min(ids), max(ids)) if ids else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        strange = highest if highest >= vocab_size else lowest
        raise UsageError(
            f"token id {strange} is not in the vocabulary of {vocab_size}",
            hint="encode text with this model's own tokenizer",
        )
    return np.asarray(ids, np.int32)


def _no_ids(found: str) -> UsageError:
    return UsageError(
        f"token ids must be whole numbers, got {found}", hint="encode text with model.tokenizer.encode(text)"
    )
