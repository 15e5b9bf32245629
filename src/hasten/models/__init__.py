"""Opening models: folders, hub ids, GGUF files and the demo; their configuration, tensors and tokenizer."""

from __future__ import annotations

from hasten.models.blocks import dequantize
from hasten.models.finite import check_finite
from hasten.models.open import open_model
from hasten.models.source import Source, SourceFile, SourceTensor, sha256_of

__all__ = [
    "Source",
    "SourceFile",
    "SourceTensor",
    "check_finite",
    "dequantize",
    "open_model",
    "sha256_of",
]
