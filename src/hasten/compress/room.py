"""Whether the disk has room for what compressing writes, said before any work."""

from __future__ import annotations

import os
from pathlib import Path

from hasten.cache.store import free_bytes, why_not_writable
from hasten.core import ModelSpec, Recipe
from hasten.errors import DiskError
from hasten.models.source import Source
from hasten.weights.packed import source_layout

_STATE_BYTES = 2 * 12
"""Of a checkpoint, for each number that learns: the number and two moments; the last one stays meanwhile."""


def artifact_bytes(source: Source, recipe: Recipe) -> int:
    """Bytes of the matrices by a recipe; what is pruned counts, as it is not known yet how much it is."""
    total = 0
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 2:
            layout = recipe.layout_for(name) or source_layout(tensor)
            total += layout.bytes_of(*tensor.shape)
    return total


def statistics_bytes(config: ModelSpec) -> int:
    """Of what each group of matrices reads: half of [inputs, inputs] in fp16."""
    read_once = (".q", ".o", ".gate", ".down", "head", "embed")  # q, k and v read the same, gate and up too
    shapes = config.linear_shapes()
    return sum(cols * cols for name, (_, cols) in shapes.items() if name.endswith(read_once))


def work_bytes(source: Source, recipe: Recipe, tokens: int, distil_tokens: int) -> int:
    """Bytes that lie in the cache at most: finished layers, second moments, a checkpoint of distilling."""
    layers = 0 if recipe.is_plain else artifact_bytes(source, recipe) + _moment_bytes(source, recipe)
    if recipe.method == "best":  # hidden states of the source and of what is quantised
        layers += 2 * 4 * source.config.hidden_size * tokens
    if recipe.distil is None:
        return layers
    states = 4 * source.config.hidden_size * distil_tokens
    learning = source.config.linear_weights
    if (rank := recipe.distil.lora) is not None:
        learning = sum(rank * (rows + cols) for rows, cols in source.config.linear_shapes().values())
    return layers + states + _STATE_BYTES * learning


def _moment_bytes(source: Source, recipe: Recipe) -> int:
    if recipe.method not in ("gptq", "awq", "awq-gptq") and recipe.smooth is None:
        return 0
    return statistics_bytes(source.config)


def refuse_small_disk(needs: dict[Path, int]) -> None:
    """Compare what will be written with what is free, one disk at a time.

    Args:
        needs: folder, there or not yet -> bytes.

    Raises:
        DiskError: a disk has too little room.
    """
    by_disk: dict[int | None, list[Path]] = {}
    for folder in needs:
        by_disk.setdefault(_disk(folder), []).append(folder)
    for folder in needs:
        if (why := why_not_writable(folder)) is not None:
            raise DiskError(
                f"{folder} cannot be written: {why}",
                hint="choose another place with --out DIR or HASTEN_CACHE=DIR",
            )
    for folders in by_disk.values():
        need, free = sum(needs[folder] for folder in folders), free_bytes(folders[0])
        if free is not None and free < need:
            raise DiskError(
                f"{' and '.join(map(str, folders))} would take about {need / 1e6:,.0f} MB, and "
                f"{free / 1e6:,.0f} MB are free there",
                hint="free some space, or choose another disk with --out DIR or HASTEN_CACHE=DIR",
            )


def _disk(path: Path) -> int | None:
    for folder in (path, *path.parents):
        try:
            return os.stat(folder).st_dev  # noqa: PTH116
        except OSError:
            continue
    return None
