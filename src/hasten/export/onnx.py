"""`--to onnx`: a folder with model.onnx for onnxruntime, and what optimum needs to generate with it.

The graph is written here, not traced: the artifact's integers, scales and minimums go into it as they are.
Inputs and outputs are those of optimum's `text-generation-with-past`. Weights lie in model.onnx_data beside
the graph, as a protobuf holds 2 GB at most. Needs the package onnx.

A matrix lies transposed, [cols, rows], as int4, uint4, int8 or uint8 with fp16 scales [groups, rows]: what
onnxruntime turns into its MatMulNBits when it loads. Nothing beyond the standard is used.

Source: ONNX's operators of opset 21 and its external data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from onnx import StringStringEntryProto, TensorProto, helper

from hasten.cache import write_atomic
from hasten.core import Attention
from hasten.export import Exported, Progress
from hasten.export import graph as graphs
from hasten.export.graph import (
    Array,
    GraphPlan,
    Node,
    carrier,
    group_of,
    pairs,
    parameters,
    plain_attention,
    quants,
)
from hasten.models.artifact import Artifact
from hasten.weights.packed import PackedLinear, PackedModel

OPSET, IR = 21, 10

_TYPES = {
    "i4": TensorProto.INT4,
    "u4": TensorProto.UINT4,
    "i8": TensorProto.INT8,
    "u8": TensorProto.UINT8,
    "bf16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
}

_ROWS = ".rows"  # a use of a matrix: looking rows up
_CALLS = {"Subtract": "Sub", "Multiply": "Mul", "Divide": "Div", "LessEqual": "LessOrEqual"}


@dataclass(frozen=True)
class Initializer:
    """A constant; `data` makes its bytes when they are written; those of one `place` share them."""

    name: str
    place: str
    kind: str
    shape: tuple[int, ...]
    data: Callable[[], npt.NDArray[Any]]


class OnnxGraph:
    """`hasten.export.graph.Graph`; a node is the name of a value."""

    def __init__(self, packed: PackedModel, stored: dict[str, str]) -> None:
        self._packed, self._stored = packed, stored
        self.nodes: list[Any] = []
        self.initializers: list[Initializer] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._known: dict[object, str] = {}
        self._names: set[str] = set()

    def model(self, tensors: Sequence[Any], name: str) -> Any:
        """The ModelProto, with the initializers' protos; `logits` is the first output."""
        outputs = sorted(self.outputs, key=lambda value: bool(value.name != "logits"))
        graph = helper.make_graph(self.nodes, name, self.inputs, outputs, tensors)
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="hasten")

    def input(self, name: str, sizes: Sequence[str]) -> Node:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, list(sizes)))
        return name

    def output(self, name: str, value: Node) -> None:
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        sizes: list[str | int | None] = ["batch", "new", self._packed.config.vocab]
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))

    def constant(self, values: Array) -> Node:
        kept = np.ascontiguousarray(values).reshape(values.shape)
        key = (kept.dtype.str, kept.shape, kept.tobytes())
        if key not in self._known:
            self._known[key] = self._stored_as(
                f"c{len(self._known)}", str(kept.dtype), kept.shape, lambda: kept
            )
        return self._known[key]

    def linear(self, name: str, x: Node) -> Node:
        linear = self._packed.linears[name]
        y = self._named("MatMul", [x, self._matrix(name)], f"{name}.out")
        if not linear.layout.symmetric:
            y = self.call("Add", y, self._minimums_part(name, x))
        bias = self._packed.vectors.get(f"{name}.bias")
        return y if bias is None else self.call("Add", y, self.constant(bias))

    def embed(self, ids: Node) -> Node:
        linear = self._packed.linears["embed"]
        x = self._float(self._columns(self._quants("embed", _ROWS), ids))  # [B, T, E]
        if linear.layout.bits == 16:
            return x
        grouped = self.reshape(x, (0, 0, -1, group_of(linear)))
        scales = self._float(self._columns(self._parameter("embed", "scales", _ROWS), ids))
        grouped = self.call("Multiply", grouped, self.unsqueeze(scales, 3))
        if not linear.layout.symmetric:
            minimums = self._float(self._columns(self._parameter("embed", "minimums", _ROWS), ids))
            grouped = self.call("Add", grouped, self.unsqueeze(minimums, 3))
        return self.reshape(grouped, (0, 0, linear.cols))

    def extended(self, name: str, new: Node, mixer: Attention) -> Node:
        past, both = f"past_key_values.{name}", f"present.{name}"
        for value, length, listed in ((past, "past", self.inputs), (both, "all", self.outputs)):
            sizes: list[str | int | None] = ["batch", mixer.kv_heads, length, mixer.head_dim]
            listed.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, sizes))
        return self._named("Concat", [past, new], both, axis=2)

    def attention(self, q: Node, k: Node, v: Node, mask: Node, mixer: Attention) -> Node:
        return plain_attention(self, q, k, v, mask, mixer)

    def call(self, operation: str, *values: Node) -> Node:
        return self._new(_CALLS.get(operation, operation), values)

    def mean(self, x: Node) -> Node:
        return self._new("ReduceMean", [x, self._axes(-1)], keepdims=1)

    def softmax(self, x: Node) -> Node:
        return self._new("Softmax", [x], axis=-1)

    def reshape(self, x: Node, sizes: Sequence[int]) -> Node:
        return self._new("Reshape", [x, self._axes(*sizes)])

    def transpose(self, x: Node, axes: Sequence[int]) -> Node:
        return self._new("Transpose", [x], perm=list(axes))

    def concat(self, values: Sequence[Node], axis: int) -> Node:
        return self._new("Concat", values, axis=axis)

    def part(self, x: Node, first: int, end: int) -> Node:
        return self._new("Slice", [x, *(self._axes(one) for one in (first, end, -1))])

    def unsqueeze(self, x: Node, axis: int) -> Node:
        return self._new("Unsqueeze", [x, self._axes(axis)])

    def floats(self, x: Node) -> Node:
        return self._float(x)

    def size(self, x: Node, axis: int) -> Node:
        found = self._new("Shape", [x], start=axis, end=axis + 1)
        return self._new("Squeeze", [found, self._axes(0)])

    def range(self, first: Node, end: Node) -> Node:
        return self._new("Range", [first, end, self.constant(np.array(1, np.int64))])

    def maximum(self, x: Node) -> Node:
        return self._new("ReduceMax", [x], keepdims=0)

    def _new(self, operation: str, inputs: Sequence[str], **attributes: Any) -> str:
        return self._named(operation, inputs, f"v{len(self.nodes)}", **attributes)

    def _named(self, operation: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operation, list(inputs), [output], **attributes))
        return output

    def _float(self, x: Node) -> Node:
        return self._new("Cast", [x], to=TensorProto.FLOAT)

    def _axes(self, *values: int) -> Node:
        return self.constant(np.array(values, np.int64))

    def _columns(self, matrix: Node, ids: Node) -> Node:
        """Columns of [n, V] by ids [B, T], as [B, T, n]."""
        return self.transpose(self._new("Gather", [matrix, ids], axis=1), (1, 2, 0))

    def _stored_as(
        self,
        place: str,
        kind: str,
        shape: tuple[int, ...],
        data: Callable[[], npt.NDArray[Any]],
        use: str = "",
    ) -> str:
        """The name of a constant; one for each use, as onnxruntime fuses only what has one."""
        name = place + use
        if name not in self._names:
            self._names.add(name)
            self.initializers.append(Initializer(name, place, kind, shape, data))
        return name

    def _quants(self, name: str, use: str = "") -> Node:
        """Integers or bf16 [cols, rows]."""
        linear, kind = self._packed.linears[name], self._stored[name]
        shape = (linear.cols, linear.rows)
        return self._stored_as(f"{name}.quants", kind, shape, lambda: _transposed(linear, kind), use)

    def _parameter(self, name: str, which: str, use: str = "") -> Node:
        """Scales or minimums, fp16 [groups, rows]."""
        linear = self._packed.linears[name]
        shape = (linear.cols // group_of(linear), linear.rows)

        def data() -> npt.NDArray[Any]:
            return np.ascontiguousarray(getattr(parameters(linear), which).T)

        return self._stored_as(f"{name}.{which}", "float16", shape, data, use)

    def _matrix(self, name: str) -> Node:
        """float32 [cols, rows]; minimums are not in it."""
        linear = self._packed.linears[name]
        if linear.layout.bits == 16:
            return self._float(self._quants(name))
        scales = self._float(self._parameter(name, "scales"))
        inputs = [self._quants(name), scales]
        return self._named("DequantizeLinear", inputs, f"{name}.weight", axis=0, block_size=group_of(linear))

    def _minimums_part(self, name: str, x: Node) -> Node:
        """Sums of x by group times the minimums: [B, T, cols] -> [B, T, rows]."""
        grouped = self.reshape(x, (0, 0, -1, group_of(self._packed.linears[name])))
        sums = self._new("ReduceSum", [grouped, self._axes(-1)], keepdims=0)
        return self.call("MatMul", sums, self._float(self._parameter(name, "minimums")))


def _transposed(linear: PackedLinear, kind: str) -> npt.NDArray[Any]:
    values = np.concatenate(list(quants(linear))).T
    return pairs(values) if kind.endswith("4") else np.ascontiguousarray(values)


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
    linears = artifact.packed.linears

    def kind(name: str) -> str:
        found = carrier(linears[name].layout)
        return found.replace("4", "8") if name == "embed" else found  # Gather takes no 4-bit integers

    return graphs.plan(artifact, NAME, kind)


def write(made: GraphPlan, path: Path, progress: Progress) -> Exported:
    return graphs.write(made, NAME, path, lambda fresh: _write_model(made, fresh, progress))


def _write_model(made: GraphPlan, folder: Path, progress: Progress) -> str | None:
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
    write_atomic(folder / MODEL, model.SerializeToString())
    return None if all(kind == "bf16" for kind in made.stored.values()) else _EXACT


def _tensor(one: Any, file: BinaryIO) -> Any:
    """A constant as a TensorProto: small ones hold their bytes, others say where in `file` they are."""
    data = np.ascontiguousarray(one.data()).reshape(-1).view(np.uint8)
    tensor = TensorProto(data_type=_TYPES[one.kind], dims=one.shape)
    if data.size <= _INLINE:
        tensor.raw_data = data.tobytes()
        return tensor
    file.write(bytes(-file.tell() % _ALIGN))
    place = {"location": DATA, "offset": file.tell(), "length": data.size}
    file.write(data.data)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.extend(StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
    return tensor
