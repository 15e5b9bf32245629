"""The tokenizer of a model: text to token ids and back, chats to text, and text as tokens come."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import TokenizerError, UsageError
from hasten.models import chat_template
from hasten.models.text_stream import TextStream, TokenBytes, TokenizerFields, cutter, token_bytes

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Backend

    from hasten.models.tool_calls import ToolStyle

_LONG = 1000
"""Characters, or ids: from here on the library's calls for batches are used, which let other threads run.
`encode` and `decode` keep them waiting, 1.3 s for a million characters; below it they are 20 us quicker."""


class Tokenizer:
    """Text to ids and back, on the `tokenizers` library.

    Made by `from_folder` (Hugging Face folders), `from_gguf` (a GGUF file's metadata) or `load` (artifacts).

    Args:
        backend: gives the library's tokenizer; called once, when the vocabulary is first needed.
        fields: everything known without the vocabulary.
        digest: gives `digest` where it is known; None computes it when it is asked for.
    """

    def __init__(
        self, backend: Callable[[], Backend], fields: TokenizerFields, digest: Callable[[], str] | None = None
    ) -> None:
        self._get_backend = backend
        self._get_digest = digest
        self.fields = fields

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder: tokenizer.json, or a SentencePiece tokenizer.model.

        Raises:
            TokenizerError: neither file is there, or a file of the folder is not what it must be.
        """
        from hasten.models.folder_tokenizer import from_folder

        return cls._of(*from_folder(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata describes.

        Raises:
            TokenizerError: a key is missing or wrong, or the kind of tokenizer is not supported.
        """
        from hasten.models.gguf_tokenizer import from_gguf

        return cls._of(*from_gguf(metadata))

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """What `save` wrote. Returns at once: the vocabulary is parsed beside whatever the caller does next.

        Raises:
            ArtifactError: a file is missing, damaged or was not written by `save`; what is wrong inside
                tokenizer.json shows (as ArtifactError too) at the first use.
        """
        from hasten.models.folder_tokenizer import load

        return cls(*load(Path(folder)))

    @classmethod
    def _of(cls, backend: Backend, fields: TokenizerFields) -> Tokenizer:
        return cls(lambda: backend, fields)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, enough for `load`; `transformers` reads them too.

        Raises:
            ArtifactError: the files cannot be written.
        """
        from hasten.models.folder_tokenizer import save

        save(self._backend, self.fields, Path(folder))

    @property
    def bos_id(self) -> int | None:
        """The id that starts a text, None where the model has none."""
        return self.fields.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end generation, the tokenizer's own first."""
        return self.fields.eos_ids

    @property
    def vocab_size(self) -> int:
        """Tokens that have an id; a model's embedding may have more rows."""
        return self.fields.vocab_size

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written in the text become their ids.

        Args:
            add_special: put bos (and eos) around the text where the model wants that; a text that begins with
                bos itself gets no second one.

        Raises:
            UsageError: the text holds what is no Unicode (bytes that are no UTF-8, lone surrogates).
            TokenizerError: the vocabulary has neither a token for a part of the text nor one for the unknown,
                or the library gave up on the text (millions of blanks in a row).
        """
        ids = self._encoded(text, add_special).ids
        return ids[1:] if add_special and self._has_two(ids) else ids

    def _has_two(self, ids: Sequence[int]) -> bool:
        """Whether a text begins with two bos: its own, and the one put before it."""
        return self.bos_id is not None and len(ids) > 1 and ids[0] == ids[1] == self.bos_id

    def count(self, text: str, add_special: bool = True) -> int:
        """How many ids `encode` gives; without `add_special` no Python object is made for each.

        Raises:
            UsageError, TokenizerError: as `encode`.
        """
        found = self._encoded(text, add_special)
        return len(found) - (add_special and self._has_two(found.ids))

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids. Ids that the vocabulary lacks give nothing; what is no UTF-8 gives U+FFFD.

        Raises:
            UsageError: an id is negative or no integer.
            TokenizerError: the library gave up on the ids.
        """
        backend = self._backend
        try:
            known = [int(i) for i in ids]
            if len(known) < _LONG:
                return backend.decode(known, skip_special_tokens=skip_special)
            return backend.decode_batch([known], skip_special_tokens=skip_special)[0]
        except (OverflowError, TypeError, ValueError) as error:
            raise UsageError(f"token ids must be integers from 0 on: {error}") from error
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise _gave_up("decode these ids", error) from error

    def _encoded(self, text: str, add_special: bool) -> Encoding:
        if not isinstance(text, str):
            raise UsageError(f"a text to encode must be str, got {type(text).__name__}")
        _check_unicode(text)
        backend = self._backend  # its own errors stay what they are
        try:
            if len(text) < _LONG:
                return backend.encode(text, add_special_tokens=add_special)
            return backend.encode_batch_fast([text], add_special_tokens=add_special)[0]
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(
                f"the model's tokenizer cannot encode this text: {error}",
                hint="the tokenizer's files contradict themselves: download the model again",
            ) from error
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise _gave_up("encode this text", error) from error

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as text through the model's chat template; see `chat_template.in_any_form`.

        Args:
            messages: as OpenAI's API takes them: contents may be lists of text parts, calls' arguments JSON
                text.
            tools: function descriptions; where the template knows none, the system message tells of them.
            variables: further names the template reads (`enable_thinking`).

        Raises:
            TokenizerError: the model has no template, or it refuses the messages.
            UsageError: the messages are not a list of mappings, or have content that is no text.
        """
        chat_template.check(messages)
        chat, more = chat_template.prepared(messages, tools, self.fields.chat_templates)
        write = partial(
            chat_template.render,
            self.fields.chat_templates,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.fields.special_tokens,
            tools=tools,
            variables={**more, **(variables or {})},
        )
        return chat_template.in_any_form(write, chat)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of `apply_chat`, with one bos at most: see `opened`.

        Raises:
            TokenizerError, UsageError: as `apply_chat` and `encode`.
        """
        text = self.apply_chat(messages, add_generation_prompt, tools=tools, variables=variables)
        return self.opened(self.encode(text, add_special=False))

    def opened(self, ids: list[int]) -> list[int]:
        """Ids of what a chat template wrote, with the one bos that the model wants at their start.

        Some templates write bos, some leave it to the tokenizer (TinyLlama, Zephyr): whether one is missing
        shows in the ids alone. A tokenizer that puts no bos before texts puts none here.
        """
        bos = self._own_bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    @cached_property
    def _own_bos(self) -> int | None:
        """bos, where the tokenizer puts it before every text."""
        return self.bos_id if self._encoded("", True).ids[:1] == [self.bos_id] else None

    def pieces(self, text: str) -> list[str]:
        """A text cut so that its pieces' ids (without special ones around them), joined, are the text's.

        Cut behind special tokens, where the tokenizer is of a kind for which that holds; else one piece.
        """
        return [text] if self._cut is None else self._cut(text)

    def stream(self, skip_special: bool = True, keep: Collection[int] = ()) -> TextStream:
        """A stream whose pieces, joined, are what `decode` gives for all pushed ids.

        Args:
            skip_special: leave the special tokens out.
            keep: special ids that are left in nevertheless, such as the marks of tool calls.

        Raises:
            TokenizerError: the tokenizer's decoder has a part that cannot be streamed.
        """
        skip = self.special_ids - frozenset(keep) if skip_special else ()
        return TextStream(self._backend.id_to_token, self._decoder, skip)

    def token_bytes(self) -> TokenBytes:
        """What every id adds to a text, as bytes.

        Raises:
            TokenizerError: the tokenizer has no decoder.
        """
        return token_bytes(self._backend, self._decoder, self.eos_ids)

    def tool_style(self, architecture: str = "") -> ToolStyle:
        """How the model writes tool calls: as its chat template shows, or its architecture decides."""
        from hasten.models.tool_calls import tool_style

        added = self._backend.get_added_tokens_decoder().items()
        special = {token.content: index for index, token in added if token.special}
        return tool_style(self.fields.chat_templates, architecture, special)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its own spelling, None where the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    def spelling(self, token: int) -> str | None:
        """A token's own spelling by its id, None where the vocabulary lacks it."""
        return self._backend.id_to_token(token)

    def vocabulary(self) -> Mapping[str, int]:
        """Every token by its own spelling, added ones included, with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def split(self, token: str) -> list[int]:
        """Ids of the pieces that the merges make of a token's own spelling; none where they cannot."""
        try:
            return [piece.id for piece in self._backend.model.tokenize(token)]
        except Exception:  # noqa: BLE001 - the library raises plain Exception
            return []

    def to_json(self) -> str:
        """The vocabulary and its rules as a tokenizer.json has them."""
        return self._backend.to_str()

    @cached_property
    def digest(self) -> str:
        """Names the tokenizer, chat templates included: 64 hexadecimal digits; `save` and `load` keep it.

        Takes 0.5 s for 150,000 tokens where the tokenizer was not loaded from an artifact.
        """
        if self._get_digest is not None:
            return self._get_digest()
        from hasten.models.folder_tokenizer import computed_digest

        return computed_digest(self._backend, self.fields)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token as the vocabulary spells it: no token stands for more of a text,
        but for tokenizers that drop blanks or have one token for any unknown word."""
        backend = self._backend
        known = range(backend.get_vocab_size())  # one by one: all at once keeps other threads waiting
        return max((len(backend.id_to_token(i) or "") for i in known), default=1)

    @cached_property
    def _cut(self) -> Callable[[str], list[str]] | None:
        return cutter(self._backend)

    @cached_property
    def _backend(self) -> Backend:
        return self._get_backend()

    @cached_property
    def _decoder(self) -> Mapping[str, Any]:
        decoder = self._backend.decoder
        if decoder is None:
            raise TokenizerError(
                "this tokenizer has no decoder, so ids cannot be turned into text as they come",
                hint="open the model from its original Hugging Face folder",
            )
        spec: Mapping[str, Any] = json.loads(decoder.__getstate__())
        return spec


def _is_panic(error: BaseException) -> bool:
    """Whether the library panicked: pyo3 derives its exception from BaseException, past every handler."""
    return type(error).__name__ == "PanicException"


def _gave_up(doing: str, error: BaseException) -> TokenizerError:
    return TokenizerError(
        f"the model's tokenizer gave up and could not {doing}: {error}",
        hint="break up long runs of one kind of character, blanks above all, or give less at a time",
    )


def _check_unicode(text: str) -> None:
    """The command line gives bytes that are no UTF-8 as lone surrogates (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ord(text[error.start])
        hint = "convert the text to UTF-8, for example: iconv -f LATIN1 -t UTF-8 FILE"
        if 0xDC80 <= character <= 0xDCFF:
            before = text[: error.start].encode("utf-8", "surrogateescape")
            raise UsageError(
                f"the text is no UTF-8: byte 0x{character - 0xDC00:02x} at byte {len(before)} "
                f"(character {error.start})",
                hint=hint,
            ) from None
        raise UsageError(
            f"the text is no Unicode: lone surrogate U+{character:04X} at character {error.start}", hint=hint
        ) from None
