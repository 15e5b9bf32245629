"""A packed model and its tokenizer, from and to an artifact or the store of packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hasten.cache.store import Deferred
from hasten.core import Recipe
from hasten.errors import ArtifactError, DiskError, HastenError
from hasten.models.families import checked
from hasten.models.source import Place, Source, ref_of, sha256_of
from hasten.models.tokenizer import Tokenizer
from hasten.weights.artifact import made_from, read_artifact, write_artifact
from hasten.weights.packed import PackedModel
from hasten.weights.packed_store import Origin, PackedStore, warn_once
from hasten.weights.plan import AGAIN, CONFIG


@dataclass(frozen=True)
class Artifact:
    """An artifact that was read and verified."""

    name: str
    folder: Path
    packed: PackedModel
    tokenizer: Tokenizer
    plan: dict[str, Any]


def load_artifact(folder: str | Path) -> Artifact:
    """Read and verify an artifact.

    Raises:
        ArtifactError: no artifact there, another version, a file missing, cut short or with a wrong checksum.
    """
    stored = read_artifact(folder)
    path, plan = stored.folder, dict(stored.plan)
    try:
        config = checked(stored.config, CONFIG)
    except HastenError as wrong:
        raise ArtifactError(f"{path / CONFIG} cannot be read: {wrong}", hint=AGAIN) from None
    packed = stored.packed(config, config.parameter_shapes())
    source = plan.get("source")
    name = str(source["name"]) if isinstance(source, dict) and "name" in source else path.stem
    return Artifact(name, path, packed, Tokenizer.load(path), plan)


def save(
    folder: str | Path,
    packed: PackedModel,
    source: Source,
    plan: Mapping[str, Any],
    extra: Mapping[str, bytes] | None = None,
    threads: int | None = None,
) -> Path:
    """Write an artifact with its tokenizer, its source's place and the digests of its source's files.

    Args:
        folder, packed, plan, extra, threads: as for `write_artifact`.
        source: what the model was made from.

    Raises:
        DiskError: as `write_artifact`.
    """
    origin = {
        "name": source.name,
        "ref": ref_of(source),
        "files": [{"path": f.path.name, "bytes": f.bytes, "sha256": sha256_of(f)} for f in source.files],
    }
    return write_artifact(folder, packed, origin, plan, source.tokenizer().save, extra or {}, threads)


def refuse_other_model(folder: str | Path, source: Source, replace_by: str) -> None:
    """Say it where an artifact of another model stands: its name may be equal, or a part of it.

    The same model has the same place, or files of the same content. Files are read only where their sizes are
    equal and their place is not. What cannot be told, as of a damaged artifact, is not refused.

    Args:
        folder: where one may stand.
        source: the model that shall be written there.
        replace_by: what the hint says to replace it nevertheless.

    Raises:
        DiskError: it is another model's.
    """
    origin = made_from(folder)
    if not origin or origin.get("ref") == ref_of(source):
        return
    try:
        theirs = {str(one["path"]): (one["bytes"], one["sha256"]) for one in origin["files"]}
    except (KeyError, TypeError):
        return
    ours = {file.path.name: file for file in source.files}
    sizes = {name: file.bytes for name, file in ours.items()}
    are_alike = sizes == {name: size for name, (size, _) in theirs.items()}
    if are_alike and all(theirs[name][1] == sha256_of(file) for name, file in ours.items()):
        return
    place = origin.get("ref") or origin.get("name")
    raise DiskError(
        f"{folder} is an artifact of another model: {place}; this is {ref_of(source)}",
        hint=f"choose another name with --out DIR, or replace it: {replace_by}",
    )


def find_packed(store: PackedStore, place: Place, recipe: Recipe) -> tuple[Artifact | None, Origin | None]:
    """What the store has of a model by a recipe, and the origin to keep it under where that is nothing."""
    found, origin = store.find(place.files, recipe, load_artifact)
    if found is None:
        return None, origin
    return replace(found, packed=replace(found.packed, recipe=recipe)), origin


def keep_packed(
    store: PackedStore,
    origin: Origin,
    recipe: Recipe,
    packed: PackedModel,
    source: Source,
    *,
    made_with: Mapping[str, Any] | None = None,
    plan: Mapping[str, Any] | None = None,
) -> Path | None:
    """Keep a model in the store with its tokenizer.

    Args:
        store, origin, recipe, made_with: as for `PackedStore.keep`.
        packed: the model; `packed.recipe` may say more than `recipe`.
        source: what it was made from.
        plan: goes into plan.json.

    Returns:
        As `PackedStore.keep`.

    Raises:
        DiskError: full, read-only or forbidden disk.
    """

    def write(folder: Path, digests: Mapping[str, str]) -> dict[str, Any]:
        known = {file: digests.get(str(file.path.absolute()), file.sha256) for file in source.files}
        hashed = tuple(replace(file, sha256=sha256) for file, sha256 in known.items())
        save(folder, packed, replace(source, files=hashed), plan or {}, threads=1)
        paths = [str(file.path.absolute()) for file in source.files]
        return {"name": source.name, "recipe": packed.recipe.name, "files": paths}

    return store.keep(origin, recipe, source.name, packed.stored_bytes, write, made_with)


def keep_later(
    store: PackedStore, origin: Origin, packed: PackedModel, source: Source, owner: object
) -> Deferred:
    """Keep a model when `owner`, which runs it, is gone; see `Deferred`.

    A disk that refuses costs one warning. What is kept is the model as it is now: matrices replaced later do
    not count.
    """
    now = replace(packed, linears=dict(packed.linears), vectors=dict(packed.vectors))

    def work() -> None:
        try:
            keep_packed(store, origin, now.recipe, now, source)
        except (DiskError, OSError) as error:
            warn_once("disk", f"packed weights are not kept: {error}")

    return Deferred(work, owner)
