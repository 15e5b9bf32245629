"""Opening models: folders, hub ids, GGUF files and the demo; their configuration, tensors and tokenizer.

Names are loaded when they are first used: an artifact needs the tokenizer alone, and starts sooner so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hasten.models.open import open_model
    from hasten.models.source import Source, SourceFile, sha256_of

__all__ = [
    "Source",
    "SourceFile",
    "open_model",
    "sha256_of",
]
_HOMES = {
    "Source": "source",
    "SourceFile": "source",
    "open_model": "open",
    "sha256_of": "source",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
