"""What lies beside the weights in every folder format: config.json, generation_config.json, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.cache import write_json
from hasten.cache.reading import read_file
from hasten.models.artifact import Artifact

MARKER = "config.json"
"""A folder without it is no model, and is not replaced."""


def write_companions(folder: Path, artifact: Artifact, values: Mapping[str, Any]) -> None:
    """Write them.

    Args:
        folder: that is being made.
        artifact: whose tokenizer goes along.
        values: config.json.

    Raises:
        DiskError: full, read-only or forbidden disk.
    """
    write_json(folder / MARKER, dict(values))
    ends = list(artifact.tokenizer.eos_ids) or None
    generation = {"eos_token_id": ends, "bos_token_id": artifact.tokenizer.bos_id}
    write_json(folder / "generation_config.json", generation)
    artifact.tokenizer.save(folder)
    _plain_tokenizer(folder / "tokenizer_config.json")


def size_of(folder: Path) -> int:
    """Bytes of all its files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _plain_tokenizer(path: Path) -> None:
    """Drop what only artifacts need from tokenizer_config.json."""
    config = json.loads(read_file(path))
    config.pop("hasten", None)
    write_json(path, config)
