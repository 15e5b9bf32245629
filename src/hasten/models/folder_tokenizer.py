"""Tokenizers of Hugging Face folders: tokenizer.json or tokenizer.model, and the small files beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hasten.cache.reading import is_there, read_file, read_text
from hasten.errors import TokenizerError
from hasten.models import sentencepiece_tokenizer
from hasten.models.gguf_tokenizer import frame
from hasten.models.sentencepiece_file import read_sentencepiece
from hasten.models.sentencepiece_tokenizer import PieceType
from hasten.models.tokenizer_fields import NAMED_TOKENS, TokenizerFields

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def from_folder(folder: Path) -> tuple[Tokenizer, TokenizerFields]:
    """The tokenizer a folder describes.

    Raises:
        TokenizerError: there is neither tokenizer.json nor tokenizer.model, or a file is not what it must be.
    """
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    named: dict[str, str] = {}
    complete = is_there(folder / "tokenizer.json")  # else it says nothing of bos and eos around a text
    if complete:
        backend = _from_json(folder / "tokenizer.json")
    elif is_there(folder / "tokenizer.model"):
        backend, named = _from_sentencepiece(folder / "tokenizer.model")
    else:
        raise TokenizerError(
            f"{folder} has no tokenizer: neither tokenizer.json nor tokenizer.model is there",
            hint="copy tokenizer.json of the model into the folder",
        )
    named.update({name: _content(config[name]) for name in NAMED_TOKENS if config.get(name) is not None})
    _add_configured_tokens(backend, config, named)
    bos_id, eos_id = _id(backend, named.get("bos_token")), _id(backend, named.get("eos_token"))
    if not complete:
        # Llama, the main user of these files, puts bos first and nothing last.
        add_bos, add_eos = config.get("add_bos_token", True), config.get("add_eos_token", False)
        frame(backend, bos_id if add_bos else None, eos_id if add_eos else None)
    return backend, TokenizerFields(
        bos_id=bos_id,
        eos_ids=_eos_ids(folder, eos_id),
        vocab_size=backend.get_vocab_size(),
        special_tokens=MappingProxyType(named),
        chat_templates=MappingProxyType(_chat_templates(folder, config)),
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file."""
    try:
        if not is_there(path):
            return {}
        document = json.loads(read_text(path))
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}", hint="check the file") from error
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is no JSON: {error}", hint=f"download {path.name} again") from error
    if not isinstance(document, dict):
        raise TokenizerError(f"{path} must hold a JSON object", hint=f"download {path.name} again")
    return document


def _from_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_buffer(read_file(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(
            f"{path} cannot be used: {error}", hint="download tokenizer.json again"
        ) from error
    backend.no_truncation()  # some files carry the limits of their training run
    backend.no_padding()
    return backend


def _from_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    from tokenizers import AddedToken

    vocabulary, ids = read_sentencepiece(path)
    backend = sentencepiece_tokenizer.build(vocabulary)
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


def _add_configured_tokens(backend: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that only the configuration knows: added ones in id order, then the special ones."""
    from tokenizers import AddedToken

    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    added = []
    try:
        for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
            content = _content(entry)
            if content not in known:
                options = {name: bool(entry[name]) for name in flags if name in entry}
                added.append(AddedToken(content, **options))
                known[content] = options.get("special", False)
    except (AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"added_tokens_decoder of tokenizer_config.json cannot be read: {error}",
            hint="download the file again",
        ) from error
    backend.add_tokens(added)  # all at once: each call builds the search for all of them anew
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    further = list(more.values()) if isinstance(more, Mapping) else more if isinstance(more, list) else [more]
    special = [*named.values(), *(_content(token) for token in further)]
    missing = [token for token in dict.fromkeys(special) if not known.get(token)]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in missing])


def _id(backend: Tokenizer, token: str | None) -> int | None:
    return None if token is None else backend.token_to_id(token)


def _eos_ids(folder: Path, own: int | None) -> tuple[int, ...]:
    """The tokenizer's eos, then what generation_config.json and config.json name (a number or a list)."""
    ids = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        found = _json(folder / name).get("eos_token_id")
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
            templates[name] = read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(
                f"{path} cannot be read: {error}", hint=f"download {path.name} again"
            ) from error
    return templates
