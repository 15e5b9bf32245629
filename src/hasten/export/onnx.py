"""`--to onnx`: a folder with model.onnx for onnxruntime, and what optimum needs to generate with it.

The graph is written here, not traced: the artifact's integers, scales and minimums go into it as they are.
Inputs and outputs are those of optimum's `text-generation-with-past`. Weights lie in model.onnx_data beside
the graph, as a protobuf holds 2 GB at most. Needs the package onnx.

Source: ONNX's operators of opset 21 and its external data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hasten.cache import new_folder, write_atomic
from hasten.export import graph as graphs
from hasten.export.exporters import MARKER, Exported, Progress, write_companions
from hasten.export.graph import GraphPlan
from hasten.export.huggingface import carrier
from hasten.models.artifact import Artifact

NAME = "onnx"
MODEL = "model.onnx"
DATA = "model.onnx_data"
_ALIGN = 4096  # pages, so that a reader may map a tensor
_INLINE = 1024  # bytes of a tensor that lies in the graph

_EXACT = (
    "onnxruntime multiplies in int8 where weights have blocks: session option "
    "session.qdq_matmulnbits_accuracy_level=1 keeps activations floats"
)


def plan(artifact: Artifact) -> GraphPlan:
    """Decide what the folder will hold; reads no weights.

    Raises:
        UsageError: the format cannot carry something of the model.
        MachineError: onnx is not installed.
    """
    linears = artifact.packed.linears

    def kind(name: str) -> str:
        found = carrier(linears[name].layout)
        return found.replace("4", "8") if name == "embed" else found  # Gather takes no 4-bit integers

    return graphs.plan(artifact, NAME, "onnx", kind)


def write(made: GraphPlan, path: Path, progress: Progress) -> Exported:
    """Write the folder: all of it or nothing.

    Raises:
        DiskError: full, read-only or forbidden disk, or a folder that is no model stands there.
    """
    with new_folder(path, marker=MARKER) as fresh:
        write_companions(fresh, made.artifact, made.values)
        _write_model(made, fresh, progress)
    is_plain = all(kind == "bf16" for kind in made.stored.values())
    return graphs.exported(made, NAME, path, *([] if is_plain else [_EXACT]))


def _write_model(made: GraphPlan, folder: Path, progress: Progress) -> None:
    from hasten.export.onnx_graph import OnnxGraph

    packed = made.artifact.packed
    graph = OnnxGraph(packed, dict(made.stored))
    graphs.build(graph, packed.config, packed.vectors)
    tensors: list[Any] = []

    def put(file: BinaryIO) -> None:
        places: dict[str, Any] = {}
        for done, one in enumerate(graph.initializers):
            progress(done, len(graph.initializers))
            if one.place not in places:
                places[one.place] = _tensor(one, file)
            tensor = type(places[one.place])()
            tensor.CopyFrom(places[one.place])
            tensor.name = one.name
            tensors.append(tensor)

    write_atomic(folder / DATA, put)
    model = graph.model(tensors, made.artifact.name)
    write_atomic(folder / MODEL, lambda file: _put(file, model.SerializeToString()))


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _tensor(one: Any, file: BinaryIO) -> Any:
    """A constant as a TensorProto: small ones hold their bytes, others say where in `file` they are."""
    from onnx import StringStringEntryProto, TensorProto

    from hasten.export.onnx_graph import type_of

    data = np.ascontiguousarray(one.data()).reshape(-1).view(np.uint8)
    tensor = TensorProto(data_type=type_of(one.kind), dims=one.shape)
    if data.size <= _INLINE:
        tensor.raw_data = data.tobytes()
        return tensor
    file.write(bytes(-file.tell() % _ALIGN))
    place = {"location": DATA, "offset": file.tell(), "length": data.size}
    file.write(data.data)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.extend(StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
    return tensor
