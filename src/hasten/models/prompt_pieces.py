"""Where a prompt can be cut without changing a token."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def cutter(backend: Backend) -> Callable[[str], list[str]] | None:
    """A function that cuts a text behind special tokens so that each piece encodes on its own.

    The `tokenizers` library takes added tokens out first (those that no normalizer changes) and then treats
    what is between them piece by piece (AddedVocabulary.extract_and_normalize), so a cut behind one changes
    nothing; unless the token takes blanks beside it with it, or the parts that follow treat the first piece
    in another way (Metaspace, prefix spaces, normalizers that prepend).

    Returns:
        None where that may not hold.
    """
    tokens = [token for token in backend.get_added_tokens_decoder().values() if not token.normalized]
    if not tokens or any(t.lstrip or t.rstrip or t.single_word for t in tokens):
        return None
    if not (_is_local(backend.pre_tokenizer) and _is_local(backend.normalizer)):
        return None
    texts = sorted(
        {t.content for t in tokens if t.content}, key=len, reverse=True
    )  # the longest that matches wins
    behind = re.compile("|".join(map(re.escape, texts)))

    def cut(text: str) -> list[str]:
        ends = [match.end() for match in behind.finditer(text)]
        starts = [0, *(end for end in ends if end < len(text))]
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]

    return cut


_LOCAL = {"ByteLevel", "Split", "Digits", "Punctuation", "Sequence", "NFC", "NFKC", "NFD", "NFKD"}


def _is_local(part: Any) -> bool:
    """Whether a pre-tokenizer or normalizer treats a piece the same wherever it stands."""
    if part is None:
        return True
    found = json.loads(part.__getstate__())
    inner = found.get("pretokenizers", found.get("normalizers", []))
    return all(p.get("type") in _LOCAL and not p.get("add_prefix_space") for p in [found, *inner])
