"""Tokenizers of Hugging Face folders: tokenizer.json, tokenizer.model, or vocab.json and merges.txt.

Beside them lie small files that add to them: tokenizer_config.json, special_tokens_map.json,
added_tokens.json. Added tokens get the ids that the files say: where those leave a gap behind the vocabulary,
the gap is filled with tokens that no text has, since the `tokenizers` library gives ids one after another.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hasten.cache.reading import is_there, known_content, read_file, read_text
from hasten.core import as_json
from hasten.errors import ArtifactError, TokenizerError
from hasten.models import sentencepiece
from hasten.models.gguf_tokenizer import GPT2, QWEN2, PreTokenizerKind, frame, split_words
from hasten.models.sentencepiece import PieceType, read_sentencepiece
from hasten.models.text_stream import NAMED_TOKENS, TokenizerFields, advised_sampling

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers import Tokenizer as Backend

_log = logging.getLogger("hasten.models")


def from_folder(folder: Path) -> tuple[Tokenizer, TokenizerFields]:
    """The tokenizer a folder describes.

    Raises:
        TokenizerError: there is neither tokenizer.json nor tokenizer.model, or a file is not what it must be.
    """
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    named: dict[str, str] = {}
    complete = is_there(folder / "tokenizer.json")
    if complete:
        backend = _from_json(folder / "tokenizer.json")
    elif is_there(folder / "tokenizer.model"):
        backend, named = _from_sentencepiece(folder / "tokenizer.model")
    elif is_there(folder / "vocab.json") and is_there(folder / "merges.txt"):
        backend, named = _from_merges(folder, config)
    else:
        raise TokenizerError(
            f"{folder} has no tokenizer: none of tokenizer.json, tokenizer.model, and vocab.json with "
            "merges.txt is there",
            hint="copy tokenizer.json of the model into the folder",
        )
    named.update({name: _content(config[name]) for name in NAMED_TOKENS if config.get(name) is not None})
    _add_configured_tokens(backend, config, named, _json(folder / "added_tokens.json"), complete)
    bos_id, eos_id = _id(backend, named.get("bos_token")), _id(backend, named.get("eos_token"))
    _frame(backend, config, (bos_id, eos_id), complete, is_there(folder / "tokenizer.model"))
    generation = _json(folder / "generation_config.json")
    return backend, TokenizerFields(
        bos_id=bos_id,
        eos_ids=_eos_ids(eos_id, generation, _json(folder / "config.json")),
        vocab_size=backend.get_vocab_size(),
        special_tokens=MappingProxyType(named),
        chat_templates=MappingProxyType(_chat_templates(folder, config)),
        sampling=advised_sampling(generation),
    )


# Classes of transformers whose add_bos_token and add_eos_token go before what tokenizer.json does.
_FRAMED = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")


def _frame(
    backend: Tokenizer,
    config: Mapping[str, Any],
    ids: tuple[int | None, int | None],
    complete: bool,
    is_pieces: bool,
) -> None:
    """Put bos and eos around texts where the configuration says so.

    Args:
        backend: the tokenizer.
        config: tokenizer_config.json.
        ids: of bos and eos.
        complete: whether tokenizer.json was there. It knows what goes around a text, unless it says nothing
            or the class is one that asks the configuration.
        is_pieces: whether tokenizer.model was: Llama, the main user of these, puts bos first, nothing last.
    """
    own = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if complete and own not in _FRAMED and backend.post_processor is not None:
        return
    found = backend.encode("").ids if complete else []
    has = (found[:1] == [ids[0]] and bool(found), found[-1:] == [ids[1]] and bool(found))
    usual = has if complete else (is_pieces, False)
    flags = (config.get("add_bos_token"), config.get("add_eos_token"))
    wanted = tuple(bool(usual[i] if flags[i] is None else flags[i]) and ids[i] is not None for i in (0, 1))
    if flags[0] and ids[0] is None:
        _log.warning("tokenizer_config.json says add_bos_token, and names no bos_token: none is added")
    if wanted != has or not complete:
        frame(backend, ids[0] if wanted[0] else None, ids[1] if wanted[1] else None)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        if not is_there(path):
            return {}
        data = read_file(path)
        document = json.loads(data)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}", hint="check the file") from error
    except (ValueError, RecursionError) as error:
        what, hint = known_content(data) or (f"{error}", f"download {path.name} again")
        raise TokenizerError(f"{path} is no JSON: {what}", hint=hint) from error
    if not isinstance(document, dict):
        raise TokenizerError(f"{path} must hold a JSON object", hint=f"download {path.name} again")
    return document


def _from_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        data = read_file(path).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}", hint="check the file") from error
    try:
        backend = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises plain Exception
        what, hint = known_content(data) or (f"{error}", "download tokenizer.json again")
        raise TokenizerError(f"{path} cannot be used: {what}", hint=hint) from error
    if wrong := _misplaced(path, backend):
        backend = _with_gaps_filled(path, wrong)
    backend.no_truncation()  # some files carry the limits of their training run
    backend.no_padding()
    return backend


def _misplaced(path: Path, backend: Tokenizer) -> str | None:
    """An added token of a tokenizer.json that did not get the id which the file says; None: all did."""
    text = read_text(path)
    at = text.find('"added_tokens"')
    start = text.find("[", at)
    if at < 0 or start < 0:
        return None
    listed, _ = json.JSONDecoder().raw_decode(text, start)  # not the whole file: it may have 20 MB
    return next((e["content"] for e in listed if backend.token_to_id(e["content"]) != e["id"]), None)


def _with_gaps_filled(path: Path, wrong: str) -> Tokenizer:
    from tokenizers import Tokenizer

    document = json.loads(read_text(path))
    size = len(document["model"].get("vocab", {}))
    added = {int(entry["id"]): entry for entry in document["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for index in range(size, max(added)):
        added.setdefault(index, {"id": index, "content": _filler(index), **plain})
    document["added_tokens"] = [added[index] for index in sorted(added)]
    backend = Tokenizer.from_str(json.dumps(document))
    if any(backend.token_to_id(entry["content"]) != index for index, entry in added.items()):
        raise TokenizerError(
            f"{path} gives the token {wrong!r} an id that cannot be: another token has it",
            hint="download tokenizer.json again, or save it again with transformers",
        )
    return backend


def _filler(index: int) -> str:
    """A token for an id that nothing has: of characters for private use, so that no text holds it."""
    return f"\ue000{index}\ue001"


# Splits of the classes that read vocab.json and merges.txt, and whether text is normalised (NFC) first.
_SLOW: dict[str, tuple[str, bool]] = {
    "Qwen2Tokenizer": (QWEN2, True),
    **dict.fromkeys(
        ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "SmolLMTokenizer"), (GPT2, False)
    ),
}
_SLOW_OF = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # by model_type, where no class is named


def _from_merges(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """A byte-level tokenizer of the days before tokenizer.json."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    model_type = _json(folder / "config.json").get("model_type")
    named = config.get("tokenizer_class") or _SLOW_OF.get(str(model_type), "GPT2Tokenizer")
    kind = _SLOW.get(str(named).removesuffix("Fast"))
    if kind is None:
        raise TokenizerError(
            f"{folder}: how {named} cuts text into words is not known, and there is no tokenizer.json",
            hint="make one: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) of transformers",
        )
    vocabulary = _json(folder / "vocab.json")
    try:
        lines = read_text(folder / "merges.txt").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        merges = [tuple(line.split(" ", 1)) for line in lines if line.strip()]
        backend = Tokenizer(BPE(vocabulary, merges))  # type: ignore[arg-type]
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{folder}: vocab.json and merges.txt do not fit each other: {error}", hint="download both again"
        ) from error
    backend.pre_tokenizer = split_words(PreTokenizerKind((kind[0],)), bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    if kind[1]:
        backend.normalizer = normalizers.NFC()
    end = "<|endoftext|>"
    return backend, {"eos_token": end} if end in vocabulary else {}


def _from_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    from tokenizers import AddedToken

    vocabulary, ids = read_sentencepiece(path)
    backend = sentencepiece.build(vocabulary)
    special = (PieceType.CONTROL, PieceType.UNKNOWN)
    added = [
        AddedToken(token, normalized=False, special=kind in special)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (*special, PieceType.USER_DEFINED)
    ]
    backend.add_tokens(added)  # all at once: each call builds the search for all of them anew
    return backend, {f"{name}_token": vocabulary.tokens[index] for name, index in ids.items()}


def _content(token: Any) -> str:
    """A token in a configuration file is its text, or an object with the text as `content`."""
    content = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(content, str):
        raise TokenizerError(
            f"tokenizer_config.json names the token {token!r}, which is no text",
            hint="download the file again",
        )
    return content


def _add_configured_tokens(
    backend: Tokenizer,
    config: Mapping[str, Any],
    named: Mapping[str, str],
    slow: Mapping[str, Any],
    complete: bool,
) -> None:
    """Tokens that only the configuration knows: added ones at their ids, then the special ones.

    Args:
        backend: the tokenizer.
        config: tokenizer_config.json.
        named: bos_token and the like.
        slow: added_tokens.json, token -> id, of the days before `added_tokens_decoder`.
        complete: whether tokenizer.json was there. Tokenizers without one look for added tokens in the text
            as it stands, whatever a flag says of normalising.
    """
    from tokenizers import AddedToken

    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    further = list(more.values()) if isinstance(more, Mapping) else more if isinstance(more, list) else [more]
    special = [*named.values(), *(_content(token) for token in further)]
    listed: dict[int, AddedToken] = {}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        for content, index in slow.items():
            is_special = content in special
            listed[int(index)] = AddedToken(content, normalized=False, special=is_special)
        for index, entry in (config.get("added_tokens_decoder") or {}).items():
            options = {name: bool(entry[name]) for name in flags if name in entry}
            options |= {} if complete else {"normalized": False}
            listed[int(index)] = AddedToken(_content(entry), **options)
    except (AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"added_tokens_decoder of tokenizer_config.json cannot be read: {error}",
            hint="download the file again",
        ) from error
    _add_at_ids(backend, listed)
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(special) if not known.get(token)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])


def _add_at_ids(backend: Tokenizer, listed: Mapping[int, AddedToken]) -> None:
    """Add tokens so that each has the id that it shall have.

    Raises:
        TokenizerError: another token has such an id; it is named.
    """
    from tokenizers import AddedToken

    present = backend.get_added_tokens_decoder()
    known = {token.content for token in present.values()}
    free = max([backend.get_vocab_size(with_added_tokens=False) - 1, *present]) + 1
    added: list[AddedToken] = []
    for index, token in sorted(listed.items()):
        if token.content in known:
            continue
        own = backend.token_to_id(token.content)
        if (index if own is None else own) != index or (own is None and index < free):
            holder = own if own is not None else repr(backend.id_to_token(index))
            raise TokenizerError(
                f"added_tokens_decoder gives {token.content!r} the id {index}, and "
                + (f"the vocabulary gives it {own}" if own is not None else f"{holder} has that id"),
                hint="the files are of different models or versions: download them again",
            )
        if own is None:
            added += [AddedToken(_filler(i), normalized=False, special=True) for i in range(free, index)]
            free = index + 1
        added.append(token)
    backend.add_tokens(added)  # all at once: each call builds the search for all of them anew


def _id(backend: Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _eos_ids(own: int | None, *configurations: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokenizer's eos, then what configurations name (a number or a list)."""
    ids = [] if own is None else [own]
    for values in configurations:
        found = values.get("eos_token_id")
        for index in found if isinstance(found, list) else [found]:
            ids += [index] if isinstance(index, int) else []
    return tuple(dict.fromkeys(ids))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name; chat_template.jinja goes before chat_template.json, and that before tokenizer_config.json."""
    found = config.get("chat_template")
    found = _json(folder / "chat_template.json").get("chat_template", found)
    templates: dict[str, str] = {}
    if isinstance(found, str):
        templates["default"] = found
    elif isinstance(found, list):
        templates = {
            entry["name"]: entry["template"]
            for entry in found
            if isinstance(entry, dict) and {"name", "template"} <= entry.keys()
        }
    sources = {path.stem: path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if is_there(folder / "chat_template.jinja"):
        sources["default"] = folder / "chat_template.jinja"
    for name, path in sources.items():
        try:
            templates[name] = read_text(path).removeprefix("\ufeff")  # what editors put before a text
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"{path} cannot be read: {error}", hint=f"download {path.name} again"
            ) from error
    return templates


VOCABULARY, CONFIG = "tokenizer.json", "tokenizer_config.json"
SCHEMA_VERSION = 1
_KNOWN = ("schema_version", "bos_id", "eos_ids", "vocab_size", "special_tokens", "sampling")
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
            **({"sampling": dict(fields.sampling)} if fields.sampling else {}),
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
    fields = _stored_fields(folder / CONFIG)
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
        self._done = Event()  # Thread.join takes a thread for dead once it was interrupted
        # No daemon: Python waits for it before it ends. A thread that is ended inside the library, which is
        # Rust and cannot be unwound, takes the process with it.
        Thread(target=self._parse, name="hasten-tokenizer").start()

    def _parse(self) -> None:
        try:
            from tokenizers import Tokenizer

            self._sha256 = hashlib.sha256(self._data).hexdigest()  # 3 ms
            self._backend = Tokenizer.from_buffer(self._data)
            self._data = b""
        except Exception as error:  # noqa: BLE001 - the library raises plain Exception
            self._reason = str(error)
        finally:
            self._done.set()

    def sha256(self) -> str:
        self.result()
        return self._sha256

    def result(self) -> Backend:
        self._done.wait()
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


def _stored_fields(path: Path) -> TokenizerFields:
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
            sampling={str(name): float(value) for name, value in (own.get("sampling") or {}).items()},
        )
    except FileNotFoundError:
        raise ArtifactError(f"{path.parent} has no {path.name}", hint=_AGAIN) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}", hint=_AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} was not written by Hasten: {error!r}", hint=_AGAIN) from error
