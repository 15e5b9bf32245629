"""Bounds on what a chat template may cost: time, steps, the size of every value, and what it writes.

A sandbox keeps templates from the file system, not from `{% for %}` inside `{% for %}` or from doubling a
text sixty times. Three things hold them: every loop, call, filter and piece of text counts a step and looks
at the clock; no value grows beyond a size, so that no single operation in C can run away; what is written is
counted as it comes. What a bound refuses is a template no model has: the largest known take thousands of
steps.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import islice
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
STEPS = 500_000  # loop rounds, calls, filters and pieces of text
SIZE = 16 << 20  # characters and entries in one value
WRITTEN = 64 << 20  # characters in all, those of macros included
SOURCE = 1 << 20  # characters of the template itself
PARTS = 40_000  # words and signs of its code, a second to compile; a usual template has 500
_BITS = 100_000  # of an integer

_WITHOUT = ("urlize", "striptags", "wordwrap")  # slow on long texts; no chat template needs them
_READS_ALL = frozenset({
    "string", "tojson", "pprint", "urlencode", "xmlattr", "escape", "e", "forceescape", "upper", "lower",
    "join",
})  # fmt: skip
# filters and methods whose result may hold an argument, or as many blanks, once for each part of the value
_COPIES = frozenset({
    "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "to_bytes", "indent", "batch", "slice",
    "tojson",
})  # fmt: skip
_WIDTH = re.compile(r"\d{5}|\*|:[^{}]*\{")  # in a format: text of that many blanks


class TooMuch(jinja2.TemplateError):
    """A template went over a bound."""


class _Spent:
    """What one rendering has cost."""

    def __init__(self) -> None:
        self.ends, self.steps, self.written = time.monotonic() + SECONDS, 0, 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > STEPS or time.monotonic() > self.ends:
            raise TooMuch(f"it runs too long (more than {STEPS:,} steps or {SECONDS:g} s)")

    def write(self, value: Any) -> Any:
        self.step()
        self.written += weight(value)
        if self.written > WRITTEN:
            raise TooMuch(f"it writes more than {WRITTEN:,} characters")
        return value

    def rounds(self, items: Iterable[Any], gathered: bool = False) -> Iterator[Any]:
        """The items, a step each; where they are gathered, until they are too big together."""
        total = 0
        for item in items:
            self.step()
            total += weight(item) + 1 if gathered else 0
            if total > SIZE:
                _too_big()
            yield item


_spent: ContextVar[_Spent | None] = ContextVar("_spent", default=None)


def limited(run: Callable[[], Any]) -> Any:
    """What a function gives, all that templates do inside counted as one rendering."""
    token = _spent.set(_Spent())
    try:
        return run()
    finally:
        _spent.reset(token)


def _now() -> _Spent:
    return _spent.get() or _Spent()


def _too_big() -> NoReturn:
    raise TooMuch(f"it makes a value of more than {SIZE:,} characters")


def weight(value: Any, seen: dict[int, int] | None = None) -> int:
    """Characters and entries of a value written out; what is shared counts each time, at the cost of once."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if not isinstance(value, (list, tuple, Mapping)):
        return 1
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = 1  # while inside itself
        parts: Iterable[Any] = [*value, *value.values()] if isinstance(value, Mapping) else value
        seen[id(value)] = 1 + sum(weight(part, seen) + 1 for part in parts)
    return seen[id(value)]


def sized(value: Any) -> Any:
    """The value, if it is not too big."""
    return _too_big() if weight(value) > SIZE else value


def _check(name: str, value: Any, given: tuple[Any, ...]) -> None:
    """Refuse a filter or method whose result may hold too many copies of what it is given."""
    if name in ("format", "format_map", "%"):
        if _WIDTH.search(str(value)):
            _too_big()
        times = str(value).count("%") + str(value).count("{")
        given = (given,)  # each place may hold all of them
    elif name == "replace":
        times = str(value).count(str(given[0])) if given else 0
    elif name == "join":
        times = len(value)
    else:
        times = weight(value) + 1 if name in _COPIES else 0
    if times * max((v if isinstance(v, int) else weight(v) for v in given), default=0) > SIZE:
        _too_big()


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the bounds of this module; compile with `bounded`, render inside `limited`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=lambda value: _now().write(value), **options)
        self.globals.pop("lipsum", None)
        for name in _WITHOUT:
            self.filters.pop(name, None)
        for name, function in list(self.filters.items()):
            self.filters[name] = guarded(name, function)
        # with the context these two are no constants, which the compiler would work out
        self.filters["_counted"] = jinja2.pass_context(lambda _, items: _now().rounds(items))
        self.filters["_sized"] = jinja2.pass_context(lambda _, value: sized(value))

    def bounded(self, source: str) -> jinja2.Template:
        """A template that counts what it does."""
        if len(source) > SOURCE:
            raise TooMuch(f"it has {len(source):,} characters, more than {SOURCE:,}")
        if next(islice(self.lexer.tokeniter(source, None), PARTS, None), None) is not None:
            raise TooMuch(f"its code has more than {PARTS:,} words and signs")
        tree = _Bounds().visit(self.parse(source))
        template: jinja2.Template = limited(lambda: self.from_string(tree))
        return template

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
            _check("%", left, (right,))
        return sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Count calls; keep methods of texts from making more of them than there is room for."""
        _now().step()
        if isinstance(__obj, LoopContext) and args:
            args = (_now().rounds(args[0]), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, bytes)) and name == "join" and args:
            args = (list(_now().rounds(args[0], gathered=True)), *args[1:])
            _check(name, args[0], (owner,))
        elif isinstance(owner, (str, bytes, int)):
            _check(name, owner, (*args, *kwargs.values()))
        return sized(super().call(__context, __obj, *args, **kwargs))


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step and gives nothing too big."""
    at = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _now().step()
        value, rest = args[at], args[at + 1 :]
        if isinstance(value, Iterator):
            value = _now().rounds(value, gathered=True)
        if name == "join" and not isinstance(value, str):
            value = list(value)
        if name in _READS_ALL:
            sized(value)
        _check(name, value, (*rest, *kwargs.values()))
        return sized(function(*args[:at], value, *rest, **kwargs))

    return run


class _Bounds(NodeTransformer):
    """Puts the counting filters into a template's tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return _filtered(nodes.Const(node.data, lineno=node.lineno), "_sized")  # no constant: it is counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _filtered(self.visit_List(nodes.List(node.nodes, lineno=node.lineno)), "join")

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_constant = next(node.find_all((nodes.Name, nodes.Call, nodes.Filter)), None) is None
        return node if is_constant or getattr(node, "ctx", "load") != "load" else _filtered(node, "_sized")

    visit_Dict = visit_Tuple = visit_List


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
