"""`NAME.hasten/`: a packed model on disk, ready to map and run.

    plan.json             everything that is known about it; `artifact` lists the files and checksums
    config.json           the ModelSpec, but for what is as by default
    weights.safetensors   matrices as uint8 in the layout of native/layout.h, norms and biases as float32;
                          every tensor starts on 64 bytes
    tokenizer.json ...    what Tokenizer.save writes
    report.html           written by `hasten optimize` and `hasten compress`; nobody reads it back

The folder appears whole or not at all. Reading verifies every checksum. `plan` says how an artifact of
another version is met. `hasten.models.artifact` makes a model of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import new_folder, read_json, write_atomic, write_json
from hasten.cache.reading import is_there, map_array, read_file
from hasten.core import ModelSpec, Recipe
from hasten.errors import ArtifactError
from hasten.machine.cores import usable_cores
from hasten.machine.memory import memory_room
from hasten.weights.packed import PIECE_BYTES, PackedLinear, PackedModel, checksum_of
from hasten.weights.plan import (
    AGAIN,
    CONFIG,
    LAYOUT_VERSION,
    PLAN_VERSION,
    WEIGHTS,
    Description,
    config_from,
    config_json,
    described,
    seal,
)
from hasten.weights.tensors import Bytes

_PLAN = "plan.json"
_ALIGN = 64


@dataclass(frozen=True)
class Stored:
    """An artifact whose files were read and verified; what they mean is not looked at yet."""

    folder: Path
    plan: Mapping[str, Any]
    description: Description
    config: ModelSpec  # its types are right; its numbers were not compared with each other
    parts: Mapping[str, Bytes]  # tensors by canonical name

    def packed(self, config: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> PackedModel:
        """The model.

        Args:
            config: its configuration, checked.
            shapes: of every parameter it must have.

        Raises:
            ArtifactError: the tensors are not those.
        """
        recipe, known = self.description.recipe, self.description.artifact.tensors
        parts = dict(self.parts)
        try:
            linears = {
                name: PackedLinear(layout, *_two(shapes[name]), parts.pop(name), checksum=known.get(name))
                for name, layout in recipe.layers.items()
            }
            vectors = {name: data.view(np.float32).copy() for name, data in parts.items()}
        except (KeyError, ValueError) as wrong:
            raise contradiction(self.folder, wrong) from None
        _check_sizes(self.folder, linears, vectors, shapes)
        asked = Recipe(recipe.name, None, None, recipe.layers, recipe.kv)
        return PackedModel(config, asked, linears, vectors)


def contradiction(folder: Path, wrong: Exception) -> ArtifactError:
    """The error of an artifact whose verified files do not fit each other."""
    return ArtifactError(f"{folder} contradicts itself: {wrong!r}", hint=AGAIN)


def is_artifact(ref: str | Path) -> bool:
    """Whether a reference is meant as an artifact folder: it ends in .hasten or holds a plan."""
    path = Path(ref)
    return path.suffix == ".hasten" or (path / _PLAN).is_file()


def made_from(folder: str | Path) -> Mapping[str, Any]:
    """`source` of an artifact: `ref`, by which the model is found again, `name` and `files`.

    Empty where it cannot be read; older artifacts have no `ref`.
    """
    plan = read_json(Path(folder) / _PLAN)
    origin = plan.get("source") if isinstance(plan, dict) else None
    return origin if isinstance(origin, dict) else {}


def write_artifact(
    folder: str | Path,
    packed: PackedModel,
    origin: Mapping[str, Any],
    plan: Mapping[str, Any],
    put_tokenizer: Callable[[Path], object],
    extra: Mapping[str, bytes],
    threads: int | None = None,
) -> Path:
    """Write an artifact; one that is there already is replaced in one step, and survives any failure.

    Args:
        folder: where; by convention NAME.hasten.
        packed: the model.
        origin: `source` in plan.json: what it was made from.
        plan: what is known about the choice; written into plan.json beside what reading needs.
        put_tokenizer: writes the tokenizer's files into the folder it is given.
        extra: more files by name (report.html).
        threads: for the checksums; None uses the cores this process may use.

    Raises:
        DiskError: full, read-only or forbidden disk; or a folder that is no artifact stands there.
    """
    count = usable_cores() if threads is None else threads
    with new_folder(folder, marker=_PLAN) as fresh:
        write_json(fresh / CONFIG, config_json(packed.config))
        write_atomic(fresh / WEIGHTS, _weights_writer(packed))
        put_tokenizer(fresh)
        files = {p.name: _fingerprint(p, count) for p in sorted(fresh.iterdir())}
        for name, data in extra.items():
            write_atomic(fresh / name, data)
        record: dict[str, Any] = {
            **plan,
            "schema_version": PLAN_VERSION,
            "source": origin,
            "recipe": _recipe_json(packed),
            "artifact": {
                "layout_version": LAYOUT_VERSION,
                "piece_bytes": PIECE_BYTES,
                "files": files,
                "tensors": {name: checksum_of(linear, count) for name, linear in packed.linears.items()},
            },
        }
        record["artifact"]["sha256"] = seal(record)
        write_json(fresh / _PLAN, record)
    return Path(folder)


def _recipe_json(packed: PackedModel) -> dict[str, Any]:
    linears = packed.linears
    kinds = sorted({linear.layout for linear in linears.values()}, key=str)
    return {
        "name": packed.recipe.name,
        "kv": packed.recipe.kv,
        "bits_per_weight": packed.bits_per_weight,
        "formats": {kind.name: kind.version for kind in kinds},
        "layers": {name: linear.layout.name for name, linear in linears.items()},
    }


def _fingerprint(path: Path, threads: int) -> dict[str, Any]:
    data = np.asarray(map_array(path))
    return {"bytes": int(data.size), "xxh64": _sums(data, threads)}


def _weights_writer(packed: PackedModel) -> Callable[[BinaryIO], None]:
    """A safetensors file whose tensors all start on 64 bytes: each is padded with zeros to that."""
    tensors: dict[str, tuple[str, int, Bytes]] = {}  # name -> (dtype, item size, bytes)
    for name, linear in packed.linears.items():
        tensors[name] = ("U8", 1, linear.data)
    for name, values in packed.vectors.items():
        tensors[name] = ("F32", 4, np.ascontiguousarray(values, np.float32).view(np.uint8))
    header: dict[str, Any] = {
        "__metadata__": {"sizes": json.dumps({n: int(d.size) for n, (_, _, d) in tensors.items()})}
    }
    at = 0
    for name, (dtype, item, data) in tensors.items():
        end = at + -(-data.size // _ALIGN) * _ALIGN
        header[name] = {"dtype": dtype, "shape": [(end - at) // item], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, data in tensors.values():
            file.write(data.data)
            file.write(bytes(-data.size % _ALIGN))

    return write


def read_artifact(folder: str | Path) -> Stored:
    """Map and verify an artifact's files; nothing of them is copied or converted.

    Raises:
        ArtifactError: no artifact there, another version, a file missing, cut short or with a wrong checksum.
    """
    path = Path(folder)
    plan = read_plan(path)
    description = described(plan, str(path / _PLAN), PIECE_BYTES)
    data = _verified(path, description)
    parts = _parts(path, data[WEIGHTS])
    config = config_from(data[CONFIG].tobytes(), str(path / CONFIG), parts)
    return Stored(path, plan, description, config, parts)


def verify_files(folder: str | Path) -> None:
    """Read every file of an artifact and compare its checksum.

    Raises:
        ArtifactError: as `load_artifact`.
    """
    path = Path(folder)
    _verified(path, described(read_plan(path), str(path / _PLAN), PIECE_BYTES))


def read_plan(path: Path) -> dict[str, Any]:
    """plan.json of an artifact; no other file is looked at.

    Raises:
        ArtifactError: no artifact there, or one of another version.
    """
    if not path.exists():
        raise ArtifactError(
            f"there is no artifact at {path}", hint=f"make one: hasten optimize MODEL --out {path}"
        )
    if not is_there(path / _PLAN):
        raise ArtifactError(f"{path} is no artifact: it has no {_PLAN}", hint=AGAIN)
    try:
        plan = json.loads(read_file(path / _PLAN))
    except OSError as wrong:
        raise ArtifactError(f"{path / _PLAN} cannot be read: {wrong.strerror}", hint=AGAIN) from None
    except (ValueError, RecursionError) as wrong:
        raise ArtifactError(f"{path / _PLAN} cannot be read: {wrong}", hint=AGAIN) from None
    described(plan, str(path / _PLAN), PIECE_BYTES)
    return dict(plan)


def _verified(path: Path, description: Description) -> dict[str, Bytes]:
    """Check every file's size and checksum; gives the bytes of the files by name, mapped and read-only.

    Weights stay mapped while the model runs: processes that run one artifact share one copy, and starting
    copies nothing. `save` and the store replace a file by another and never change one in place.
    """
    found: dict[str, Bytes] = {}
    for name, record in description.artifact.files.items():
        file = path / name
        if not is_there(file):
            raise ArtifactError(f"{path} lacks {name}", hint=AGAIN)
        try:
            data = np.asarray(map_array(file))
        except OSError as wrong:
            raise ArtifactError(f"{file} cannot be read: {wrong.strerror}", hint=AGAIN) from None
        if data.size != record.bytes:
            raise ArtifactError(f"{file} has {data.size} bytes, {record.bytes} were written", hint=AGAIN)
        if name == WEIGHTS:
            memory_room().require(data.size, str(file))
        sums = _sums(data, usable_cores())
        bad = next((i for i, (a, b) in enumerate(zip(sums, record.xxh64, strict=True)) if a != b), None)
        if bad is not None:
            raise ArtifactError(
                f"{file} is damaged: its checksum differs in the 4 MB from byte {bad * PIECE_BYTES}",
                hint=AGAIN,
            )
        found[name] = data
    return found


def _sums(data: Bytes, threads: int) -> list[str]:
    """The checksum of every piece of a file."""
    return [f"{value:016x}" for value in _native.checksums(data, PIECE_BYTES, threads)]


def _parts(path: Path, weights: Bytes) -> dict[str, Bytes]:
    """The tensors in the bytes of a weights file, without their padding."""
    try:
        start = 8 + int.from_bytes(weights[:8].tobytes(), "little")
        header = json.loads(weights[8:start].tobytes())
        sizes = json.loads(header.pop("__metadata__")["sizes"])
        parts = {}
        for name, entry in header.items():
            first, size = int(entry["data_offsets"][0]), int(sizes[name])
            if min(first, size) < 0:
                raise ValueError(f"{name} starts at {first} and has {size} bytes")
            parts[name] = weights[start + first : start + first + size]
        return parts
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as wrong:
        raise contradiction(path, wrong) from None


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a matrix; a ValueError for a norm that is named as one."""
    rows, cols = shape
    return rows, cols


def _check_sizes(
    path: Path,
    linears: Mapping[str, PackedLinear],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for name, linear in linears.items():
        if linear.bytes != linear.layout.bytes_of(linear.rows, linear.cols):
            raise ArtifactError(
                f"{path}: {name} has {linear.bytes} bytes, not what its layout needs", hint=AGAIN
            )
    wrong = {name for name, shape in shapes.items() if len(shape) == 2} ^ set(linears)
    wrong |= {name for name, shape in shapes.items() if len(shape) == 1} ^ set(vectors)
    wrong |= {name for name in set(vectors) & set(shapes) if vectors[name].shape != shapes[name]}
    if wrong:
        raise ArtifactError(f"{path}: {min(wrong)} is missing, extra or of a wrong size", hint=AGAIN)
