"""A model quantised layer by layer, in a way that can be stopped at any layer and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.compress.calibration import Calibration, work_key
from hasten.compress.job import reads_moments, reads_text
from hasten.compress.quantise import (
    Head,
    QuantisedLayer,
    Streams,
    layer_to_round,
    method_named,
    packed_layer,
)
from hasten.compress.quantise.gptq import Factor, advance_through, factor_of, gptq
from hasten.compress.quantise.statistics import HEAD, Observer, Statistics, readers_of
from hasten.compress.stream import Stream
from hasten.compress.torch_model import read_state, tensor_values, write_state
from hasten.core import Format, Recipe
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.recipe import METHODS
from hasten.weights import format_named
from hasten.weights.packed import PackedLinear, PackedModel, finite_values, pack_integers, pack_linear
from hasten.weights.work_store import WorkStore, touch

_LINEARS = "gptq 2"
_VERSION = 2
_KIND = f"layers {_VERSION}"


def quantise(
    source: Source,
    recipe: Recipe,
    calibration: Calibration | None,
    *,
    observer: Observer = lambda done, total, now: None,
    folder: Path | None = None,
) -> PackedModel:
    """Integers for every matrix by the recipe's method.

    Args:
        calibration: the text; None for methods that read none.
        folder: where finished layers are kept until the model is done; None keeps nothing.

    Raises:
        UsageError: the method needs text and there is none.
        ModelError: a weight or an activation is not finite; the layer is named.
        DiskError: full, read-only or forbidden disk; what was finished before stays.
    """
    if calibration is None and reads_text(recipe):
        raise UsageError(
            f"recipe {recipe.name} needs calibration text", hint="give --calibration FILE, or method: hqq"
        )
    with torch.no_grad():
        return _Pass(source, recipe, calibration, observer, folder).run()


@dataclass
class _Pass:
    source: Source
    recipe: Recipe
    text: Calibration | None
    observer: Observer
    folder: Path | None

    def run(self) -> PackedModel:
        """Every layer, then the head and the embedding."""
        layers = len(self.source.config.blocks)
        self._work = _Work.of(self.folder, self.source, self.recipe, self.text)
        self._statistics = self._collected()
        self._method = method_named(self.recipe.method)
        linears: dict[str, PackedLinear] = {}
        vectors = {n: finite_values(t) for n, t in self.source.tensors.items() if len(t.shape) == 1}
        self._streams: Streams | None = None
        for index in range(layers + 1):
            self.observer(index, layers + 1, f"layer {index}" if index < layers else "the head")
            done = self._work.read(index)
            if done is None:
                done = self._layer(index) if index < layers else self._outside()
                self._work.write(index, done, self._streams)
            linears |= done.linears
            vectors |= {n: np.ascontiguousarray(v.float().numpy()) for n, v in done.vectors.items()}
        self.observer(layers + 1, layers + 1, "done")
        return PackedModel(self.source.config, self.recipe, linears, vectors)

    def _collected(self) -> Statistics | None:
        if not reads_moments(self.recipe) or self.text is None:
            return None
        found = Statistics(self.source, self.text)
        found.collect(self.observer)
        return found

    def _layer(self, index: int) -> QuantisedLayer:
        statistics = None if self._statistics is None else self._statistics.layer(index)
        streams = self._at(index) if METHODS[self.recipe.method].reads == "states" else None
        layer = layer_to_round(self.source, self.recipe, index, statistics, streams)
        return packed_layer(self.source, self.recipe, self._method, layer)

    def _at(self, index: int) -> Streams:
        """Both streams before a layer: where they are, as kept by a run that was stopped, or at the start."""
        assert self.text is not None
        if self._streams is None:
            first = Stream.of(self.source, self.text)
            self._streams = Streams(first, first.copy())
            if index and not self._work.restore(index, self._streams):
                self._catch_up(index)
        return self._streams

    def _catch_up(self, index: int) -> None:
        """Run both streams through layers that were finished, where their states were lost."""
        assert self._streams is not None
        for before in range(index):
            done = self._work.read(before)
            assert done is not None, "layers are finished in order"
            advance_through(self.source, before, done, self._streams)

    def _outside(self) -> QuantisedLayer:
        """The embedding and the head."""
        tied = self.source.config.head.tied
        found: dict[str, PackedLinear] = {} if tied else {"embed": self._plainly("embed")}
        name = "embed" if tied else "head"
        layout = self.recipe.layout_for(name)
        integers = None
        if layout is not None and layout.is_integer and layout.bits < 8:
            head = Head(self.source, name, layout, self._head_moments, self._head_streams)
            integers = self._method.head(head)
        found[name] = self._plainly(name) if integers is None else pack_integers(name, integers)
        return QuantisedLayer(found, {})

    def _plainly(self, name: str) -> PackedLinear:
        return pack_linear(self.source.tensors[name], self.recipe.layout_for(name))

    def _head_moments(self) -> torch.Tensor:
        assert self._statistics is not None
        return self._statistics.layer(len(self.source.config.blocks)).grams[HEAD]

    def _head_streams(self) -> Streams:
        return self._at(len(self.source.config.blocks))


@dataclass(frozen=True)
class _Work:
    """Finished layers of one run on disk, and the streams where the last one left them."""

    folder: Path | None

    @classmethod
    def of(cls, folder: Path | None, source: Source, recipe: Recipe, text: Calibration | None) -> _Work:
        if folder is None:
            return cls(None)
        how = (recipe.default, recipe.head, sorted(recipe.layers.items()), recipe.method, recipe.smooth)
        return cls(folder / work_key(source, text, "layers", _VERSION, str(how)))

    def read(self, index: int) -> QuantisedLayer | None:
        """A finished layer; None where it is not there or damaged."""
        state = None if self.folder is None else read_state(self.folder / f"layer-{index}.pt", _KIND)
        if state is None:
            return None
        linears = {name: _linear(kept) for name, kept in state["linears"].items()}
        return QuantisedLayer(linears, state["vectors"])

    def write(self, index: int, done: QuantisedLayer, streams: Streams | None) -> None:
        """Keep a layer, and the streams behind it: the layer last, so that it vouches for them."""
        if self.folder is None:
            return
        if streams is not None:
            states = {"next": index + 1, "full": streams.full.x, "ours": streams.ours.x}
            write_state(self.folder / "streams.pt", _KIND, states)
        linears = {name: _plain(one) for name, one in done.linears.items()}
        state = {"linears": linears, "vectors": dict(done.vectors)}
        write_state(self.folder / f"layer-{index}.pt", _KIND, state)

    def restore(self, index: int, streams: Streams) -> bool:
        """Put streams where a stopped run left them before a layer; False where that was not kept."""
        state = None if self.folder is None else read_state(self.folder / "streams.pt", _KIND)
        if state is None or state["next"] != index or state["full"].shape != streams.full.x.shape:
            return False
        streams.full.x, streams.ours.x = state["full"], state["ours"]
        return True


class CalibratedLinears:
    """Single matrices as GPTQ finds them, each as if all others were the source's own: for mixtures.

    Args:
        calibration: the text; read once, when the first matrix is asked for.
        observer: told while the text is read.
    """

    def __init__(
        self, source: Source, calibration: Calibration, observer: Observer = lambda done, total, now: None
    ) -> None:
        self._source, self._observer = source, observer
        self._store = WorkStore()
        self._folder = self._store.place("linears", work_key(source, calibration, "linears", _LINEARS))
        self._has_room = False
        self._statistics = Statistics(source, calibration)
        self._collected = False
        self._factor: tuple[tuple[int | None, str], Factor] | None = None

    def linear(self, name: str, layout: Format) -> PackedLinear:
        """One matrix by canonical name; to the nearest from 8 bits on.

        Raises:
            ModelError: a weight or an activation is not finite; the layer is named.
            DiskError: full, read-only or forbidden disk.
            UsageError: HASTEN_CACHE_GB is no number.
        """
        touch(self._folder)
        tensor = self._source.tensors[name]
        if not layout.is_integer or layout.bits >= 8:
            return pack_linear(tensor, layout)
        path = self._folder / f"{name}.{layout}.pt"
        kept = read_state(path, _LINEARS)
        if kept is not None and tuple(kept["matrix"][:3]) == (layout.name, *tensor.shape):
            return _linear(kept["matrix"])
        with torch.no_grad():
            weight = tensor_values(tensor)
            found = pack_integers(name, gptq(weight, self._factor_for(name), layout, name))
        self._make_room()
        write_state(path, _LINEARS, {"matrix": _plain(found)})
        return found

    def _factor_for(self, name: str) -> Factor:
        layer, group, _ = readers_of(name)
        if self._factor is None or self._factor[0] != (layer, group):
            if not self._collected:
                self._statistics.collect(self._observer)
                self._collected = True
            index = len(self._source.config.blocks) if layer is None else layer
            gram = self._statistics.layer(index).grams[group]
            self._factor = (layer, group), factor_of(gram, name)
        return self._factor[1]

    def _make_room(self) -> None:
        if not self._has_room:
            self._store.make_room(self._folder, self._source.config.weights_stored)  # each at 2 widths or so
            self._store.mark(self._folder, self._source.name)
            self._has_room = True


def _plain(one: PackedLinear) -> tuple[Any, ...]:
    return one.layout.name, one.rows, one.cols, torch.from_numpy(one.data), one.relative_error


def _linear(kept: tuple[Any, ...]) -> PackedLinear:
    layout, rows, cols, data, error = kept
    return PackedLinear(format_named(layout), rows, cols, data.numpy(), error)
