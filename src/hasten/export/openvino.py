"""`--to openvino`: a folder with an IR that openvino, optimum-intel and OpenVINO GenAI load.

The graph is written here, not traced: the artifact's integers, scales and minimums go into it as they are.
Needs the package openvino; with openvino-tokenizers and transformers too, GenAI's tokenizer comes along.

A matrix is Constant -> Convert f16 -> Multiply by f16 scales [rows, groups, 1] -> Reshape [rows, cols] ->
Convert f32 -> MatMul: what plugins recognise and keep compressed. Keys and values are variables, reordered by
`beam_idx`, as optimum-intel makes them.

Source: OpenVINO's opset 13 and the inputs, outputs and variables of optimum-intel's stateful text generation.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from hasten.core import Attention
from hasten.errors import DiskError
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
    slides,
)
from hasten.models.artifact import Artifact
from hasten.weights.packed import PackedLinear, PackedModel

_CALLS: dict[str, Callable[..., Any]] = {
    "Add": ops.add,
    "Subtract": ops.subtract,
    "Multiply": ops.multiply,
    "Divide": ops.divide,
    "Sqrt": ops.sqrt,
    "Tanh": ops.tanh,
    "Sigmoid": ops.sigmoid,
    "Cos": ops.cos,
    "Sin": ops.sin,
    "LessEqual": ops.less_equal,
    "Greater": ops.greater,
    "And": ops.logical_and,
    "Where": ops.select,
}

_TYPES = {"i4": ov.Type.i4, "u4": ov.Type.u4, "i8": ov.Type.i8, "u8": ov.Type.u8, "bf16": ov.Type.bf16}


class OpenVinoGraph:
    """`hasten.export.graph.Graph`; `model` gives the whole when it is built."""

    def __init__(self, packed: PackedModel, done: Callable[[], None]) -> None:
        self._packed, self._done = packed, done
        self._inputs: dict[str, Any] = {}
        self._results: list[Any] = []
        self._sinks: list[Any] = []
        self._matrices: dict[str, Node] = {}
        beams = ops.parameter([-1], np.int32, name="beam_idx")
        beams.output(0).set_names({"beam_idx"})
        self._beams = beams

    def model(self, name: str) -> Any:
        """The ov.Model, its inputs in the order that optimum-intel gives them."""
        return ov.Model(self._results, self._sinks, [*self._inputs.values(), self._beams], name)

    def input(self, name: str, sizes: Sequence[str]) -> Node:
        node = ops.parameter([-1] * len(sizes), np.int64, name=name)
        node.output(0).set_names({name})
        self._inputs[name] = node
        return node

    def output(self, name: str, value: Node) -> None:
        result = ops.result(value)
        result.output(0).set_names({name})
        self._results.append(result)

    def constant(self, values: Array) -> Node:
        return ops.constant(values)

    def linear(self, name: str, x: Node) -> Node:
        linear = self._packed.linears[name]
        y = ops.matmul(x, self._matrix(name), False, True)
        if not linear.layout.symmetric:
            y = ops.add(y, self._minimums_part(name, x))
        bias = self._packed.vectors.get(f"{name}.bias")
        return y if bias is None else ops.add(y, ops.constant(bias))

    def embed(self, ids: Node) -> Node:
        linear, first_axis = self._packed.linears["embed"], ops.constant(np.array(0, np.int64))
        x = ops.gather(self._matrix("embed"), ids, first_axis)
        if linear.layout.symmetric:
            return x
        minimums = ops.gather(self._minimums("embed"), ids, first_axis)  # [B, T, groups]
        grouped = self.reshape(x, (0, 0, -1, group_of(linear)))
        return self.reshape(ops.add(grouped, self.unsqueeze(minimums, 3)), (0, 0, linear.cols))

    def extended(self, name: str, new: Node, mixer: Attention) -> Node:
        first_axis = ops.constant(np.array(0, np.int64))
        batch = ops.gather(ops.shape_of(self._inputs["input_ids"]), ops.constant([0]), first_axis)
        rest = ops.constant(np.array([mixer.kv_heads, 0, mixer.head_dim], np.int64))
        empty = ops.broadcast(ops.constant(np.array(0, np.float32)), ops.concat([batch, rest], 0))
        layer, kind = name.split(".")
        own = f"past_key_values.{layer}.{kind}present.{layer}.{kind}"
        size = ov.PartialShape([-1, mixer.kv_heads, -1, mixer.head_dim])
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = size, ov.Type.f32, own
        variable = ov.op.util.Variable(info)
        past = ops.gather(ov.op.read_value(empty, variable), self._beams, first_axis)
        both = ops.concat([past, new], 2)
        self._sinks.append(ov.op.assign(both, variable))
        return both

    def attention(self, q: Node, k: Node, v: Node, mask: Node, mixer: Attention) -> Node:
        # GenAI's paged attention replaces the operation below and leaves sliding windows out without a word;
        # without it, it says that it cannot, and goes on with its other pipeline
        if mixer.softcap is not None or slides(self._packed.config):
            return plain_attention(self, q, k, v, mask, mixer)
        if mixer.heads > mixer.kv_heads:
            k, v = (self._repeated(one, mixer) for one in (k, v))
        scale = ops.constant(np.array(mixer.score_scale, np.float32))
        return ops.scaled_dot_product_attention(q, k, v, mask, scale)

    def call(self, operation: str, *values: Node) -> Node:
        if operation == "MatMul":
            return ops.matmul(values[0], values[1], False, False)
        return _CALLS[operation](*values)

    def mean(self, x: Node) -> Node:
        return ops.reduce_mean(x, ops.constant(np.array([-1], np.int64)), True)

    def softmax(self, x: Node) -> Node:
        return ops.softmax(x, -1)

    def reshape(self, x: Node, sizes: Sequence[int]) -> Node:
        return ops.reshape(x, ops.constant(np.array(sizes, np.int64)), True)

    def transpose(self, x: Node, axes: Sequence[int]) -> Node:
        return ops.transpose(x, ops.constant(np.array(axes, np.int64)))

    def concat(self, values: Sequence[Node], axis: int) -> Node:
        return ops.concat(list(values), axis)

    def part(self, x: Node, first: int, end: int) -> Node:
        return ops.slice(x, *(ops.constant(np.array([one], np.int64)) for one in (first, end, 1, -1)))

    def unsqueeze(self, x: Node, axis: int) -> Node:
        return ops.unsqueeze(x, ops.constant(np.array(axis, np.int64)))

    def floats(self, x: Node) -> Node:
        return ops.convert(x, np.float32)

    def size(self, x: Node, axis: int) -> Node:
        first_axis = ops.constant(np.array(0, np.int64))
        return ops.gather(ops.shape_of(x), ops.constant(np.array(axis, np.int64)), first_axis)

    def range(self, first: Node, end: Node) -> Node:
        return ops.range(first, end, ops.constant(np.array(1, np.int64)), "i64")

    def maximum(self, x: Node) -> Node:
        return ops.reduce_max(x, ops.constant(np.array([0, 1], np.int64)), False)

    def _repeated(self, x: Node, mixer: Attention) -> Node:
        """[B, K, S, D] -> [B, H, S, D], each head H / K times in a row."""
        sizes = ops.constant(np.array([1, 1, mixer.heads // mixer.kv_heads, 1, 1], np.int64))
        wide = ops.broadcast(self.unsqueeze(x, 2), sizes, broadcast_spec="BIDIRECTIONAL")
        return self.reshape(wide, (0, mixer.heads, -1, mixer.head_dim))

    def _minimums(self, name: str) -> Node:
        """float32 [rows, groups]."""
        return ops.convert(ops.constant(parameters(self._packed.linears[name]).minimums), np.float32)

    def _minimums_part(self, name: str, x: Node) -> Node:
        """Sums of x by group times the minimums: [B, T, cols] -> [B, T, rows]."""
        grouped = self.reshape(x, (0, 0, -1, group_of(self._packed.linears[name])))
        sums = ops.reduce_sum(grouped, ops.constant(np.array([-1], np.int64)), False)
        return ops.matmul(sums, self._minimums(name), False, True)

    def _matrix(self, name: str) -> Node:
        """float32 [rows, cols] of a compressed constant; minimums are not in it."""
        if name not in self._matrices:
            self._matrices[name] = _decompressed(self._packed.linears[name])
            self._done()
        return self._matrices[name]


def _decompressed(linear: PackedLinear) -> Node:
    if linear.layout.bits == 16:
        return ops.convert(_constant(linear, (linear.rows, linear.cols)), np.float32)
    group = group_of(linear)
    shape = (linear.rows, linear.cols // group, group)
    scales = parameters(linear).scales[:, :, None]
    values = ops.multiply(ops.convert(_constant(linear, shape), np.float16), ops.constant(scales))
    flat = ops.reshape(values, ops.constant(np.array([linear.rows, linear.cols], np.int64)), False)
    return ops.convert(flat, np.float32)


def _constant(linear: PackedLinear, shape: Sequence[int]) -> Node:
    kind = carrier(linear.layout)
    tensor = ov.Tensor(_TYPES[kind], ov.Shape(list(shape)))
    flat = tensor.data.reshape(-1).view(np.uint8)
    at = 0
    for values in quants(linear):  # pieces of rows by 16: two 4-bit values never part
        data = (
            pairs(values) if kind.endswith("4") else np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        )
        flat[at : at + data.size] = data
        at += data.size
    assert at == flat.size
    return ov.op.Constant(tensor)


NAME = "openvino"
MODEL = "openvino_model"

_NO_TOKENIZER = (
    "no tokenizer of GenAI's own (openvino and optimum-intel need none): pip install openvino-tokenizers "
    "transformers, export again"
)

_CONVERT = """
import sys, openvino
from openvino_tokenizers import convert_tokenizer
from transformers import AutoTokenizer
made = convert_tokenizer(AutoTokenizer.from_pretrained(sys.argv[1]), with_detokenizer=True)
for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), made):
    openvino.serialize(model, f"{sys.argv[1]}/{name}.xml", f"{sys.argv[1]}/{name}.bin")
"""

_SLIDES = (
    "attention is written out, because OpenVINO GenAI's paged attention leaves sliding windows out without a "
    "word: so it refuses the model, and LLMPipeline takes its other way by itself"
)


def plan(artifact: Artifact) -> GraphPlan:
    linears, config = artifact.packed.linears, artifact.packed.config
    made = graphs.plan(artifact, NAME, lambda name: carrier(linears[name].layout))
    return replace(made, notes=(*made.notes, _SLIDES)) if graphs.slides(config) else made


def write(made: GraphPlan, path: Path, progress: Progress) -> Exported:
    def model(fresh: Path) -> str | None:
        _write_model(made, fresh, progress)
        return _write_tokenizer(fresh)

    return graphs.write(made, NAME, path, model)


def _write_model(made: GraphPlan, folder: Path, progress: Progress) -> None:

    packed = made.artifact.packed
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        progress(done, len(packed.linears))

    graph = OpenVinoGraph(packed, count)
    graphs.build(graph, packed.config, packed.vectors)
    try:
        ov.serialize(graph.model(made.artifact.name), folder / f"{MODEL}.xml", folder / f"{MODEL}.bin")
        ov.Core().read_model(folder / f"{MODEL}.xml")  # it does not say itself that the disk is full
    except (OSError, RuntimeError) as wrong:
        raise DiskError(
            f"{folder.parent}: the OpenVINO model cannot be written: {' '.join(str(wrong).split())[:300]}",
            hint="free some space or choose another --out",
        ) from None


def _write_tokenizer(folder: Path) -> str | None:
    """Write GenAI's tokenizer and detokenizer; where that cannot be, say why.

    In a process of its own: the converter imports transformers and torch.
    """
    if find_spec("openvino_tokenizers") is None or find_spec("transformers") is None:
        return _NO_TOKENIZER
    command = [sys.executable, "-c", _CONVERT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    names = [
        f"openvino_{kind}.{suffix}" for kind in ("tokenizer", "detokenizer") for suffix in ("xml", "bin")
    ]
    if done.returncode == 0 and all((folder / name).is_file() for name in names):
        return None
    for name in names:
        (folder / name).unlink(missing_ok=True)
    said = " ".join(done.stderr.split())[-200:]
    return f"no tokenizer for OpenVINO GenAI: openvino-tokenizers cannot carry it: {said}"
