"""Ctrl-C at every kind of moment: exit code 130 and one line, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.core import Recipe
from hasten.models.artifact import save
from hasten.models.open import open_place
from hasten.models.source import locate
from hasten.weights.packed import pack_model

START = """
import os, signal, sys
def press():
    os.kill(os.getpid(), signal.SIGINT)
"""
END = """
from hasten.cli import main
raise SystemExit(main())
"""


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", START + script + END, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def stopped(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().startswith("stopped.") and len(done.stderr.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def artifact(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_place(locate(tiny_folder("qwen3")))
    packed = pack_model(source, Recipe.parse("w8"), 1)
    return save(tmp_path_factory.mktemp("artifact") / "tiny.hasten", packed, source, {})


DURING_IMPORT = """
wanted = sys.argv.pop()
class Presser:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            sys.meta_path.remove(self)
            press()
sys.meta_path.insert(0, Presser())
"""
MODULES = ["hasten.cli.frame", "hasten.cli.console", "typer", "hasten.cli.generate", "numpy", "hasten.models"]


@pytest.mark.parametrize("module", MODULES)
def test_while_a_module_is_imported(artifact: Path, module: str) -> None:
    stopped(run(DURING_IMPORT, "generate", str(artifact), "-p", "hi", "--raw", module))


AT_A_CALL = """
import importlib
where, name = sys.argv.pop().rsplit(":", 1)
home = importlib.import_module(where)
for part in name.split(".")[:-1]:
    home = getattr(home, part)
name = name.split(".")[-1]
real = getattr(home, name)
def pressed(*given, **named):
    press()
    return real(*given, **named)
setattr(home, name, pressed)
"""
CALLS = [
    "hasten.weights.artifact:_sums",
    "hasten.models.folder_tokenizer:_stored_fields",
    "hasten.runtime.executor:admit",
    "hasten.runtime.cpu:CpuExecutor.head",
    "hasten.runtime.executor:choose",
    "hasten.cli.console:_write",
]


@pytest.mark.parametrize("call", CALLS)
def test_while_it_works(artifact: Path, call: str) -> None:
    stopped(run(AT_A_CALL, "generate", str(artifact), "-p", "hi", "--raw", "-n", "4", call))


def test_through_exec() -> None:
    """CPython notes a KeyboardInterrupt that leaves exec() and ends by SIGINT, whatever the exit code."""
    verb = "lambda arguments: exec('press()\\nwhile True: pass', globals())"
    stopped(run(f"import hasten.cli as cli\ncli._dispatch = {verb}"))


def test_where_python_drops_exceptions() -> None:
    """An exception in __del__ or in the callback of a weak reference is printed and forgotten."""
    stopped(
        run(
            """
import hasten.cli as cli
class Held:
    def __del__(self):
        press()
        for _ in range(1000): pass
def work(arguments):
    held = Held()
    del held
    while True: pass
cli._dispatch = work
"""
        )
    )


def test_dropped_at_the_end_of_the_verb() -> None:
    """It comes again too late: the verb is done by then."""
    stopped(
        run(
            """
import hasten.cli as cli
class Held:
    def __del__(self):
        press()
        for _ in range(1000): pass
def work(arguments):
    held = Held()
    return 0
cli._dispatch = work
"""
        )
    )


def test_a_second_one_while_the_first_is_said() -> None:
    done = run(
        """
import hasten.cli as cli, hasten.cli.frame as frame
def work(arguments):
    press()
    while True: pass
def kept(verb):
    press()
    for _ in range(100000): pass
    return ""
cli._dispatch = work
frame._kept = kept
"""
    )
    stopped(done)


def test_a_library_that_drops_it_and_raises_an_error_of_its_own() -> None:
    stopped(
        run(
            """
import hasten.cli as cli
def work(arguments):
    try:
        press()
        while True: pass
    except KeyboardInterrupt:
        error = ValueError("a schema could not be built")
    raise error
cli._dispatch = work
"""
        )
    )


def test_work_that_was_put_off_is_given_up() -> None:
    done = run(
        """
import time
import hasten.cli as cli
from hasten.cache.store import Deferred
class Owner: pass
owner = Owner()
def work():
    press()
    try:
        while True: time.sleep(0.01)
    finally:
        print("tidied")
def verb(arguments):
    Deferred(work, owner)
    return 0
cli._dispatch = verb
"""
    )
    stopped(done)
    assert done.stdout == "tidied\n"


def test_a_parent_that_ignores_it_is_obeyed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", START + "press()\n" + END, "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.returncode, done.stderr) == (0, "")
