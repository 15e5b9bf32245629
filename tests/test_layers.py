"""Imports go down only: errors, core < cache < ... < cli (CONTRIBUTING.md), and no files form a circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import hasten

PACKAGE = Path(hasten.__file__).parent

LAYERS = [
    {"errors", "core", "recipe", "stopping"},
    {"cache"},  # below machine, which keeps the ceilings it measured
    {"machine"},
    {"weights"},  # how numbers are stored, of no matter what model
    {"models"},
    {"quality", "speed"},  # judge whatever has hidden states and logits; predict what a shape costs
    {"export"},  # the same weights in another engine's format
    {"compress"},  # below runtime, which runs what was packed
    {"runtime"},
    {"engine"},
    {"bench"},
    {"report"},
    {"optimize"},
    {"loading"},  # `hasten.load`: opens a model, or has it made
    {"serve"},
    {"cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULE_COMPRESSION = {  # imported by none but hasten.compress.module, when it is called
    "module",
    "module_layers",
    "compressed_module",
}
LANGUAGE_MODELS = {"torch_model", "stream"} | {
    "quantise",
    "prune",
    "distil",
}  # imported when one is compressed
BELOW_ALL = {"_native"}  # the compiled module imports nothing of ours
ALLOWED = {
    ("core", "errors"),
    ("core", "recipe"),
    ("recipe", "errors"),
    ("recipe", "weights.FORMATS"),
    ("recipe", "weights.TABLE_NAMES"),
    ("recipe", "weights.Format"),
    ("core", "weights.Format"),
    ("stopping", "errors"),
    ("cli", "__all__"),
    ("cli", "_HOME"),
}  # core raises errors; recipes name formats; cli lists the names


@functools.cache
def imported(source: str, package: str) -> tuple[str, ...]:
    """Dotted names of every import of a file in `package`, inside functions too, and every `hasten.name`."""
    return tuple(_imported(ast.parse(source), package))


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            )
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hasten"
        ):
            yield f"hasten.{node.attr}"


def wrong_edges(source: str, package: str) -> list[str]:
    """Imports of a file in `package` (such as "hasten.models") that do not go down or stay inside."""
    own = package.split(".")[1]
    wrong = []
    for name in imported(source, package):
        parts = name.split(".")
        if parts[0] != "hasten":
            continue
        other = parts[1] if len(parts) > 1 else ""
        is_allowed = {(own, other), (own, ".".join(parts[1:3]))} & ALLOWED
        if other in ("", "__version__") or other in BELOW_ALL or other == own or is_allowed:
            continue
        if other not in RANK:
            wrong.append(f"{package} imports {name}: take it from the module that defines it")
        elif RANK[other] >= RANK[own]:
            place = "beside" if RANK[other] == RANK[own] else "below"
            wrong.append(f"{package} imports {name}: {own} lies {place} {other}")
    return wrong


def files() -> Iterator[tuple[Path, str]]:
    """Every source file below the package's root with the package it is in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        if relative.name in ("__init__.py", "__main__.py") and len(relative.parts) == 1:
            continue
        inside = relative.parts[:-1] or (relative.stem,)
        yield path, ".".join(("hasten", *inside))


def test_every_file_is_in_a_layer() -> None:
    unknown = {package.split(".")[1] for _, package in files()} - RANK.keys()
    assert not unknown, f"no layer for {sorted(unknown)}"


def test_imports_go_down() -> None:
    wrong = [
        f"{path.name}: {edge}" for path, package in files() for edge in wrong_edges(path.read_text(), package)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_test_catches_what_it_is_for() -> None:
    assert wrong_edges("from hasten.engine.model import load", "hasten.models")  # up
    assert wrong_edges("import hasten.cli", "hasten.serve")  # up, plain import
    assert wrong_edges("from hasten.runtime import cpu", "hasten.compress")  # sideways
    assert wrong_edges("from ..engine import model", "hasten.models")  # up, relative
    assert wrong_edges("def f():\n    from hasten import cli", "hasten.core")  # up, inside a function
    assert wrong_edges("from hasten import load", "hasten.quality")  # through the front door
    assert wrong_edges("import hasten\nhasten.load('demo')", "hasten.quality")
    assert not wrong_edges("import hasten\nprint(hasten.__version__)", "hasten.quality")
    assert not wrong_edges("from hasten.core import Recipe\nimport numpy", "hasten.models")
    assert not wrong_edges("from . import tokenizer", "hasten.models")
    assert not wrong_edges("from .peers import llama", "hasten.bench")


def modules() -> dict[str, Path]:
    """Every module but `hasten` itself: its table of names imports nothing until a name is used."""
    named = {}
    for path, package in files():
        is_package = path.name == "__init__.py"
        is_single = package.split(".")[-1] == path.stem and path.parent == PACKAGE
        named[package if is_package or is_single else f"{package}.{path.stem}"] = path
    return named


def edges(source: str, package: str, known: Iterable[str]) -> set[str]:
    """The modules of `known` that a file in `package` imports: anywhere, for type checkers too."""
    found = set()
    for name in imported(source, package):
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
        found.update([next((prefix for prefix in prefixes if prefix in known), "")])
    return found - {""}


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others.

    A module that imports none of the others, or that none of them imports, is in no circle: such modules are
    left out until none remains.
    """
    left = {name: {other for other in others if other != name} for name, others in imports.items()}
    while True:
        targets = set().union(*left.values())
        loose = {name for name, others in left.items() if not others or name not in targets}
        if not loose:
            break
        left = {name: others - loose for name, others in left.items() if name not in loose}
    rest, found = set(left), []
    while rest:
        reached = {min(rest)}
        while new := {other for name in reached for other in left[name]} - reached:
            reached |= new
        found.append(sorted(reached & rest))
        rest -= reached
    return found


def test_no_two_files_import_each_other() -> None:
    """Imports inside functions and under `if TYPE_CHECKING` count.

    Not counted: modules that a registry names as text (`EXECUTORS`), which import what the registry's file
    defines.
    """
    known = modules()
    where = dict(files())
    imports = {name: edges(path.read_text(), where[path], known) for name, path in known.items()}
    assert sum(map(len, imports.values())) > len(known), "imports are not seen"
    found = circles(imports)
    assert not found, f"break the circle: move what both need into a file below: {found}"


def test_circles_are_seen() -> None:
    known = ("hasten.a", "hasten.b", "hasten.c", "hasten.c.d")
    assert edges("def f():\n    from hasten.a import x", "hasten.c", known) == {"hasten.a"}
    assert edges("if TYPE_CHECKING:\n    from hasten.c import d", "hasten.b", known) == {"hasten.c.d"}
    assert edges("from . import d\nfrom .d import name", "hasten.c", known) == {"hasten.c.d"}
    assert edges("from hasten.c import name\nimport numpy", "hasten.a", known) == {"hasten.c"}
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}, "d": set()}) == [["a", "b"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}) == [["b", "c", "d"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"a"}})


def test_the_serving_path_imports_no_torch() -> None:
    """torch and transformers: compression, the GPU and its ceilings, peers to compare with, no more."""
    allowed = {f"compress/{name}.py" for name in MODULE_COMPRESSION | LANGUAGE_MODELS} | {"machine/probe.py"}
    heavy = {"torch", "transformers", "triton"}
    found = [
        str(path.relative_to(PACKAGE))
        for path, package in files()
        if not package.startswith(("hasten.bench.peers", "hasten.runtime.gpu"))
        and path.parent.name not in LANGUAGE_MODELS
        and heavy & {name.split(".")[0] for name in imported(path.read_text(), package)}
    ]
    assert set(found) <= allowed, found
