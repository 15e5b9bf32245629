"""What the source's own activations are like, layer by layer: second moments and maxima, kept on disk.

One pass over the calibration text, activations streamed; a file a layer, so that a pass that was killed goes
on at the layer it had reached. Second moments are kept as correlations in fp16, the half below the diagonal,
and the diagonal in fp32: 26 MB for a layer of the demo model instead of 104.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from hasten.compress.calibration import Calibration, statistics_bytes, work_key
from hasten.compress.stream import Stream, stream_linear, stream_weights, symmetric_add
from hasten.compress.torch_model import Weights, activated, attended, read_state, tensor_values, write_state
from hasten.core import READERS, Group
from hasten.errors import ModelError
from hasten.models.source import Source
from hasten.weights.work_store import WorkStore, touch


class StagedLayer:
    """One stream through one layer in four stages: each matrix may be changed before it is used.

    What quantising one layer after another needs: the inputs of `o` are there only once q, k and v are
    settled. Every product is computed once.

    Args:
        stream: the hidden states before the layer; moved on as stages pass.
    """

    def __init__(self, stream: Stream, index: int) -> None:
        self._stream, self._index = stream, index
        self._inner: torch.Tensor | None = None  # inputs of `o` or `down`, [B, T, cols]

    def inputs(self, group: Group, weights: Weights) -> torch.Tensor:
        """What a group's matrices read: float32 [B, T, cols].

        Raises:
            ModelError: a value is not finite; the layer is named.
        """
        found = self._inner
        if found is None:
            found = self._normed("attn_norm" if group == "qkv" else "mlp_norm", weights)
        if not torch.isfinite(found).all():
            raise ModelError(
                f"{self._stream.name}: what layers.{self._index}.{group} reads is not finite on the "
                "calibration text",
                hint=f"the weights of layers.{self._index} or before are damaged: get the model again",
            )
        return found

    def pass_on(self, group: Group, weights: Weights, inputs: torch.Tensor) -> None:
        """Through a group's matrices.

        Args:
            group: the stage; stages pass in the order of `READERS`.
        """
        config, positions = self._stream.config, self._stream.positions
        if group == "qkv":
            self._inner = self._each(
                inputs, lambda x: attended(config, self._index, weights, x, positions, stream_linear)
            )
        elif group == "gate_up":
            self._inner = self._each(inputs, lambda x: activated(config, weights, x, stream_linear))
        else:
            self._stream.join(group, weights, inputs)
            self._inner = None

    def _normed(self, name: str, weights: Weights) -> torch.Tensor:
        norm = weights.get(name)
        if norm is None:  # norms come after the blocks
            return self._stream.x.clone()
        return F.rms_norm(self._stream.x, norm.shape, norm, self._stream.config.final_norm.eps)

    def _each(self, inputs: torch.Tensor, work: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        out: torch.Tensor | None = None
        for rows in self._stream.batches():
            found = work(inputs[rows])
            if out is None:
                out = torch.empty(*inputs.shape[:2], found.shape[-1])
            out[rows] = found
        assert out is not None, "calibration has at least one window"
        return out


def settle(layer: StagedLayer, weights: Weights) -> None:
    """All stages with the weights as they are."""
    for group in READERS:
        layer.pass_on(group, weights, layer.inputs(group, weights))


Observer = Callable[[int, int, str], object]
"""(layers done, layers in all, what is done now)."""
HEAD = "head"
_VERSION = 1
_KIND = f"statistics {_VERSION}"


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer, by group of matrices that read the same input; of the LM head: `HEAD` alone."""

    grams: Mapping[str, torch.Tensor]  # float32 [cols, cols], mean over tokens of x x^T
    maxima: Mapping[str, torch.Tensor]  # float32 [cols], largest magnitude


class Statistics:
    """Of a model on a text, kept in the cache folder."""

    def __init__(self, source: Source, calibration: Calibration) -> None:
        self._source, self._text = source, calibration
        self._store = WorkStore()
        self.folder = self._store.place("statistics", work_key(source, calibration, "statistics", _VERSION))
        self._last: tuple[int, LayerStatistics] | None = None

    def layer(self, index: int) -> LayerStatistics:
        """Of one layer; index `num_layers` is the LM head; those not there are collected."""
        if self._last is None or self._last[0] != index:
            touch(self.folder)
            found = _read(self._path(index))
            if found is None:  # removed meanwhile
                self.collect()
                found = _read(self._path(index))
            assert found is not None, f"statistics of layer {index} were just collected"
            self._last = index, found
        return self._last[1]

    def collect(self, observer: Observer = lambda done, total, now: None) -> None:
        """Read the text once, unless that was done before.

        Memory: hidden states and one layer's activations (for the demo model and 16,384 tokens 0.4 GB), one
        layer's weights and its moments.

        Raises:
            ModelError: an activation is not finite; the layer is named.
            DiskError: full, read-only or forbidden disk; what was collected before stays.
            UsageError: HASTEN_CACHE_GB is no number.
        """
        total = len(self._source.config.blocks) + 1
        have = next((i for i in range(total) if _read(self._path(i)) is None), total)
        if have == total:
            return
        self._store.make_room(self.folder, statistics_bytes(self._source.config))
        self._store.mark(self.folder, self._source.name)
        stream = Stream.of(self._source, self._text)
        if have:
            stream.x = self._resumed(have, stream)
        with torch.no_grad():
            for index in range(have, total):
                observer(index, total, f"statistics of layer {index}" if index < total - 1 else "of the head")
                found = self._layer(stream, index) if index < total - 1 else self._head(stream)
                write_state(self._state, _KIND, {"x": stream.x, "next": torch.tensor(index + 1)})
                write_state(self._path(index), _KIND, _packed(found))
        self._state.unlink(missing_ok=True)

    @property
    def _state(self) -> Path:
        return self.folder / "stream.pt"

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index}.pt"

    def _resumed(self, have: int, stream: Stream) -> torch.Tensor:
        """The stream before layer `have`: as kept, or computed again where that is another's or gone."""
        kept = read_state(self._state, _KIND)
        if kept is not None and int(kept["next"]) == have and kept["x"].shape == stream.x.shape:
            x: torch.Tensor = kept["x"]
            return x
        with torch.no_grad():
            for index in range(have):
                stream.advance(index, stream_weights(self._source, index))
        return stream.x

    def _layer(self, stream: Stream, index: int) -> LayerStatistics:
        weights = stream_weights(self._source, index)
        staged = StagedLayer(stream, index)
        grams: dict[str, torch.Tensor] = {}
        maxima: dict[str, torch.Tensor] = {}
        for group in READERS:
            x = staged.inputs(group, weights)
            grams[group], maxima[group] = mean_gram(x), x.abs().amax((0, 1))
            staged.pass_on(group, weights, x)
        return LayerStatistics(grams, maxima)

    def _head(self, stream: Stream) -> LayerStatistics:
        x = final_states(self._source, stream)
        return LayerStatistics({HEAD: mean_gram(x)}, {HEAD: x.abs().amax((0, 1))})


def mean_gram(x: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of x x^T: float32 [..., cols] -> float32 [cols, cols]."""
    gram = torch.zeros(x.shape[-1], x.shape[-1])
    symmetric_add(gram, x)
    return gram.div_(max(1, x.numel() // x.shape[-1]))


def final_states(source: Source, stream: Stream) -> torch.Tensor:
    """What the LM head reads: float32 [B, T, E]."""
    norm = tensor_values(source.tensors["final_norm"])
    return F.rms_norm(stream.x, norm.shape, norm, source.config.final_norm.eps)


def readers_of(name: str) -> tuple[int | None, Group | str, str]:
    """(layer, group, short name) of a matrix by canonical name; the head and embedding: (None, HEAD)."""
    if not name.startswith("layers."):
        return None, HEAD, name
    _, layer, short = name.split(".")
    return int(layer), next(group for group, names in READERS.items() if short in names), short


def _packed(found: LayerStatistics) -> dict[str, Any]:
    state: dict[str, Any] = {"maxima": dict(found.maxima), "size": {}, "correlation": {}}
    for group, gram in found.grams.items():
        size = gram.diagonal().clamp(min=0).sqrt()
        unit = torch.where(size > 0, 1 / size, 0.0)
        below = torch.ones_like(gram, dtype=torch.bool).tril_(-1)
        state["size"][group] = size
        state["correlation"][group] = (gram * unit * unit[:, None])[below].half()
    return state


def _unpacked(state: Mapping[str, Any]) -> LayerStatistics:
    grams = {}
    for group, size in state["size"].items():
        gram = torch.zeros(len(size), len(size))
        gram[torch.ones_like(gram, dtype=torch.bool).tril_(-1)] = state["correlation"][group].float()
        gram += gram.T.clone()
        gram.diagonal().copy_(size > 0)
        grams[group] = gram.mul_(size).mul_(size[:, None])
    return LayerStatistics(grams, state["maxima"])


def _read(path: Path) -> LayerStatistics | None:
    state = read_state(path, _KIND)
    return None if state is None else _unpacked(state)
