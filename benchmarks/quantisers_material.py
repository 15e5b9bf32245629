"""What every quantiser starts from: the model's values in bf16 as two file formats, and the windows to read.

The values are those the judge's reference has, rounded to bf16 once, so that nobody starts from better ones.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bar import say
from hasten.compress.calibration import Calibration, cut
from hasten.core import Recipe
from hasten.export import export
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.models.source import sha256_of
from hasten.quality.text import Text
from hasten.weights.packed import pack_model

RECORD = "material.json"


@dataclass(frozen=True)
class Material:
    """Files in one folder."""

    work: Path
    digest: str  # of the model, the text and the windows: what a result made from it belongs to

    @property
    def folder(self) -> Path:
        """A Hugging Face folder in bf16, tokenizer included."""
        return self.work / "source"

    @property
    def gguf(self) -> Path:
        """The same values as a GGUF file."""
        return self.work / "source.gguf"

    @property
    def ids(self) -> Path:
        """Calibration windows, int32 [B, T]."""
        return self.work / "ids.npy"


def prepare(model: str, text: Text, work: Path, threads: int) -> tuple[Material, Calibration]:
    """Write what is not there yet: 2.5 GB for a model of 0.5 billion weights.

    Raises:
        HastenError: the model cannot be opened or exported, the disk is full.
    """
    source = open_model(model)
    calibration = cut(text.name, text.calibration, source.tokenizer())
    digests = [sha256_of(file) for file in source.files] + [calibration.sha256, text.sha256]
    material = Material(work, hashlib.sha256("".join(digests).encode()).hexdigest())
    if _digest_of(work / RECORD) == material.digest:
        return material, calibration
    say(f"{source.name} in bf16: writing")
    work.mkdir(parents=True, exist_ok=True)
    packed = work / "source.hasten"
    save(packed, pack_model(source, Recipe.parse("bf16"), threads), source, {}, threads=threads)
    export(packed, "compressed-tensors", material.folder, force=True)
    export(packed, "gguf", material.gguf, force=True)
    np.save(material.ids, calibration.ids)
    (work / RECORD).write_text(json.dumps({"digest": material.digest}), encoding="utf-8")
    return material, calibration


def _digest_of(path: Path) -> str | None:
    return json.loads(path.read_text(encoding="utf-8"))["digest"] if path.is_file() else None
