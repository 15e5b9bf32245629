"""An artifact in the file format of another engine.

Each of `FORMATS` has a `plan` that says no before any work and a `write` that writes all or nothing. What a
file keeps and what it rounds is in the `Exported` that comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from hasten.compress.export_result import Exported, Progress, Rounding
from hasten.errors import DiskError, UsageError
from hasten.models.artifact import load_artifact
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
        Format("gguf", "hasten.compress.export_gguf", ".gguf", "llama.cpp and what is built on it"),
        Format(
            "compressed-tensors",
            "hasten.compress.export_compressed_tensors",
            "",
            "transformers with the compressed-tensors package, vLLM",
        ),
        Format("gptq", "hasten.compress.export_gptq", "", "GPTQModel and what reads its format"),
        Format("openvino", "hasten.compress.export_openvino", "", "openvino, optimum-intel, OpenVINO GenAI"),
        Format("onnx", "hasten.compress.export_onnx", "", "onnxruntime, optimum-onnx"),
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
