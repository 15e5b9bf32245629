"""A model in the file format of another engine.

Each of `FORMATS` has a `plan` that says no before any work and a `write` that writes all or nothing. What a
file keeps and what it rounds is in the `Exported` that comes back. What several formats share is here too:
files beside the weights, rounding to float16, and whether two configurations mean the same model.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hasten.cache import write_json
from hasten.cache.reading import read_file
from hasten.core import Block, ModelSpec, Recipe, Rotary
from hasten.errors import DiskError, MachineError, UsageError
from hasten.models import rope
from hasten.models.artifact import Artifact, load_artifact
from hasten.models.source import file_name_of
from hasten.weights.artifact import is_artifact, made_from
from hasten.weights.packed import PackedLinear, bf16_bits, integers


@dataclass(frozen=True)
class Format:
    """A format that can be written. `place` is a module, or an object of one, with two functions:

    `plan(artifact)` decides what the file or folder will hold and reads no weights. It raises UsageError or
    TokenizerError where the format cannot carry something of the model.

    `write(plan, path, progress)` writes all of it or nothing. It raises DiskError for a full, read-only or
    forbidden disk or a folder that is no model, and UsageError for a value that fits no type of the format.

    Where a format has `types`, `plan(artifact, type)` takes one of them: the weights are rounded to it.
    """

    place: str  # "package.module", "package.module:object"
    loads_in: str
    suffix: str = ""  # of a file; "" for a folder
    package: str | None = None  # that writes it
    types: tuple[str, ...] = ()  # that it rounds weights to by itself


_GGUF_TYPES = ("q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s", "q6_k", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "bf16")
FORMATS: dict[str, Format] = {
    "gguf": Format(
        "hasten.export.gguf", "llama.cpp and what is built on it", suffix=".gguf", types=_GGUF_TYPES
    ),
    "compressed-tensors": Format(
        "hasten.export.huggingface:COMPRESSED_TENSORS",
        "transformers with the compressed-tensors package, vLLM",
    ),
    "gptq": Format("hasten.export.huggingface:GPTQ", "GPTQModel and what reads its format"),
    "openvino": Format(
        "hasten.export.openvino", "openvino, optimum-intel, OpenVINO GenAI", package="openvino"
    ),
    "onnx": Format("hasten.export.onnx", "onnxruntime, optimum-onnx", package="onnx"),
}


@dataclass(frozen=True)
class Target:
    """What the value of `--to` means."""

    name: str  # a key of FORMATS
    type: str = ""  # one of the format's types
    recipe: str = ""  # how the model is packed before it is written; "" for as it is

    @property
    def format(self) -> Format:
        return FORMATS[self.name]

    def path(self, ref: str | Path, out: str | Path | None) -> Path:
        """The file or folder to write: `out`, or one in the working folder by the model's name."""
        if out is not None:
            return Path(out)
        stem = "-".join(filter(None, (file_name_of(ref).removesuffix(".hasten"), self.type, self.recipe)))
        if self.recipe:
            stem = file_name_of(stem)  # a recipe may be a path, or `mix:1%`
        return Path(f"{stem}{self.format.suffix or f'-{self.name}'}")


def target(text: str) -> Target:
    """The meaning of `FORMAT`, or `FORMAT:TYPE` with a type of the format (`gguf:q4_k_m`) or a recipe.

    Raises:
        UsageError: there is no such format, or no such type or recipe.
    """
    name, _, kind = text.strip().partition(":")
    if name.lower() not in FORMATS:
        homes = [one for one, format in FORMATS.items() if name.lower().replace("-", "_") in format.types]
        near = [f"{one}:{name.lower()}" for one in homes] or _near(name, FORMATS)
        raise UsageError(f"unknown format {name!r}", hint=_hint(near, f"formats: {', '.join(FORMATS)}"))
    format = FORMATS[name.lower()]
    plain = kind.lower().replace("-", "_")
    if f"{plain}_m" in format.types:  # llama.cpp's short names
        plain += "_m"
    if not kind or plain in format.types:
        return Target(name.lower(), type=plain)
    if not _may_be_recipe(kind):
        types = f"types: {', '.join(format.types)}; or a recipe" if format.types else "behind the colon"
        raise UsageError(
            f"--to {text}: {name} has no type {kind!r}, and it is no recipe",
            hint=_hint(_near(plain, format.types), f"{types}: w8, w5, w4-g128, w4-best, mix:1%"),
        )
    return Target(name.lower(), recipe=kind)


def _near(word: str, known: Iterable[str]) -> list[str]:
    """The nearest of the known words, if it is near; of several the first."""
    like = {one: difflib.SequenceMatcher(None, one, word.lower()).ratio() for one in known}
    best = max(like, key=like.__getitem__, default="")
    return [best] if like.get(best, 0.0) >= 0.5 else []


def _hint(near: Sequence[str], known: str) -> str:
    return f"did you mean {near[0]}? {known}" if near else known


def _may_be_recipe(kind: str) -> bool:
    """Whether it is a recipe's name, or may be a file of one: files are read when the model is packed."""
    if kind.startswith("mix:") or Path(kind).suffix in (".yaml", ".yml") or Path(kind).is_file():
        return True
    try:
        Recipe.parse(kind)
    except UsageError:
        return False
    return True


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
        to: a key of `FORMATS`, or `FORMAT:TYPE` with a type that the format rounds weights to.
        out: the file or folder; None: in the working folder, by the artifact's name.
        force: replace what is there, in one step.
        progress: called with (done, total) tensors.
        said: called with what is being done.

    Raises:
        UsageError: an unknown format, no artifact, or a model the format cannot carry.
        MachineError: a package that writes the format is not installed.
        ArtifactError, TokenizerError: the artifact is damaged, or its tokenizer fits no word of the format.
        DiskError: something is there and not `force`; full, read-only or forbidden disk.
    """
    wanted = target(to)
    if not is_artifact(ref):
        raise UsageError(f"{ref} is no artifact", hint=f"hasten convert {ref} --to {to}")
    if wanted.recipe:
        source = made_from(ref).get("ref", "SOURCE")
        raise UsageError(
            f"{ref} is an artifact, packed already; it cannot become {wanted.recipe!r}",
            hint=f"drop :{wanted.recipe}, or convert its source: hasten convert {source} --to {to}",
        )
    path = wanted.path(Path(ref).resolve(), out)
    check_target(wanted, path, force)
    say = said or (lambda _: None)
    say("reading the artifact")
    return write_artifact_as(load_artifact(ref), wanted, path, progress, say)


def write_artifact_as(
    artifact: Artifact,
    wanted: Target,
    path: Path,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Exported:
    """Write a model that is in memory. `check_target` comes before; arguments and errors as `export`."""
    if table := next((x.layout for x in artifact.packed.linears.values() if x.layout.table), None):
        raise UsageError(
            f"{artifact.name} has weights in {table}, which no exporter writes",
            hint="make one of integers first: hasten compress MODEL --recipe w4 --out NAME.hasten",
        )
    say(f"checking what {wanted.name} can carry")
    module, _, name = wanted.format.place.partition(":")
    writer: Any = getattr(import_module(module), name) if name else import_module(module)
    plan = writer.plan(artifact, wanted.type) if wanted.type else writer.plan(artifact)
    say(f"writing {path}")
    written: Exported = writer.write(plan, path, progress or (lambda done, total: None))
    if artifact.packed.recipe.kv != "int8":
        return written
    note = "the recipe keeps keys and values in int8, which a file does not say: set it in the other engine"
    return replace(written, notes=(*written.notes, note))


def check_target(wanted: Target, path: Path, force: bool) -> None:
    """Before any work: what writes the format is installed, and the place may be written to.

    Raises:
        UsageError, MachineError, DiskError: as `export`.
    """
    to, format = wanted.name, wanted.format
    if format.package and find_spec(format.package) is None:
        raise MachineError(
            f"--to {to} needs the package {format.package}", hint=f"pip install {format.package}"
        )
    is_file = bool(format.suffix)
    if is_file and path.is_dir():
        raise UsageError(f"{path} is a folder; {to} is one file", hint=f"--out {path}/MODEL{format.suffix}")
    if not is_file and path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; {to} is a folder", hint="choose another --out")
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

    @classmethod
    def of(
        cls,
        format: str,
        path: Path,
        kinds: Sequence[str],
        notes: Sequence[str],
        rounding: Sequence[Rounding] = (),
    ) -> Exported:
        """The record of a written file or folder; `kinds` are the stored types of its matrices."""
        size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
        carried = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        return cls(format, path, size, carried, tuple(rounding), tuple(notes))

    @property
    def is_exact(self) -> bool:
        return all(one.relative_error == 0 for one in self.rounding)


MARKER = "config.json"
"""A folder without it is no model, and is not replaced."""


def write_companions(folder: Path, artifact: Artifact, values: Mapping[str, Any]) -> None:
    """What lies beside the weights in a folder: config.json (`values`), generation_config.json, tokenizer.

    Raises:
        DiskError: full, read-only or forbidden disk.
    """
    write_json(folder / MARKER, dict(values))
    ends = list(artifact.tokenizer.eos_ids) or None
    generation = {"eos_token_id": ends, "bos_token_id": artifact.tokenizer.bos_id}
    write_json(folder / "generation_config.json", generation)
    artifact.tokenizer.save(folder)
    settings = folder / "tokenizer_config.json"
    kept = {name: value for name, value in json.loads(read_file(settings)).items() if name != "hasten"}
    write_json(settings, kept)  # without what only artifacts need


def floats_of(linear: PackedLinear, first: int, count: int) -> npt.NDArray[np.float32]:
    """Rows of a matrix as they are computed with: float32 [count, cols]; `first` is a multiple of 16."""
    if linear.layout.bits != 16:
        return integers(linear, first, count).values()
    return (bf16_bits(linear, first, count).astype(np.uint32) << 16).view(np.float32)


@dataclass
class Loss:
    """What rounding values to float16 loses."""

    error: float = 0.0  # squared
    squares: float = 0.0  # of the values

    def rounded(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
        """The values in float16; the loss is added up.

        Raises:
            OverflowError: one is larger than float16's 65504.
        """
        if np.abs(values).max(initial=0.0) > 65504.0:
            raise OverflowError("a value is larger than float16's 65504")
        found = values.astype(np.float16)
        self.error += float(np.square(found.astype(np.float64) - values).sum())
        self.squares += float(np.square(values, dtype=np.float64).sum())
        return found

    @property
    def relative(self) -> float:
        return float((self.error / self.squares) ** 0.5) if self.squares else 0.0


_EMBED_SCALE_ERROR = 2**-8  # of a scale rounded to bf16; readers differ in whether they round it


def difference(ours: ModelSpec, theirs: ModelSpec) -> tuple[str, Any, Any] | None:
    """The first thing in which two models differ, by its place in the tree, with both values; else None.

    Every field is compared; rotation as the frequencies it gives, the scale of scores and windows as what
    they do. Begin and end tokens are left out: they go with the tokenizer.
    """
    mine, other = _meaning(ours), _meaning(theirs)
    for name in {**mine, **other}:
        tolerance = _EMBED_SCALE_ERROR if name == "embedding.scale" else 1e-5
        if not _same(mine.get(name), other.get(name), tolerance):
            return name, mine.get(name), other.get(name)
    return None


def _meaning(spec: ModelSpec) -> dict[str, Any]:
    def plain(block: Block) -> Block:
        mixer = block.mixer
        window = mixer.window if mixer.window is not None and mixer.window < spec.context else None
        return replace(block, mixer=replace(mixer, window=window, scale=mixer.score_scale))

    known = dict(_leaves(spec.with_blocks(plain), "", spec.context))
    return {name: value for name, value in known.items() if name not in ("bos_token_id", "eos_token_ids")}


def _leaves(value: Any, name: str, context: int) -> Iterator[tuple[str, Any]]:
    """(place, value) of all that is in a tree of dataclasses, tuples and plain values."""
    if isinstance(value, Rotary):
        yield from _turns(value, name, context)
    if is_dataclass(value):
        replaced = ("theta", "scaling") if isinstance(value, Rotary) else ()
        inside = [(one.name, getattr(value, one.name)) for one in fields(value) if one.name not in replaced]
    elif isinstance(value, tuple) and any(is_dataclass(one) for one in value):
        inside = [(str(place), one) for place, one in enumerate(value)]
    else:
        yield name, value
        return
    for place, one in inside:
        yield from _leaves(one, f"{name}.{place}" if name else place, context)


def _turns(rotary: Rotary, name: str, context: int) -> Iterator[tuple[str, Any]]:
    """What a rotation does to short texts and to those of four contexts, whatever words say it."""
    for kind, length in (("", None), (" of long texts", 4 * context)):
        frequencies, scale = rope.frequencies(rotary, context, length)
        yield f"{name}: rope frequencies{kind}", frequencies
        yield f"{name}: rope scale{kind}", scale
    yield f"{name}: rope threshold", rope.long_threshold(rotary, context)


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=0))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=tolerance)
    return type(a) is type(b) and bool(a == b)
