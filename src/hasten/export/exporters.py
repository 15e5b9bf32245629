"""An artifact in the file format of another engine.

Each of `FORMATS` has a `plan` that says no before any work and a `write` that writes all or nothing. What a
file keeps and what it rounds is in the `Exported` that comes back.

What an export says of itself.

What lies beside the weights in every folder format: config.json, generation_config.json, the tokenizer.

Whether two configurations mean the same model, whatever words they say it in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from hasten.cache import write_json
from hasten.cache.reading import read_file
from hasten.core import ModelSpec
from hasten.errors import DiskError, UsageError
from hasten.models import rope
from hasten.models.artifact import Artifact, load_artifact
from hasten.weights.artifact import is_artifact

__all__ = ["FORMATS", "Exported", "Format", "Progress", "Rounding", "default_path", "export", "format_of"]


@dataclass(frozen=True)
class Format:
    """A format that can be written: `module` has `plan(artifact)` and `write(plan, path, progress)`."""

    name: str
    module: str
    suffix: str  # of a file; "" for a folder
    loads_in: str


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("gguf", "hasten.export.gguf", ".gguf", "llama.cpp and what is built on it"),
        Format(
            "compressed-tensors",
            "hasten.export.compressed_tensors",
            "",
            "transformers with the compressed-tensors package, vLLM",
        ),
        Format("gptq", "hasten.export.gptq", "", "GPTQModel and what reads its format"),
        Format("openvino", "hasten.export.openvino", "", "openvino, optimum-intel, OpenVINO GenAI"),
        Format("onnx", "hasten.export.onnx", "", "onnxruntime, optimum-onnx"),
    )
}


def format_of(name: str) -> Format:
    """A format by name.

    Raises:
        UsageError: there is no such format.
    """
    if name in FORMATS:
        return FORMATS[name]
    raise UsageError(f"unknown format {name!r}", hint=f"formats: {', '.join(FORMATS)}")


def default_path(ref: str | Path, format: Format) -> Path:
    """Where an export goes that names no place: beside the caller, by the artifact's name."""
    stem = Path(ref).resolve().name.removesuffix(".hasten")
    return Path(f"{stem}{format.suffix}" if format.suffix else f"{stem}-{format.name}")


def export(
    ref: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    said: Callable[[str], None] | None = None,
) -> Exported:
    """Write an artifact in another format. The weights' values stay; where one must be rounded, it is told.

    Args:
        ref: an artifact, `NAME.hasten`.
        to: a key of `FORMATS`.
        out: the file or folder; None takes `default_path`.
        force: replace what is there, in one step.
        progress: called with (done, total) tensors.
        said: called with what is being done.

    Raises:
        UsageError: an unknown format, no artifact, or a model the format cannot carry.
        MachineError: a package that writes the format is not installed.
        ArtifactError, TokenizerError: the artifact is damaged, or its tokenizer fits no word of the format.
        DiskError: something is there and not `force`; full, read-only or forbidden disk.
    """
    format = format_of(to)
    if not is_artifact(ref):
        raise UsageError(
            f"{ref} is no artifact", hint=f"make one first: hasten optimize {ref} --out NAME.hasten"
        )
    path = Path(out) if out is not None else default_path(ref, format)
    _check_target(path, format, force)
    say = said or (lambda _: None)
    say("reading the artifact")
    artifact = load_artifact(ref)
    if table := next((x.layout for x in artifact.packed.linears.values() if x.layout.table), None):
        raise UsageError(
            f"{ref} has weights in {table}, which no exporter writes",
            hint="make one of integers first: hasten compress MODEL --recipe w4 --out NAME.hasten",
        )
    say(f"checking what {to} can carry")
    module: Any = import_module(format.module)
    plan = module.plan(artifact)
    say(f"writing {path}")
    written: Exported = module.write(plan, path, progress or (lambda done, total: None))
    if artifact.packed.recipe.kv != "int8":
        return written
    note = "the recipe keeps keys and values in int8, which a file does not say: set it in the other engine"
    return replace(written, notes=(*written.notes, note))


def _check_target(path: Path, format: Format, force: bool) -> None:
    if format.suffix and path.is_dir():
        raise UsageError(f"{path} is a folder; {format.name} is one file", hint=f"--out {path}/MODEL.gguf")
    if not format.suffix and path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; {format.name} is a folder", hint="choose another --out")
    if is_artifact(path):
        raise UsageError(f"{path} is an artifact, not a place for an export", hint="choose another --out")
    if path.exists() and not force:
        raise DiskError(f"{path} is there already", hint="--force replaces it")


Progress = Callable[[int, int], None]
"""Called with (done, total) as tensors are written."""


@dataclass(frozen=True)
class Rounding:
    """A tensor the format could not carry exactly."""

    tensor: str  # the file's name
    stored_as: str
    relative_error: float  # root of (squared rounding error / squared values); 0 where it came out exact


@dataclass(frozen=True)
class Exported:
    """What was written. Every tensor that `rounding` does not list holds the artifact's values exactly."""

    format: str
    path: Path
    bytes: int
    carried: Mapping[str, int]  # stored type -> matrices
    rounding: tuple[Rounding, ...]
    notes: tuple[str, ...]  # what the format leaves out

    @property
    def is_exact(self) -> bool:
        """Whether every value is kept."""
        return all(one.relative_error == 0 for one in self.rounding)


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


_COMPARED = (
    *("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "context_length", "norm_eps", "activation", "norm_placement", "qk_norm"),
    *("sliding_window", "sliding_layers", "attention_softcap", "logit_softcap", "embed_scale", "tied_head"),
)
"""What must be equal; rotation is compared as the frequencies it gives, end tokens go with the tokenizer."""
_EMBED_SCALE_ERROR = 2**-8  # of a scale rounded to bf16; readers differ in whether they round it


@dataclass(frozen=True)
class Difference:
    """What differs first."""

    name: str
    ours: Any
    theirs: Any


def difference(ours: ModelSpec, theirs: ModelSpec) -> Difference | None:
    """The first thing in which two models differ, None where they compute the same."""
    mine, other = _meaning(ours), _meaning(theirs)
    for name, value in mine.items():
        tolerance = _EMBED_SCALE_ERROR if name == "embed_scale" else 1e-5
        if not _same(value, other[name], tolerance):
            return Difference(name, value, other[name])
    return None


def _meaning(config: ModelSpec) -> dict[str, Any]:
    known: dict[str, Any] = {name: getattr(config, name) for name in _COMPARED}
    window = config.sliding_window
    if window is not None and window >= config.context_length:
        known |= {"sliding_window": None, "sliding_layers": ()}
    known["rotary_dim"] = config.rotary_dim or config.head_dim
    known["rope_layers"] = config.rope_layers or (True,) * config.num_layers
    known["query_scale"] = config.score_scale
    turned = rope.tables(config)
    known["rope frequencies"] = turned.global_inv_freq
    known["rope scale"] = turned.global_scale
    known["rope frequencies of long texts"] = turned.long_inv_freq
    known["rope threshold"] = turned.long_threshold
    known["rope frequencies of sliding layers"] = turned.local_inv_freq
    if config.rope_scaling.kind == "dynamic":
        known["rope frequencies of long texts"] = rope.tables(config, 4 * config.context_length)
    return known


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, rope.RopeTables) and isinstance(b, rope.RopeTables):
        a, b = a.global_inv_freq, b.global_inv_freq
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=0))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance)
    return type(a) is type(b) and bool(a == b)
