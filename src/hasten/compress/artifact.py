"""`NAME.hasten/`: a packed model on disk, ready to map and run.

    plan.json             everything that is known about it; `artifact` lists the files and checksums
    config.json           the ModelConfig
    weights.safetensors   matrices as uint8 in the layout of native/layout.h, norms and biases as float32;
                          every tensor starts on 64 bytes
    tokenizer.json ...    what Tokenizer.save writes
    report.html           written by `hasten optimize` and `hasten compress`; nobody reads it back

The folder appears whole or not at all. Reading verifies every checksum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO, TypeVar, get_type_hints

import numpy as np
import numpy.typing as npt

from hasten import _native
from hasten.cache import new_folder, write_atomic, write_json
from hasten.compress.pack import PIECE_BYTES, PackedLinear, PackedModel, checksum_of, packed_bytes
from hasten.core import SCHEMA_VERSION, Layout, ModelConfig, Recipe, as_json
from hasten.errors import ArtifactError, HastenError, UsageError
from hasten.models.config_check import checked
from hasten.models.parameters import parameter_shapes, present_biases
from hasten.models.source import Source, sha256_of
from hasten.models.tokenizer import Tokenizer

LAYOUT_VERSION = 1
"""Raised whenever native/layout.h changes what stored bytes mean."""

_PLAN = "plan.json"
_WEIGHTS = "weights.safetensors"
_ALIGN = 64
_READERS = 4  # threads that read weights
_AGAIN = "make it again: hasten optimize MODEL --out DIR"

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read and verified."""

    name: str
    folder: Path
    packed: PackedModel
    tokenizer: Tokenizer
    plan: dict[str, Any]


def is_artifact(ref: str | Path) -> bool:
    """Whether a reference is meant as an artifact folder: it ends in .hasten or holds a plan."""
    path = Path(ref)
    return path.suffix == ".hasten" or (path / _PLAN).is_file()


def save(
    folder: str | Path,
    packed: PackedModel,
    source: Source,
    plan: Mapping[str, Any],
    extra: Mapping[str, bytes] | None = None,
    threads: int | None = None,
) -> Path:
    """Write an artifact; one that is there already is replaced in one step, and survives any failure.

    Args:
        folder: where; by convention NAME.hasten.
        packed: the model.
        source: where it came from: its tokenizer and the digests of its files go along.
        plan: what is known about the choice; written into plan.json beside what reading needs.
        extra: more files by name (report.html).
        threads: for the checksums; None uses the cores this process may use.

    Raises:
        DiskError: full, read-only or forbidden disk; or a folder that is no artifact stands there.
    """
    count = _native.usable_cores() if threads is None else threads
    with new_folder(folder, marker=_PLAN) as fresh:
        write_json(fresh / "config.json", as_json(packed.config))
        write_atomic(fresh / _WEIGHTS, _weights_writer(packed))
        source.tokenizer().save(fresh)
        for name, data in (extra or {}).items():
            write_atomic(fresh / name, data)
        files = {
            p.name: _fingerprint(p, count) for p in sorted(fresh.iterdir()) if p.name not in (extra or {})
        }
        sources = [{"path": f.path.name, "bytes": f.bytes, "sha256": sha256_of(f)} for f in source.files]
        record = {
            **plan,
            "schema_version": SCHEMA_VERSION,
            "source": {"name": source.name, "files": sources},
            "recipe": _recipe_json(packed),
            "artifact": {
                "layout_version": LAYOUT_VERSION,
                "piece_bytes": PIECE_BYTES,
                "files": files,
                "tensors": {name: checksum_of(linear, count) for name, linear in packed.linears.items()},
            },
        }
        write_json(fresh / _PLAN, record)
    return Path(folder)


def _recipe_json(packed: PackedModel) -> dict[str, Any]:
    return {
        "name": packed.recipe.name,
        "kv": packed.recipe.kv,
        "bits_per_weight": packed.bits_per_weight,
        "layers": {name: as_json(linear.layout) for name, linear in packed.linears.items()},
    }


def _fingerprint(path: Path, threads: int) -> dict[str, Any]:
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    sums = _native.checksums(np.asarray(data), PIECE_BYTES, threads)
    return {"bytes": int(data.size), "xxh64": [f"{value:016x}" for value in sums]}


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


def load_artifact(folder: str | Path) -> Artifact:
    """Read and verify an artifact. Weights go to huge pages; nothing of them is converted.

    Raises:
        ArtifactError: no artifact there, another version, a file missing, cut short or with a wrong checksum.
    """
    path = Path(folder)
    plan = read_plan(path)
    weights = _verified(path, plan)
    config = _config(path / "config.json")
    packed = _packed(path, plan, config, weights)
    source = plan.get("source")
    name = str(source["name"]) if isinstance(source, dict) and "name" in source else path.stem
    return Artifact(name, path, packed, Tokenizer.load(path), plan)


def verify_files(folder: str | Path) -> None:
    """Read every file of an artifact and compare its checksum.

    Raises:
        ArtifactError: as `load_artifact`.
    """
    path = Path(folder)
    _verified(path, read_plan(path))


def read_plan(path: Path) -> dict[str, Any]:
    """plan.json of an artifact; no other file is looked at.

    Raises:
        ArtifactError: no artifact there, or one of another version.
    """
    if not path.exists():
        raise ArtifactError(
            f"there is no artifact at {path}", hint=f"make one: hasten optimize MODEL --out {path}"
        )
    if not (path / _PLAN).is_file():
        raise ArtifactError(f"{path} is no artifact: it has no {_PLAN}", hint=_AGAIN)
    try:
        plan = json.loads((path / _PLAN).read_bytes())
    except (OSError, ValueError, RecursionError) as wrong:
        raise ArtifactError(f"{path / _PLAN} cannot be read: {wrong}", hint=_AGAIN) from None
    stored = plan.get("artifact") if isinstance(plan, dict) else None
    if not isinstance(stored, dict) or not isinstance(stored.get("files"), dict):
        raise ArtifactError(f"{path / _PLAN} does not describe an artifact", hint=_AGAIN)
    for key, mine in (("schema_version", SCHEMA_VERSION), ("layout_version", LAYOUT_VERSION)):
        found = plan.get(key) if key == "schema_version" else stored.get(key)
        if found != mine:
            raise ArtifactError(f"{path} has {key} {found}, this program reads {mine}", hint=_AGAIN)
    return dict(plan)


def _verified(path: Path, plan: dict[str, Any]) -> Bytes:
    """Check every file's size and checksum; gives the weights file's bytes."""
    weights = None
    for name, record in plan["artifact"]["files"].items():
        file = path / name
        if (
            Path(name).name != name
            or not isinstance(record, dict)
            or not isinstance(record.get("xxh64"), list)
        ):
            raise ArtifactError(f"{path / _PLAN} does not describe the file {name!r}", hint=_AGAIN)
        if not file.is_file():
            raise ArtifactError(f"{path} lacks {name}", hint=_AGAIN)
        size = file.stat().st_size
        if size != record.get("bytes"):
            raise ArtifactError(f"{file} has {size} bytes, {record.get('bytes')} were written", hint=_AGAIN)
        data = _native.allocate(size) if name == _WEIGHTS else np.zeros(size, np.uint8)
        sums = _read(file, data)
        if sums != record["xxh64"]:
            bad = next((i for i, (a, b) in enumerate(zip(sums, record["xxh64"], strict=False)) if a != b), 0)
            raise ArtifactError(
                f"{file} is damaged: its checksum differs in the 4 MB from byte {bad * PIECE_BYTES}",
                hint=_AGAIN,
            )
        if name == _WEIGHTS:
            weights = data
    if weights is None:
        raise ArtifactError(f"{path} lists no {_WEIGHTS}", hint=_AGAIN)
    return weights


def _read(file: Path, data: Bytes) -> list[str]:
    """Fill `data` from a file; the checksum of every piece, computed while the piece is still in the cache.

    Threads take piece after piece: a single one copies at half the speed of the memory.
    """
    sums = [""] * -(-data.size // PIECE_BYTES)
    pieces = iter(range(len(sums)))  # `next` is one step of the interpreter: no lock is needed
    wrong: list[OSError] = []
    stop = Event()

    def work(ended: Event) -> None:
        try:
            with file.open("rb", buffering=0) as handle:
                for i in pieces:
                    if stop.is_set():
                        return
                    part = data[i * PIECE_BYTES : (i + 1) * PIECE_BYTES]
                    handle.seek(i * PIECE_BYTES)
                    view, done = part.data, 0
                    while done < part.size and (got := handle.readinto(view[done:])):
                        done += got
                    sums[i] = f"{_native.checksums(part, PIECE_BYTES)[0]:016x}"
        except OSError as error:
            wrong.append(error)
        finally:
            ended.set()

    ends = [Event() for _ in range(min(_native.usable_cores(), _READERS, len(sums)) - 1)]
    others = [Thread(target=work, args=(ended,)) for ended in ends]
    try:
        for thread in others:
            thread.start()
        work(Event())
        for ended in ends:
            ended.wait()
    except BaseException:  # Ctrl-C: nobody may still read into `data` when this is left
        stop.set()
        _wait([ended for thread, ended in zip(others, ends, strict=True) if thread.ident is not None])
        raise
    if wrong:
        raise ArtifactError(f"{file} cannot be read: {wrong[0].strerror}", hint=_AGAIN) from None
    return sums


def _wait(events: list[Event]) -> None:
    """Wait for all, whatever comes in between.

    Thread.join would not do: CPython 3.11 takes a thread for dead once that was interrupted.
    """
    for event in events:
        while not event.is_set():
            with suppress(KeyboardInterrupt):
                event.wait()


def _packed(path: Path, plan: dict[str, Any], config: ModelConfig, weights: Bytes) -> PackedModel:
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
        layouts = {name: Layout(**value) for name, value in plan["recipe"]["layers"].items()}
        shapes = parameter_shapes(config, present_biases(parts))
        known = plan["artifact"].get("tensors", {})  # artifacts made before 0.2 have none
        linears = {
            name: _linear(layout, shapes[name], parts.pop(name), known.get(name))
            for name, layout in layouts.items()
        }
        vectors = {name: data.view(np.float32) for name, data in parts.items()}
        recipe = Recipe(str(plan["recipe"]["name"]), None, None, layouts, plan["recipe"]["kv"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as wrong:
        raise ArtifactError(f"{path} contradicts itself: {wrong!r}", hint=_AGAIN) from None
    _check_sizes(path, linears, vectors, shapes)
    if recipe.kv not in ("bf16", "int8"):
        raise ArtifactError(f"{path} wants a KV cache of {recipe.kv!r}", hint=_AGAIN)
    return PackedModel(config, recipe, linears, vectors)


def _linear(layout: Layout, shape: tuple[int, ...], data: Bytes, checksum: str | None) -> PackedLinear:
    rows, cols = shape
    if checksum is not None and not isinstance(checksum, str):
        raise TypeError(f"a checksum is {checksum!r}")
    return PackedLinear(layout, rows, cols, data, checksum=checksum)


def _check_sizes(
    path: Path,
    linears: Mapping[str, PackedLinear],
    vectors: Mapping[str, npt.NDArray[np.float32]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for name, linear in linears.items():
        if linear.bytes != packed_bytes(linear.rows, linear.cols, linear.layout):
            raise ArtifactError(
                f"{path}: {name} has {linear.bytes} bytes, not what its layout needs", hint=_AGAIN
            )
    wrong = {name for name, shape in shapes.items() if len(shape) == 2} ^ set(linears)
    wrong |= {name for name, shape in shapes.items() if len(shape) == 1} ^ set(vectors)
    wrong |= {name for name in set(vectors) & set(shapes) if vectors[name].shape != shapes[name]}
    if wrong:
        raise ArtifactError(f"{path}: {min(wrong)} is missing, extra or of a wrong size", hint=_AGAIN)


def _config(file: Path) -> ModelConfig:
    try:
        return checked(_from_json(json.loads(file.read_bytes()), ModelConfig), file.name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, HastenError) as wrong:
        raise ArtifactError(f"{file} cannot be read: {wrong}", hint=_AGAIN) from None


def _from_json(value: dict[str, Any], kind: type[T]) -> T:
    """A frozen dataclass back from as_json: lists become tuples, nested dataclasses are built."""
    assert is_dataclass(kind)
    hints = get_type_hints(kind)
    made: dict[str, Any] = {}
    for f in fields(kind):
        given, hint = value[f.name], hints[f.name]
        if isinstance(given, dict) and isinstance(hint, type) and is_dataclass(hint):
            given = _from_json(given, hint)
        made[f.name] = tuple(given) if isinstance(given, list) else given
    return kind(**made)
