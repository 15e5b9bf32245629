"""Opening files for reading: files and nothing else, by one function; pipes where a user hands text over."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hasten
from hasten.cache import digest, read_json, reading
from hasten.cache.reading import (
    NotAFile,
    add_byte,
    is_there,
    map_array,
    open_file,
    read_array,
    read_file,
    read_stream,
    read_text,
    read_text_stream,
)

READERS: list[Callable[[Path], object]] = [open_file, read_file, read_text, read_array, map_array, digest]
PACKAGE = Path(hasten.__file__).parent


def put(kind: str, path: Path) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind, said", [("pipe", "named pipe"), ("socket", "a socket"), ("zero", "a device")])
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_what_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object], kind: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = put(kind, Path("x"))
    with pytest.raises(NotAFile) as caught:
        read(path)
    assert caught.value.strerror is not None and said in caught.value.strerror
    assert caught.value.filename == "x"
    assert read_json(path) is None  # to a cache it is a miss


@pytest.mark.parametrize("read", [*READERS, lambda path: read_stream(path, 9)])
def test_folders_and_nothing(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_what_files_hold(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for text in (b"", b"a\r\nb\rc\n\xc3\xa9"):
        path.write_bytes(text)
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(path)
        for one in (path, tmp_path / "link"):
            assert read_file(one) == text == read_array(one).tobytes() == map_array(one).tobytes()
            assert read_stream(one, len(text)) == text
            assert read_text(one) == path.read_text(encoding="utf-8")
            assert read_text_stream(one, len(text), "text", "") == read_text(one)
    assert not map_array(path).flags.writeable and map_array(path).dtype == np.uint8
    for read in (read_file, read_stream):
        with pytest.raises(OSError, match="more than 3 bytes"):
            read(path, 3)


def test_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "none")
    assert is_there(tmp_path / "link") and is_there(put("pipe", tmp_path / "pipe"))
    assert not is_there(tmp_path / "none")


def test_a_count_in_place_of_which_is_a_pipe(tmp_path: Path) -> None:
    add_byte(put("pipe", tmp_path / "pipe"))  # must not wait for a reader
    add_byte(tmp_path / "count")
    add_byte(tmp_path / "count")
    add_byte(tmp_path / "no folder" / "count")
    assert (tmp_path / "count").stat().st_size == 2


def test_a_pipe_with_a_writer(tmp_path: Path) -> None:
    """As large as no pipe's buffer, through a name and without one."""
    data = os.urandom(300_000)
    named = put("pipe", tmp_path / "pipe")
    writer = threading.Thread(target=named.write_bytes, args=(data,))
    writer.start()
    assert read_stream(named, len(data)) == data
    writer.join()
    out, into = os.pipe()
    writer = threading.Thread(target=lambda: os.fdopen(into, "wb").write(data))
    writer.start()
    try:
        assert read_stream(f"/dev/fd/{out}", len(data)) == data
    finally:
        os.close(out)
        writer.join()


def test_a_pipe_that_says_too_much(tmp_path: Path) -> None:
    out, into = os.pipe()
    os.write(into, b"1234567")
    try:
        with pytest.raises(OSError, match="more than 6 bytes"):
            read_stream(f"/dev/fd/{out}", 6)
    finally:
        os.close(out)
        os.close(into)


def test_a_pipe_that_nobody_writes_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PATIENCE_S", 0.1)
    with pytest.raises(NotAFile, match="nobody writes into"):
        read_stream(put("pipe", tmp_path / "pipe"), 9)


def test_standard_input() -> None:
    code = "from hasten.cache.reading import read_stream; print(len(read_stream('/dev/stdin', 10**6)))"
    for given, count in ((b"x" * 100_000, "100000"), (b"", "0")):
        done = subprocess.run(
            [sys.executable, "-c", code], input=given, capture_output=True, check=True, timeout=60
        )
        assert done.stdout.decode().strip() == count
    assert read_stream("/dev/null", 9) == b""
    with pytest.raises(NotAFile, match="device"):
        read_stream("/dev/zero", 9)


ALLOWED = {
    "cache/reading.py",  # this is the place
    "cache/kv_folder.py",  # looks for itself: it reads into two buffers at once
    "serve/app.py",  # files of the package
}
OTHERS = (
    "machine/",
    "bench/peers/",
    "engine/grammar_child.py",
    "quality/sandbox.py",
)  # files of /proc and /sys, or a peer wrote them; programs that import nothing of Hasten
LOADS = ("torch.load", "np.load", "json.load", "pickle.load")
OPENS = {"read_text", "read_bytes", "fromfile", "memmap", "from_file"}


def opens(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that open a file by its path for reading."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _opens(node):
            yield node.lineno, ast.unparse(node.func)


def _opens(node: ast.Call) -> bool:
    is_method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if node.args and ast.unparse(node.args[0]) == "file":
        return False  # one that is open
    if name == "open":
        return _reads(node)
    return (name in OPENS and is_method) or name == "ZipFile" or ast.unparse(node.func) in LOADS


def _reads(node: ast.Call) -> bool:
    """Of `open(...)`, `path.open(...)` and `os.open(...)`: those for reading a file."""
    of = node.func.value if isinstance(node.func, ast.Attribute) else None
    given: list[Any] = [one.value for one in node.args if isinstance(one, ast.Constant)]
    if isinstance(of, ast.Name) and of.id == "os":
        flags = ast.dump(node.args[1])
        return "O_RDONLY" in flags and ast.unparse(node.args[0]) != "folder"
    if of is None:
        return True  # the builtin
    return any(isinstance(one, str) and one.startswith("r") for one in given)


def test_every_file_is_opened_by_one_function() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in ALLOWED and not name.startswith(OTHERS):
            found += [f"{name}:{line} {what}" for line, what in opens(ast.parse(path.read_text()))]
    assert not found, f"open files through hasten.cache.reading: {found}"


@pytest.mark.parametrize(
    "code",
    [
        *("open(path)", "path.open('rb')", "path.read_text()", "path.read_bytes()", "np.memmap(path, 'u1')"),
        *("np.fromfile(path)", "Tokenizer.from_file(str(path))", "os.open(path, os.O_RDONLY)"),
        *("zipfile.ZipFile(path)", "torch.load(path)"),
    ],
)
def test_the_test_catches_what_it_is_for(code: str) -> None:
    assert list(opens(ast.parse(code)))
    assert not list(opens(ast.parse("path.open('ab'); os.open(folder, os.O_RDONLY); np.fromfile(file)")))
