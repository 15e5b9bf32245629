"""What a tokenizer is besides its vocabulary: special tokens, end ids and chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFields:
    """The small part of a tokenizer, known before its vocabulary is parsed.

    `special_tokens` maps the names that chat templates use (`bos_token`, `eos_token` ...) to token text;
    `chat_templates` maps `default` and further names (`tool_use`) to Jinja source.
    """

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # generation stops at any of these; the tokenizer's own eos first
    vocab_size: int = 0  # tokens that have an id, added ones included
    special_tokens: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    chat_templates: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
