"""Where a model lies: from what the user calls it to files, without opening any."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from hasten.cache.reading import is_there
from hasten.models.source import Source, SourceFile

DEMO = "demo"
_READ = (".safetensors", ".json", ".jinja", ".model", ".gguf")


@dataclass(frozen=True)
class Place:
    """A folder of safetensors or a GGUF file. It need not be there: opening it says what is wrong."""

    name: str  # of the model
    path: Path
    known: SourceFile | None = None  # the file with its digest, where that is known

    def files(self) -> tuple[Path, ...]:
        """Every file that opening may read, in order of their names; none where there is nothing to open."""
        if not self.path.is_dir():
            return (self.path,)
        templates = (self.path / "additional_chat_templates").glob("*.jinja")
        beside = (p for p in self.path.iterdir() if p.suffix in _READ and p.is_file())
        return tuple(sorted([*beside, *templates]))


def locate(ref: str | Path) -> Place:
    """Find a model; what is on disk comes first, a hub id is downloaded.

    Args:
        ref: as for `open_model`.

    Raises:
        ModelError: a hub id that does not exist or cannot be had, or a demo that cannot be made.
        DiskError: the demo cannot be written to the cache.
    """
    path = Path(ref).expanduser()
    if str(ref) == DEMO and not path.exists():
        from hasten.models.demo import demo_file

        file = demo_file()
        return Place(DEMO, file.path, file)
    if path.exists() or (path.suffix == ".gguf" and not _is_hub_file(str(ref))):
        return _place(path)
    from hasten.models.hub import download

    return Place(str(ref), _place(download(str(ref))).path)


def ref_of(source: Source) -> str:
    """What `locate` finds an opened model by again, from any folder: "demo", a hub id or an absolute path."""
    first = source.files[0] if source.files else None
    if first is None or "/" in source.name:
        return source.name
    if source.name == DEMO:
        from hasten.models.demo import SHA256

        if first.sha256 == SHA256:
            return DEMO
    path = first.path.absolute()
    return str(path if path.suffix == ".gguf" else path.parent)


def file_name_of(ref: str | Path) -> str:
    """What files that are made from a model are called: the last part of its name, with all its dots.

    Llama-3.2-1B stays so: only `.gguf` is the ending of a file.
    """
    path = Path(ref).expanduser()
    name = path.resolve().name if path.exists() else path.name
    name = name[: -len(".gguf")] if name.lower().endswith(".gguf") else name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _place(path: Path) -> Place:
    """The model at a path that is no hub id; a folder may hold nothing but one GGUF file."""
    if not path.is_dir():
        return Place(path.stem, path)
    if not is_there(path / "config.json"):
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Place(ggufs[0].stem, ggufs[0])
    return Place(path.resolve().name, path)


def _is_hub_file(ref: str) -> bool:
    """owner/name/file.gguf"""
    return ref.count("/") == 2 and not ref.startswith(("/", ".", "~"))
