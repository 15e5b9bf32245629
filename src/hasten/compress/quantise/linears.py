"""Single matrices by a calibrated method, at any layout, each found once: what a mixture is made of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.cache import read_record, write_atomic, write_record
from hasten.cache.reading import read_array
from hasten.compress.calibration import Calibration, work_key
from hasten.compress.quantise.gptq import Factor, gptq
from hasten.compress.quantise.layer_methods import factor_of
from hasten.compress.quantise.statistics import HEAD, Observer, Statistics, readers_of
from hasten.compress.torch_layer import tensor_values
from hasten.core import Format, Recipe
from hasten.models.source import Source
from hasten.recipe import Method
from hasten.weights.packed import PackedLinear, pack_integers, pack_linear
from hasten.weights.work_store import WorkStore, touch

_VERSION = 1


def head_alone(source: Source, recipe: Recipe, name: str, statistics: Statistics) -> PackedLinear:
    """The LM head, or a tied embedding, by GPTQ on the source's own final states; plain from 8 bits on."""
    layout = recipe.layout_for(name)
    if layout is None or not layout.is_integer or layout.bits >= 8:
        return pack_linear(source.tensors[name], layout)
    weight = tensor_values(source.tensors[name])
    gram = statistics.layer(source.config.num_layers).grams[HEAD]
    return pack_integers(name, gptq(weight, factor_of(gram, name), layout, name))


class CalibratedLinears:
    """Matrices of a model as GPTQ finds them, each as if all others were the source's own.

    Args:
        source: the model.
        calibration: the text; read once, when the first matrix is asked for.
        method: `gptq`; `rtn` rounds to the nearest.
        observer: told while the text is read.
    """

    def __init__(
        self,
        source: Source,
        calibration: Calibration,
        method: Method = "gptq",
        observer: Observer = lambda done, total, now: None,
    ) -> None:
        assert method in ("gptq", "rtn"), method
        self._source, self._method, self._observer = source, method, observer
        self._store = WorkStore()
        self._folder = self._store.place(
            "linears", work_key(source, calibration, "linears", method, _VERSION)
        )
        self._has_room = False
        self._statistics = Statistics(source, calibration)
        self._collected = False
        self._factor: tuple[tuple[int | None, str], Factor] | None = None

    def linear(self, name: str, layout: Format) -> PackedLinear:
        """One matrix by canonical name.

        Raises:
            ModelError: a weight or an activation is not finite; the layer is named.
            DiskError: full, read-only or forbidden disk.
            UsageError: HASTEN_CACHE_GB is no number.
        """
        touch(self._folder)
        tensor = self._source.tensors[name]
        if self._method == "rtn" or not layout.is_integer or layout.bits >= 8:
            return pack_linear(tensor, layout)
        kept = self._read(name, layout)
        if kept is not None:
            return kept
        with torch.no_grad():
            weight = tensor_values(tensor)
            found = pack_integers(name, gptq(weight, self._factor_for(name), layout, name))
        self._write(name, layout, found)
        return found

    def _factor_for(self, name: str) -> Factor:
        layer, group, _ = readers_of(name)
        if self._factor is None or self._factor[0] != (layer, group):
            if not self._collected:
                self._statistics.collect(self._observer)
                self._collected = True
            index = self._source.config.num_layers if layer is None else layer
            gram = self._statistics.layer(index).grams[group]
            self._factor = (layer, group), factor_of(gram, name)
        return self._factor[1]

    def _path(self, name: str, layout: Format) -> Path:
        return self._folder / f"{name}.{layout}"

    def _read(self, name: str, layout: Format) -> PackedLinear | None:
        rows, cols = self._source.tensors[name].shape
        path = self._path(name, layout)
        record: Any = read_record(path.with_name(path.name + ".json"), {"name": name})
        try:
            data = read_array(path)
        except OSError:
            return None
        if record is None or data.size != layout.bytes_of(rows, cols) or _digest(data) != record["sha256"]:
            return None
        return PackedLinear(layout, rows, cols, data, record["relative_error"])

    def _write(self, name: str, layout: Format, found: PackedLinear) -> None:
        if not self._has_room:
            self._store.make_room(self._folder, self._source.config.linear_weights)  # each at 2 widths or so
            self._store.mark(self._folder, self._source.name)
            self._has_room = True
        path = self._path(name, layout)
        write_atomic(path, found.data.tobytes())
        value = {"sha256": _digest(found.data), "relative_error": found.relative_error}
        write_record(path.with_name(path.name + ".json"), {"name": name}, value)


def _digest(data: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    return hashlib.sha256(data.tobytes()).hexdigest()
