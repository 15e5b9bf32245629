"""Bounds on what a chat template may cost: time, steps, the size of every value, and what it writes.

A sandbox keeps templates from the file system, not from `{% for %}` inside `{% for %}` or from doubling a
text sixty times. Three things hold them: every loop, call and filter counts a step and looks at the clock; no
value grows beyond a size, so that no single operation in C can run away; what is written is counted as it
comes. What a bound refuses is a template no model has: the largest known take thousands of steps.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
STEPS = 500_000  # loop rounds, calls and filters
SIZE = 16 << 20  # characters and entries in one value
WRITTEN = 64 << 20  # characters in all, those of macros included
SOURCE = 1 << 20  # characters of the template itself
PARTS = 40_000  # words and signs of its code, a second to compile; a usual template has 500
_BITS = 100_000  # of an integer
_JOINED = 8  # operands of ~ in one piece

_WITHOUT = ("urlize", "striptags", "wordwrap")  # slow on long texts; no chat template needs them
_WHOLE = (
    "string",
    "tojson",
    "pprint",
    "urlencode",
    "xmlattr",
    "escape",
    "e",
    "forceescape",
    "upper",
    "lower",
)
_TIMES = ("center", "indent", "batch", "slice")
_TIMES_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes")
_WIDE = re.compile(r"\d{5}|\*")  # a width in a format: text of that many spaces
_NESTED = re.compile(r":[^{}]*\{")


class TooMuch(jinja2.TemplateError):
    """A template went over a bound."""


@dataclass
class _Budget:
    ends: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    steps: int = 0
    written: int = 0
    literal: int = 0  # characters of plain text in the template

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS or time.monotonic() > self.ends:
            raise TooMuch(f"it runs too long (more than {STEPS:,} steps or {SECONDS:g} s)")

    def write(self, characters: int) -> None:
        self.written += characters
        if self.written > WRITTEN:
            raise TooMuch(f"it writes more than {WRITTEN:,} characters")


_budget: ContextVar[_Budget | None] = ContextVar("_budget", default=None)


@contextmanager
def limited(literal: int = 0) -> Iterator[None]:
    """Count what happens inside as one rendering.

    Args:
        literal: characters of plain text in the template, which one macro may write at most.
    """
    token = _budget.set(_Budget(literal=literal))
    try:
        yield
    finally:
        _budget.reset(token)


def _now() -> _Budget:
    return _budget.get() or _Budget()


def _too_big() -> NoReturn:
    raise TooMuch(f"it makes a value of more than {SIZE:,} characters")


def weight(value: Any, seen: dict[int, int] | None = None) -> int:
    """Characters and entries of a value written out; what is shared counts each time, at the cost of once."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if not isinstance(value, (list, tuple, Mapping, Namespace)):
        return 1
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = 1  # while inside itself
        if isinstance(value, Namespace):
            value_of: Any = object.__getattribute__(value, "_Namespace__attrs")
        else:
            value_of = value
        parts: Iterable[Any] = value_of
        if isinstance(value_of, Mapping):
            parts = [*value_of, *value_of.values()]
        seen[id(value)] = 1 + sum(weight(part, seen) + 1 for part in parts)
    return seen[id(value)]


def sized(value: Any) -> Any:
    """The value, if it is not too big."""
    if weight(value) > SIZE:
        _too_big()
    return value


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the bounds of this module; compile with `from_string(bounded(source))`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        self.globals.pop("lipsum", None)
        for name in _WITHOUT:
            self.filters.pop(name, None)
        for name, function in list(self.filters.items()):
            self.filters[name] = guarded(name, function)
        self.filters["_counted"] = _counted
        self.filters["_sized"] = jinja2.pass_context(lambda _, value: sized(value))

    def bounded(self, source: str) -> tuple[jinja2.Template, int]:
        """A template that counts what it does, and the characters of plain text in it."""
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters, more than {SOURCE:,}")
        if next(islice(self.lexer.tokeniter(source, None), PARTS, None), None) is not None:
            raise TooMuch(f"its code has more than {PARTS:,} words and signs")
        tree = self.parse(source)
        literal = _literal(tree)
        with limited(literal):
            template = self.from_string(_Bounds().visit(tree))
        return template, literal

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%` whose results stay small."""
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                _too_big()
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and weight(value) * times > SIZE:
                    _too_big()
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(str(left), "%", right)
        return sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count calls; keep methods of texts from making more of them than there is room for."""
        budget = _now()
        budget.step()
        if isinstance(__obj, Macro):
            budget.write(budget.literal)
        if isinstance(__obj, LoopContext) and args:
            args = (_counted(None, args[0], budget.literal), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            args = _checked(owner, getattr(method, "__name__", ""), args, kwargs)
        return sized(super().call(__context, __obj, *args, **kwargs))


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step and gives nothing too big."""
    passed = getattr(function, "jinja_pass_arg", None) is not None

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _now().step()
        at = 1 if passed else 0
        value, rest = args[at], args[at + 1 :]
        if isinstance(value, Iterator):
            value = _growing(value)
        if name == "join" and not isinstance(value, str):
            value = list(value)
        if name in _WHOLE or name == "join":
            sized(value)
        if name in _TIMES:
            _check_times(value, rest, kwargs)
        if name == "tojson" and any(isinstance(v, int) and v > 16 for v in (*rest, *kwargs.values())):
            _too_big()
        if name == "format":
            _check_format(str(value), "%", (rest, kwargs))
        if name == "replace":
            _check_replace(str(value), *map(str, (*rest, *kwargs.values())))
        if name == "join":
            _check_times("x" * min(len(value), SIZE + 1) if isinstance(value, list) else value, rest, kwargs)
        return sized(function(*args[:at], value, *rest, **kwargs))

    return run


def _checked(owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments of a text's method, iterators made lists, if the result has room."""
    if name == "join" and args:
        items = list(_growing(args[0]))
        if weight(items) + len(owner) * len(items) > SIZE:
            _too_big()
        return (items, *args[1:])
    if name == "replace" and len(args) > 1:
        _check_replace(owner, *args)
    elif name in ("format", "format_map"):
        _check_format(owner, "{", (args, kwargs))
    elif name in _TIMES_METHODS:
        _check_times(owner, args, kwargs)
    return args


def _check_times(value: Any, rest: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Results of at most (what is there) times (a width, or a text put in)."""
    most = max((v if isinstance(v, int) else weight(v) for v in (*rest, *kwargs.values())), default=0)
    if most > SIZE or (min(weight(value), SIZE) + 1) * most > 4 * SIZE:
        _too_big()


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    if text.count(old) * len(new) > SIZE:
        _too_big()


def _check_format(text: str, sign: str, values: Any) -> None:
    if _WIDE.search(text) or _NESTED.search(text) or text.count(sign) * weight(values) > SIZE:
        _too_big()


def _written(value: Any) -> Any:
    budget = _now()
    budget.step()
    budget.write(weight(value))
    return value


@jinja2.pass_context
def _counted(_: Any, value: Iterable[Any], literal: int) -> Iterator[Any]:
    """What a loop goes over; each round is a step and may write the plain text inside."""
    budget = _now()
    for item in value:
        budget.step()
        budget.write(literal)
        yield item


def _growing(value: Iterable[Any]) -> Iterator[Any]:
    """What a filter may gather: items until they are too big together."""
    budget, total = _now(), 0
    for item in value:
        budget.step()
        total += weight(item) + 1
        if total > SIZE:
            _too_big()
        yield item


def _literal(tree: nodes.Node) -> int:
    return sum(len(data.data) for data in tree.find_all(nodes.TemplateData))


def _outermost_loops(node: nodes.Node) -> list[nodes.For]:
    if isinstance(node, nodes.For):
        return [node]
    return [loop for child in node.iter_child_nodes() for loop in _outermost_loops(child)]


class _Bounds(NodeTransformer):
    """Puts the counting filters into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        inner = sum(_literal(loop) for child in node.body for loop in _outermost_loops(child))
        literal = nodes.Const(_literal(node) - inner)
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [literal], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = node.nodes
        while len(parts) > _JOINED:
            parts = [self._sized(nodes.Concat(parts[:_JOINED], lineno=node.lineno)), *parts[_JOINED:]]
        return self._sized(nodes.Concat(parts, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._sized(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._sized(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._sized(node) if node.ctx == "load" else node

    def _sized(self, node: nodes.Expr) -> nodes.Expr:
        if next(node.find_all((nodes.Name, nodes.Call, nodes.Filter)), None) is None:
            return node
        return nodes.Filter(node, "_sized", [], [], None, None, lineno=node.lineno)
