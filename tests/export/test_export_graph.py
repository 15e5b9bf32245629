"""OpenVINO and ONNX folders we write: logits in openvino and onnxruntime, and every constant in them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest

from hasten.core import Format, Recipe
from hasten.errors import DiskError, MachineError, UsageError
from hasten.export import export
from hasten.models.artifact import load_artifact
from hasten.models.tokenizer import Tokenizer
from hasten.runtime.reference import ReferenceDecoder
from hasten.weights.packed import PackedLinear, integers
from tiny_artifacts import make, mixed, values_of
from tiny_models import prompts

FORMATS = ["openvino", "onnx"]
NAMES = [
    "llama", "llama-odd", "llama-llama3", "llama-yarn-mscale", "mistral", "qwen2", "qwen3",
    "gemma3", "gemma3-capped", "phi3", "phi3-sliding", "smollm3", "olmo2",
]  # fmt: skip
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": "1",
}
KINDS = {
    "layers.0.q": Format.of(4), "layers.0.k": Format.of(4, symmetric=False), "layers.0.v": Format.of(5),
    "layers.0.o": Format.of(5, 64, symmetric=False), "layers.0.gate": Format.of(6),
    "layers.0.up": Format.of(16),
    "layers.0.down": Format.of(6, 128, symmetric=False), "layers.1.q": Format.of(8, 128),
    "layers.1.k": Format.of(8, symmetric=False), "layers.1.v": Format.of(4, 64),
}  # fmt: skip


class Peer(Protocol):
    """A loaded export with its cache."""

    def start(self) -> None: ...

    def step(self, ids: np.ndarray, attended: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits [B, T, V] of new ids [B, T], `attended` [B, S] over the cached ones too."""


class OpenVino:
    def __init__(self, folder: Path, config: Any) -> None:
        self.compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", EXACT)
        self._request = self.compiled.create_infer_request()

    def start(self) -> None:
        self._request.reset_state()

    def step(self, ids: np.ndarray, attended: np.ndarray, positions: np.ndarray) -> np.ndarray:
        given = {"input_ids": ids, "attention_mask": attended, "position_ids": positions}
        beams = np.arange(len(ids), dtype=np.int32)
        return np.array(self._request.infer({**given, "beam_idx": beams})["logits"])


class Onnx:
    def __init__(self, folder: Path, config: Any, optimised: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if optimised:
            options.optimized_model_filepath = str(optimised)
        self._session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self._names = [one.name for one in self._session.get_outputs()]
        mixer = config.blocks[0].mixer
        self._empty = (mixer.kv_heads, 0, mixer.head_dim)
        self._cache: dict[str, np.ndarray] = {}

    def start(self) -> None:
        self._cache = {}

    def step(self, ids: np.ndarray, attended: np.ndarray, positions: np.ndarray) -> np.ndarray:
        given = {"input_ids": ids, "attention_mask": attended, "position_ids": positions}
        past = [name.replace("present", "past_key_values") for name in self._names[1:]]
        cache = self._cache or {name: np.zeros((len(ids), *self._empty), np.float32) for name in past}
        found = self._session.run(self._names, {**given, **cache})
        self._cache = dict(zip(past, found[1:], strict=True))
        return np.asarray(found[0])


PEERS: Mapping[str, type[OpenVino] | type[Onnx]] = {"openvino": OpenVino, "onnx": Onnx}


def plain(folder: Path) -> ReferenceDecoder:
    packed = load_artifact(folder).packed
    values = {name: values_of(linear) for name, linear in packed.linears.items()}
    return ReferenceDecoder(packed.config, {**values, **packed.vectors})


def run(peer: Peer, ids: list[int], cuts: tuple[int, ...]) -> np.ndarray:
    """Logits [T, V] of one sequence, given in pieces that end at `cuts`."""
    peer.start()
    found, first = [], 0
    for end in (*cuts, len(ids)):
        new = np.array([ids[first:end]])
        found.append(peer.step(new, np.ones((1, end), np.int64), np.arange(first, end)[None])[0])
        first = end
    return np.concatenate(found)


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-4 * wanted.std())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_gives_the_plain_decoders_logits(name: str, format: str, tmp_path: Path) -> None:
    recipe = "w8-g128-asym" if name == "llama-odd" else "w4-asym-head8"  # 66 inputs: one group
    folder = make(tmp_path, name, Recipe.parse(recipe))
    written = export(folder, format, tmp_path / "out")
    assert written.is_exact and written.bytes == sum(f.stat().st_size for f in written.path.iterdir())
    decoder, ids = plain(folder), prompts()[2]
    peer = PEERS[format](written.path, decoder.config)
    assert near(run(peer, ids, ()), decoder.logits(ids))
    if name == "phi3":
        assert any("past 16 tokens" in note for note in written.notes)
        ids = ids[:16]  # later the keys of a cache are turned by other factors than those of a whole prompt
    assert near(run(peer, ids, (9, 10, 15)), decoder.logits(ids))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["mistral", "gemma3-capped"])
def test_a_batch_padded_on_the_left(name: str, format: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w8"))
    decoder = plain(folder)
    peer = PEERS[format](export(folder, format, tmp_path / "out").path, decoder.config)
    rows = [prompts()[2][:20], prompts()[0][:13]]
    ids, attended = np.zeros((2, 20), np.int64), np.zeros((2, 20), np.int64)
    for row, own in enumerate(rows):
        ids[row, 20 - len(own) :], attended[row, 20 - len(own) :] = own, 1
    positions = np.maximum(attended.cumsum(1) - 1, 0)
    peer.start()
    first = peer.step(ids[:, :16], attended[:, :16], positions[:, :16])
    second = peer.step(ids[:, 16:], attended, positions[:, 16:])
    for row, own in enumerate(rows):
        found = np.concatenate([first[row], second[row]])[20 - len(own) :]
        assert near(found, decoder.logits(own))


@pytest.mark.parametrize("format", FORMATS)
def test_every_layout(format: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "llama-wide", mixed("w4", KINDS))
    written = export(folder, format, tmp_path / "out")
    assert set(written.carried) >= {"i4-g32", "u4-g32", "i8-g32", "u8-g64", "u8-g128", "bf16", "i4-g64"}
    assert any("lie in 8" in note for note in written.notes)
    decoder = plain(folder)
    assert near(run(PEERS[format](written.path, decoder.config), prompts()[2], ()),
                decoder.logits(prompts()[2]))  # fmt: skip


def integers_in(linear: PackedLinear) -> np.ndarray:
    found = integers(linear)
    return found.codes.astype(np.int16) if found.minimums is not None else found.signed.astype(np.int16)


def nibbles(data: np.ndarray, is_signed: bool) -> np.ndarray:
    values = np.stack([data & 15, data >> 4], -1).reshape(-1).astype(np.int16)
    return np.where(values > 7, values - 16, values).astype(np.int16) if is_signed else values


def openvino_constants(folder: Path) -> list[np.ndarray]:
    """Constants of four and eight bits, flat, in the file's order."""
    found = []
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        kind = node.get_output_element_type(0).get_type_name()
        if kind in ("i4", "u4"):
            found.append(nibbles(np.asarray(node.data).reshape(-1).view(np.uint8), kind == "i4"))
        elif kind in ("i8", "u8"):
            found.append(np.asarray(node.data).reshape(-1).astype(np.int16))
    return found


def onnx_constants(folder: Path) -> list[np.ndarray]:
    """As `openvino_constants`, rows and columns put back."""
    kinds = {onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    model = onnx.load(folder / "model.onnx")
    return [
        onnx.numpy_helper.to_array(one).T.astype(np.int16).reshape(-1)
        for one in model.graph.initializer
        if one.data_type in kinds
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_the_integers_are_the_artifacts(format: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "llama-wide", mixed("w4", KINDS))
    written = export(folder, format, tmp_path / "out").path
    kept = {
        one.tobytes() for one in (openvino_constants if format == "openvino" else onnx_constants)(written)
    }
    linears = load_artifact(folder).packed.linears
    wanted = {name: integers_in(x).reshape(-1).tobytes() for name, x in linears.items() if x.layout.bits < 16}
    assert len(wanted) == 15
    assert [name for name, values in wanted.items() if values not in kept] == []


def test_openvino_keeps_weights_compressed(tmp_path: Path) -> None:
    folder = make(tmp_path, "llama-wide", mixed("w4", {"layers.0.o": Format.of(8)}))
    peer = OpenVino(export(folder, "openvino", tmp_path / "out").path, None)
    kinds = [
        node.get_output_element_type(0).get_type_name()
        for node in peer.compiled.get_runtime_model().get_ops()
        if "Const" in str(node.get_rt_info()["layerType"].value)
        and np.prod(node.get_output_shape(0)) >= 2**14
    ]
    assert kinds.count("f32") == 0 and kinds.count("i4") >= 14 and kinds.count("i8") == 1


@pytest.mark.parametrize("name", ["llama-wide", "qwen2"])  # a head of its own, and one that is the embedding
def test_onnxruntime_keeps_weights_compressed(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w4-head8"))
    written, config = export(folder, "onnx", tmp_path / "out").path, load_artifact(folder).packed.config
    Onnx(written, config, tmp_path / "optimised.onnx")
    kinds = [
        node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    ]
    assert kinds.count("MatMulNBits") == 7 * len(config.blocks) + 1
    assert "DequantizeLinear" not in kinds


def test_onnx_is_valid_and_standard(tmp_path: Path) -> None:
    written = export(make(tmp_path, "qwen2", mixed("w8", {})), "onnx", tmp_path / "out").path
    onnx.checker.check_model(written / "model.onnx", full_check=True)
    model = onnx.load(written / "model.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    names = [one.name for one in model.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [one.name for one in model.graph.output][:2] == ["logits", "present.0.key"]
    embedding = 263 * 64  # int8, once, although two initializers name it
    places = [
        {entry.key: entry.value for entry in one.external_data}
        for one in model.graph.initializer
        if one.name.startswith("embed.quants")
    ]
    assert len(places) == 2 and places[0] == places[1] and int(places[0]["length"]) == embedding


@pytest.mark.parametrize("format", FORMATS)
def test_config_and_tokenizer_come_along(format: str, tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen2", Recipe.parse("w4-kv8"))
    written = export(folder, format, tmp_path / "out")
    config = json.loads((written.path / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["num_key_value_heads"] == 2
    copy = Tokenizer.from_folder(written.path)
    assert copy.encode("the man<|end|>") == Tokenizer.load(folder).encode("the man<|end|>")
    assert any("keys and values" in note for note in written.notes)


@pytest.mark.parametrize("format", FORMATS)
def test_refused_before_any_work(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = make(tmp_path / "a", "llama-dynamic", Recipe.parse("w8"))
    with pytest.raises(UsageError, match="cannot carry dynamic rope"):
        export(dynamic, format, tmp_path / "out")
    folder, found = make(tmp_path / "b", "llama", Recipe.parse("w8")), importlib.util.find_spec
    monkeypatch.setattr("hasten.export.find_spec", lambda name: None if name == format else found(name))
    with pytest.raises(MachineError, match=f"needs the package {format}") as refused:
        export(folder, format, tmp_path / "out")
    assert refused.value.hint == f"pip install {format}"
    assert not (tmp_path / "out").exists()


def test_a_cut_model_is_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO does not say that a disk is full: the file is just shorter."""
    serialize = openvino.serialize

    def full(model: Any, xml: Path, weights: Path) -> None:
        serialize(model, xml, weights)
        os.truncate(weights, weights.stat().st_size // 2)

    monkeypatch.setattr(openvino, "serialize", full)
    folder = make(tmp_path / "source", "llama", Recipe.parse("w8"))
    (tmp_path / "place").mkdir()
    with pytest.raises(DiskError, match="cannot be written"):
        export(folder, "openvino", tmp_path / "place" / "out")
    assert not list((tmp_path / "place").iterdir())


def asked(tmp_path: Path, written: Path, engine: str, wanted: dict[str, Any]) -> tuple[np.ndarray, Any]:
    python = os.environ.get("HASTEN_PEER_PYTHON")
    if not python:
        pytest.skip("HASTEN_PEER_PYTHON names no interpreter that has optimum-intel and openvino-genai")
    (tmp_path / "ids.json").write_text(json.dumps(wanted))
    script = Path(__file__).parent / "peer_logits.py"
    places = [str(written), str(tmp_path / "ids.json"), str(tmp_path / "out.npy")]
    done = subprocess.run([python, str(script), engine, *places], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(tmp_path / "out.npy"), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2"])
def test_optimum_intel_says_the_same(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w4-asym-head8"))
    written, ids = export(folder, "openvino", tmp_path / "out").path, prompts()[2][:16]
    theirs, _ = asked(tmp_path, written, "openvino", {"ids": ids})
    assert near(theirs, plain(folder).logits(ids))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "smollm3", "olmo2"])
def test_genai_says_the_same(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name, Recipe.parse("w8"))
    written, ids = export(folder, "openvino", tmp_path / "out").path, prompts()[0]
    theirs, _ = asked(tmp_path, written, "genai", {"ids": ids})
    assert theirs.tolist() == plain(folder).generate(ids, 8)


@pytest.mark.slow
def test_genais_paged_attention_refuses_sliding_windows(tmp_path: Path) -> None:
    """It would leave them out: were they dropped, its first id would differ."""
    folder = make(tmp_path, "mistral", Recipe.parse("w8"))
    written = export(folder, "openvino", tmp_path / "out")
    assert any("sliding windows" in note for note in written.notes)
    with pytest.raises(AssertionError, match="ScaledDotProductAttention"):
        asked(tmp_path, written.path, "genai", {"ids": prompts()[0], "options": {"ATTENTION_BACKEND": "PA"}})
