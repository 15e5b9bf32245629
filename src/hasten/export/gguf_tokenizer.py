"""A tokenizer as GGUF metadata: the inverse of hasten.models.gguf_tokenizer, checked by it.

Byte-level BPE becomes kind "gpt2", BPE over SentencePiece pieces kind "llama". Before a file is written the
metadata is read back, and both tokenizers must cut a set of texts alike.

Source: the GGUF specification's tokenizer keys, and what llama.cpp's converter writes for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hasten.cache.reading import read_file
from hasten.errors import TokenizerError
from hasten.models.gguf_tokenizer import GPT2, KEY, KINDS
from hasten.models.sentencepiece import SPACE, PieceType
from hasten.models.tokenizer import Tokenizer

_HINT = "--to compressed-tensors carries tokenizer.json as it is"
_UNNAMED = "default"  # GGUF's word for "not told", which llama.cpp warns about; "gpt-2" cuts alike

_PROBES = (
    "The quick brown fox doesn't jump over 13 lazy dogs, 2048 times; it's 3.14159 o'clock.",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # \t tabs\n\n\n\n"
    'if __name__ == "__main__":\r\n    pass\n',
    "trailing and      inner blanks   ",
    "Gr\u00fc\u00dfe, na\u00efve caf\u00e9; \u4f60\u597d\uff0c\u4e16\u754c\u3002 "
    "\u041f\u0440\u0438\u0432\u0435\u0442! \u3053\u3093\u306b \u0645\u0631\u062d \U0001f600\U0001f680",
    "HTTPServer2 camelCase snake_case 100,000.00 $5.00 a+b=c x**2 [[[]]] ... !!! ---",
)

_EDGES = {
    "begin with a blank": (" x", "   leading", "\u2581a \u2581\u2581 b"),
    "are not in Unicode's composed form (NFC)": ("e\u0301", "\ufb01"),
}
"""What only some readers of the format do as the model's own tokenizer; a difference is told, not refused."""


def tokenizer_metadata(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> dict[str, Any]:
    """`tokenizer.*` of a GGUF file.

    Args:
        folder: the artifact, which holds tokenizer.json.
        vocab_size: rows of the embedding; ids without a token are filled up.

    Raises:
        TokenizerError: a kind that GGUF has no word for, or one whose copy cuts texts differently.
    """
    spec = json.loads(read_file(folder / "tokenizer.json"))
    model = spec["model"]
    if model["type"] != "BPE":
        raise _refuse(
            f"a {model['type']} tokenizer", "only BPE, byte-level or of SentencePiece, is supported"
        )
    tokens, types = _vocabulary(spec, vocab_size)
    if _has(spec.get("decoder"), "ByteLevel"):
        values = _byte_level(spec, types)
    else:
        values = _sentencepiece(spec, tokens, types)
    values |= {"tokens": tokens, "token_type": np.array(types, np.int32)}
    values |= _ids(tokenizer, tokens) | _frame(tokenizer)
    metadata = {KEY + name: value for name, value in values.items()}
    metadata |= _templates(tokenizer.fields.chat_templates)
    return metadata


def check(tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Read the metadata back and compare the two tokenizers.

    Returns:
        What the format leaves out, in words.

    Raises:
        TokenizerError: they cut a text differently.
    """
    copy = Tokenizer.from_gguf(metadata)
    marked = " ".join(list(tokenizer.fields.special_tokens.values())[:4])
    behind = (f"{marked}word{marked} two",)
    is_bytes = metadata[KEY + "model"] == "gpt2"
    for text in (*_PROBES, *(behind if is_bytes else ())):
        for add_special in (True, False):
            ours, theirs = (t.encode(text, add_special=add_special) for t in (tokenizer, copy))
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
                raise _refuse(
                    "this tokenizer", f"the copy gives {text[:30]!r} other tokens, from token {at} on"
                )
    notes = []
    missing = [tokenizer.decode([i], skip_special=False) for i in set(tokenizer.eos_ids) - set(copy.eos_ids)]
    if missing:
        notes.append(f"the format names three end tokens; {', '.join(missing)} also ended answers")
    for which, texts in {**_EDGES, "follow a special token": () if is_bytes else behind}.items():
        if any(copy.encode(text) != tokenizer.encode(text) for text in texts):
            notes.append(
                f"texts that {which} may be cut into other tokens: readers of the format differ there"
            )
    return tuple(notes)


def _refuse(what: str, why: str) -> TokenizerError:
    return TokenizerError(f"gguf cannot carry {what}: {why}", hint=_HINT)


def _parts(spec: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences opened."""
    if not spec:
        return []
    inner = next((spec[k] for k in ("pretokenizers", "normalizers", "decoders") if k in spec), None)
    return [spec] if inner is None else [part for one in inner for part in _parts(one)]


def _has(spec: Any, kind: str) -> bool:
    return any(part["type"] == kind for part in _parts(spec))


def _vocabulary(spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their PieceType by id."""
    by_id = {index: (token, PieceType.NORMAL) for token, index in spec["model"]["vocab"].items()}
    for added in spec.get("added_tokens") or ():
        kind = PieceType.CONTROL if added["special"] else PieceType.USER_DEFINED
        by_id[added["id"]] = (added["content"], kind)
    if by_id and max(by_id) >= size:
        raise _refuse("this tokenizer", f"it has the id {max(by_id)}, the embedding {size} rows")
    rows = [by_id.get(i, (f"[PAD{i}]", PieceType.UNUSED)) for i in range(size)]
    return [token for token, _ in rows], [int(kind) for _, kind in rows]


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _byte_level(spec: dict[str, Any], types: list[int]) -> dict[str, Any]:
    merges = [" ".join(merge) for merge in _merges(spec)]
    whole_words = bool(spec["model"].get("ignore_merges"))
    splits = _splits(spec.get("pre_tokenizer"))
    for name, kind in KINDS.items():
        if name != _UNNAMED and kind.splits == splits and kind.whole_words == whole_words:
            return {"model": "gpt2", "pre": name, "merges": merges}
    shown = " and ".join(repr(split[:40]) for split in splits)
    raise _refuse("this pre-tokenizer", f"no known name stands for splitting by {shown}")


def _splits(spec: Any) -> tuple[str, ...]:
    """The expressions that cut text, as hasten.models.gguf_tokenizer lists them."""
    found: list[str] = []
    for part in _parts(spec):
        if part["type"] == "Split" and "Regex" in part["pattern"] and not part.get("invert"):
            found.append(part["pattern"]["Regex"])
        elif part["type"] == "Digits" and part.get("individual_digits"):
            found.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            found += [GPT2] if part["use_regex"] else []
        else:
            raise _refuse("this pre-tokenizer", f"it has a step {part['type']} that GGUF cannot say")
    return tuple(found)


def _sentencepiece(spec: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Scores take the place of merges: a token's is minus the place of the first merge that makes it."""
    known = ("Prepend", "Replace", "Metaspace", "ByteFallback", "Fuse", "Strip")
    strange = [p["type"] for key in ("normalizer", "pre_tokenizer", "decoder") for p in _parts(spec.get(key))
               if p["type"] not in known and not _is_blank_split(p)]  # fmt: skip
    if strange:
        raise _refuse("this tokenizer", f"it has a step {strange[0]} that GGUF cannot say")
    scores: dict[str, int] = {}
    for place, (left, right) in enumerate(_merges(spec)):
        scores.setdefault(left + right, -1 - place)
    last = -1.0 - len(scores) - len(spec["model"]["merges"])
    for index, token in enumerate(tokens):
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        if is_byte and spec["model"].get("byte_fallback"):
            types[index] = PieceType.BYTE
    unknown = spec["model"].get("unk_token")
    found: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "scores": np.array([scores.get(token, last) for token in tokens], np.float32),
        "add_space_prefix": _has(spec.get("normalizer"), "Prepend")
        or _has(spec.get("pre_tokenizer"), "Metaspace"),
    }
    if unknown in tokens:
        types[tokens.index(unknown)] = PieceType.UNKNOWN
        found["unknown_token_id"] = tokens.index(unknown)
    return found


def _is_blank_split(part: dict[str, Any]) -> bool:
    """Gemma's tokenizer.json splits at blanks that its normalizer has already replaced: at nothing."""
    return part["type"] == "Split" and part["pattern"].get("String") in (" ", SPACE)


def _ids(tokenizer: Tokenizer, tokens: list[str]) -> dict[str, int]:
    found = dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False))
    if tokenizer.bos_id is not None:
        found["bos"] = tokenizer.bos_id
    padding = tokenizer.fields.special_tokens.get("pad_token")
    if padding is not None and (index := tokenizer.id_of(padding)) is not None:
        found["padding"] = index
    return {f"{name}_token_id": index for name, index in found.items()}


def _frame(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether a text gets its first and last token."""
    bare, framed = (tokenizer.encode("x", add_special=add) for add in (False, True))
    at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
    before, after = (framed, []) if at is None else (framed[:at], framed[at + len(bare) :])
    if before not in ([], [tokenizer.bos_id]) or after not in ([], list(tokenizer.eos_ids[:1])):
        raise _refuse("this tokenizer", f"it puts the tokens {before} and {after} around a text")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def _templates(templates: Mapping[str, str]) -> dict[str, Any]:
    key = "tokenizer.chat_template"
    return {key if name == "default" else f"{key}.{name}": source for name, source in templates.items()}
