"""A model quantised layer by layer, in a way that can be stopped at any layer and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hasten.compress.calibration import Calibration, work_key
from hasten.compress.quantise.layer_methods import (
    QuantisedLayer,
    layer_alone,
    needs_statistics,
)
from hasten.compress.quantise.linears import head_alone
from hasten.compress.quantise.sequential import Streams, sequential_head, sequential_layer
from hasten.compress.quantise.statistics import Observer, Statistics
from hasten.compress.stream import Stream
from hasten.compress.torch_file import read_state, write_state
from hasten.core import Recipe
from hasten.errors import UsageError
from hasten.models.source import Source
from hasten.weights.formats import format_named
from hasten.weights.packed import PackedLinear, PackedModel, finite_values, pack_linear

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
        source: the model.
        recipe: layouts and method; its other steps were done before.
        calibration: the text; None for methods that read none (rtn, hqq).
        observer: told before each layer.
        folder: where finished layers are kept until the model is done; None keeps nothing.

    Raises:
        UsageError: the method needs text and there is none.
        ModelError: a weight or an activation is not finite; the layer is named.
        DiskError: full, read-only or forbidden disk; what was finished before stays.
    """
    if calibration is None and (recipe.method not in ("rtn", "hqq") or recipe.smooth is not None):
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
        layers = self.source.config.num_layers
        self._work = _Work.of(self.folder, self.source, self.recipe, self.text)
        self._statistics = self._collected()
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
        if not needs_statistics(self.recipe) or self.text is None:
            return None
        found = Statistics(self.source, self.text)
        found.collect(self.observer)
        return found

    def _layer(self, index: int) -> QuantisedLayer:
        statistics = None if self._statistics is None else self._statistics.layer(index)
        if self.recipe.method != "best":
            return layer_alone(self.source, self.recipe, index, statistics)
        return sequential_layer(self.source, self.recipe, index, self._at(index), statistics)

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
        from hasten.compress.quantise.replay import advance_through

        assert self._streams is not None
        for before in range(index):
            done = self._work.read(before)
            assert done is not None, "layers are finished in order"
            advance_through(self.source, before, done, self._streams)

    def _outside(self) -> QuantisedLayer:
        """The embedding and the head."""
        config = self.source.config
        found: dict[str, PackedLinear] = {}
        for name in ("embed",) if config.tied_head else ("embed", "head"):
            reads_states = name == "head" or config.tied_head
            if reads_states and self.recipe.method == "best":
                streams = self._at(config.num_layers)
                found[name] = sequential_head(self.source, self.recipe, name, streams)
            elif reads_states and self._statistics is not None and "gptq" in self.recipe.method:
                found[name] = head_alone(self.source, self.recipe, name, self._statistics)
            else:
                found[name] = pack_linear(self.source.tensors[name], self.recipe.layout_for(name))
        return QuantisedLayer(found, {})


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
        linears = {
            name: PackedLinear(format_named(layout), rows, cols, data.numpy(), error)
            for name, (layout, rows, cols, data, error) in state["linears"].items()
        }
        return QuantisedLayer(linears, state["vectors"])

    def write(self, index: int, done: QuantisedLayer, streams: Streams | None) -> None:
        """Keep a layer, and the streams behind it: the layer last, so that it vouches for them."""
        if self.folder is None:
            return
        if streams is not None:
            states = {"next": index + 1, "full": streams.full.x, "ours": streams.ours.x}
            write_state(self.folder / "streams.pt", _KIND, states)
        linears = {
            name: (
                one.layout.name,
                one.rows,
                one.cols,
                torch.from_numpy(one.data),
                one.relative_error,
            )
            for name, one in done.linears.items()
        }
        state = {"linears": linears, "vectors": dict(done.vectors)}
        write_state(self.folder / f"layer-{index}.pt", _KIND, state)

    def restore(self, index: int, streams: Streams) -> bool:
        """Put streams where a stopped run left them before a layer; False where that was not kept."""
        state = None if self.folder is None else read_state(self.folder / "streams.pt", _KIND)
        if state is None or state["next"] != index or state["full"].shape != streams.full.x.shape:
            return False
        streams.full.x, streams.ours.x = state["full"], state["ours"]
        return True
