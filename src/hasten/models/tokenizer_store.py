"""A tokenizer as an artifact keeps it: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from hasten.cache.reading import is_there, read_file
from hasten.core import as_json
from hasten.errors import ArtifactError
from hasten.models.tokenizer_fields import TokenizerFields

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

VOCABULARY, CONFIG = "tokenizer.json", "tokenizer_config.json"
SCHEMA_VERSION = 1
_KNOWN = ("schema_version", "bos_id", "eos_ids", "vocab_size", "special_tokens")
_AGAIN = "make the artifact again with: hasten optimize MODEL"


def save(backend: Backend, fields: TokenizerFields, folder: Path) -> None:
    """Write both files into `folder`, which must exist.

    Raises:
        ArtifactError: the files cannot be written.
    """
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **fields.special_tokens,
        "hasten": {
            "schema_version": SCHEMA_VERSION,
            "bos_id": fields.bos_id,
            "eos_ids": list(fields.eos_ids),
            "vocab_size": fields.vocab_size,
            "special_tokens": dict(fields.special_tokens),
        },
    }
    if fields.chat_templates:
        config["chat_template"] = [{"name": n, "template": t} for n, t in fields.chat_templates.items()]
        if set(fields.chat_templates) == {"default"}:
            config["chat_template"] = fields.chat_templates["default"]
    try:
        (folder / VOCABULARY).write_text(_compact(backend), encoding="utf-8")
        (folder / CONFIG).write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"the tokenizer cannot be written to {folder}: {error.strerror}",
            hint="check that the folder exists, may be written to and that the disk has room",
        ) from error


def digest(vocabulary: str, fields: TokenizerFields) -> str:
    """Names a tokenizer: of the SHA-256 of its tokenizer.json as `save` writes it, and of its fields."""
    known = json.dumps([vocabulary, as_json(fields)], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def computed_digest(backend: Backend, fields: TokenizerFields) -> str:
    """`digest` of a tokenizer that lies in no file of ours; takes 0.5 s for 150,000 tokens."""
    return digest(hashlib.sha256(_compact(backend).encode()).hexdigest(), fields)


def _compact(backend: Backend) -> str:
    """tokenizer.json without blanks and with merges as "left right": half the bytes, quicker to load."""
    document = json.loads(backend.to_str())
    merges = document["model"].get("merges")
    if merges and not any(" " in half for merge in merges for half in merge):
        document["model"]["merges"] = [" ".join(merge) for merge in merges]
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def load(folder: Path) -> tuple[Callable[[], Backend], TokenizerFields, Callable[[], str]]:
    """Fields at once, and the tokenizer and its digest as calls that wait for a thread already parsing it.

    Parsing 150,000 tokens takes about 0.3 s and holds the interpreter lock: it runs beside native code only,
    such as the reading of weights.

    Raises:
        ArtifactError: a file is missing or tokenizer_config.json was not written by `save`.
    """
    if not is_there(folder / VOCABULARY):
        raise ArtifactError(f"{folder} has no {VOCABULARY}", hint=_AGAIN)
    fields = _fields(folder / CONFIG)
    parsing = _Parsing(folder / VOCABULARY, fields.vocab_size)
    return parsing.result, fields, lambda: digest(parsing.sha256(), fields)


class _Parsing:
    """A tokenizer.json being parsed by a thread."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path = path
        self._data = _read(path)  # now: what was verified a moment ago may be gone when the thread gets to it
        self._vocab_size = vocab_size
        self._backend: Backend | None = None
        self._sha256 = ""
        self._reason = ""
        self._thread = Thread(target=self._parse, name="hasten-tokenizer", daemon=True)
        self._thread.start()

    def _parse(self) -> None:
        from tokenizers import Tokenizer

        try:
            self._sha256 = hashlib.sha256(self._data).hexdigest()  # 3 ms
            self._backend = Tokenizer.from_buffer(self._data)
            self._data = b""
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            self._reason = str(error)

    def sha256(self) -> str:
        self.result()
        return self._sha256

    def result(self) -> Backend:
        self._thread.join()
        if self._backend is None:
            raise ArtifactError(f"{self._path} cannot be read: {self._reason}", hint=_AGAIN)
        size = self._backend.get_vocab_size()
        if size != self._vocab_size:
            raise ArtifactError(f"{self._path} has {size} tokens, {self._vocab_size} were saved", hint=_AGAIN)
        return self._backend


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", hint=_AGAIN) from error


def _fields(path: Path) -> TokenizerFields:
    try:
        config = json.loads(read_file(path))
        own = config["hasten"]
        if own["schema_version"] != SCHEMA_VERSION:
            raise ArtifactError(
                f"{path} has schema version {own['schema_version']!r}, this Hasten reads {SCHEMA_VERSION}",
                hint=_AGAIN,
            )
        strange = next((name for name in own if name not in _KNOWN and own[name] is not None), None)
        if strange is not None:
            raise ArtifactError(
                f"{path}: this program does not know the field hasten.{strange}",
                hint=f"update Hasten to the version that wrote it, or {_AGAIN}",
            )
        template = config.get("chat_template", [])
        named = [{"name": "default", "template": template}] if isinstance(template, str) else template
        return TokenizerFields(
            bos_id=None if own["bos_id"] is None else int(own["bos_id"]),
            eos_ids=tuple(int(i) for i in own["eos_ids"]),
            vocab_size=int(own["vocab_size"]),
            special_tokens={str(name): str(token) for name, token in own["special_tokens"].items()},
            chat_templates={str(entry["name"]): str(entry["template"]) for entry in named},
        )
    except FileNotFoundError:
        raise ArtifactError(f"{path.parent} has no {path.name}", hint=_AGAIN) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", hint=_AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} was not written by Hasten: {error!r}", hint=_AGAIN) from error
