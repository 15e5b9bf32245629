"""House rules that no linter knows: sizes, argument counts, words."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES = 600
FUNCTION_LINES = 60
ARGUMENTS = 8
KERNEL_LINES = 120
WORDS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|NotImplementedError|\bDESIGN \d|\butils?\.py\b")
SIGNS = re.compile(r"[\U0001F300-\U0001FAFF]|\u2014")  # tests of tokenizers need them


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository (git's list; every file where there is no git)."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()]
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern.replace("*", "**/*", 1)))


PYTHON = tracked("src/*.py", "tests/*.py", "benchmarks/*.py", "examples/*.py", "docs/*.py")
NATIVE = tracked("native/*.cpp", "native/*.h", "native/*.inl")


@functools.cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in statements(ast.parse(path.read_text())) if isinstance(node, kinds)]


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements below a node, functions and classes among them; expressions, most of a tree, left out."""
    for inside in ("body", "orelse", "finalbody", "handlers", "cases"):
        below = getattr(node, inside, ())
        for one in below if isinstance(below, list) else ():  # a lambda's body is an expression
            if isinstance(one, ast.stmt):
                yield one
            yield from statements(one)


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and decorators."""
    body = function.body
    doc = body[0] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else None
    docstring = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef, path: Path) -> bool:
    """A verb's `command` has one argument a flag."""
    return function.name == "command" and path.parent.name == "cli"


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel has one argument a pointer and a constant; Triton knows no keyword-only ones."""
    return any(ast.unparse(decorator).split("(")[0] == "triton.jit" for decorator in function.decorator_list)


def test_there_is_something_to_check() -> None:
    assert len(PYTHON) > 20
    assert len(NATIVE) > 5


def test_files_are_short() -> None:
    long = [
        f"{p.relative_to(ROOT)}: {n}"
        for p in [*PYTHON, *NATIVE]
        if (n := len(p.read_text().splitlines())) > FILE_LINES
    ]
    assert not long, f"split by noun, at most {FILE_LINES} lines: {long}"


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}: {n}"
        for path in PYTHON
        for f in functions(path)
        if (n := lines_of(f)) > FUNCTION_LINES
    ]
    assert not long, f"at most {FUNCTION_LINES} lines: {long}"


def native_functions(text: str) -> Iterator[tuple[str, int]]:
    """(first line, lines) of every C++ function: a block that opens at column 0 to 2 after parameters."""
    start = None
    for number, line in enumerate(text.splitlines()):
        opens = re.match(r" {0,2}[\w:<>*&,\[\]~ ]+\(.*\{$| {4}.*\) (const )?\{$", line)
        if (
            start is None
            and opens
            and not line.lstrip().startswith(("namespace", "if", "for", "while", "switch", "}"))
        ):
            start, indent, first = number, len(line) - len(line.lstrip()), line.strip()
        elif start is not None and line.startswith(" " * min(indent, 2) + "}"):
            yield first, number - start + 1
            start = None


def test_native_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {first}: {lines}"
        for path in NATIVE
        for first, lines in native_functions(path.read_text())
        if lines > KERNEL_LINES
    ]
    assert not long, f"at most {KERNEL_LINES} lines: {long}"


def test_functions_take_few_arguments() -> None:
    many = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}"
        for path in PYTHON
        if path.is_relative_to(ROOT / "src")
        for f in functions(path)
        if len(f.args.posonlyargs + f.args.args) > ARGUMENTS and not is_command(f, path) and not is_kernel(f)
    ]
    assert not many, (
        f"at most {ARGUMENTS} positional arguments, the rest by keyword or in a dataclass: {many}"
    )


@pytest.mark.parametrize(
    "word", ["TODO: later", "raise NotImplementedError", "from x import utils.py", "\U0001f680", "\u2014"]
)
def test_the_word_list_catches(word: str) -> None:
    assert WORDS.search(word) or SIGNS.search(word)


def forbidden(path: Path) -> Iterator[str]:
    """Places in a file where a word or sign stands that should not."""
    clean = "tests" in path.relative_to(ROOT).parts or "zh-CN" in path.name
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if WORDS.search(line) or (SIGNS.search(line) and not clean):
            yield f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"


def test_no_forbidden_words() -> None:
    texts = tracked("*.md", "*.toml", "Makefile", "CMakeLists.txt", "native/*", "src/*.py")
    texts += tracked("tests/*.py", "benchmarks/*.py")
    found = [place for path in texts if path != Path(__file__) for place in forbidden(path)]
    assert not found, "\n".join(found)


def test_no_drawer_modules() -> None:
    drawers = [p for p in PYTHON if p.stem in ("utils", "util", "helpers", "misc", "common")]
    assert not drawers, "a helper lives beside its one user or gets a real name"


def assigned_twice(text: str) -> list[str]:
    """Names that a module assigns at its top level more than once: the last value counts for all readers."""
    targets: list[ast.expr] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AnnAssign):
            targets.append(node.target)
    names = Counter(target.id for target in targets if isinstance(target, ast.Name))
    return [name for name, count in names.items() if count > 1]


def test_a_second_value_of_a_constant_is_found() -> None:
    assert assigned_twice("A = 0.7\nB: int = 1\nA = 0.5\n") == ["A"]


def test_a_module_gives_each_constant_one_value() -> None:
    found = {str(p.relative_to(ROOT)): names for p in PYTHON if (names := assigned_twice(p.read_text()))}
    assert not found, f"two files that were joined may have had one name for two things: {found}"
