"""YAML as people read it: the core schema of YAML 1.2, every key once.

PyYAML follows YAML 1.1, in which `2:4` is the number 124, `5e-5` a text and `no` false; and it keeps the last
of two equal keys without a word.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hasten.errors import UsageError

_KINDS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _kind, (_form, _firsts) in _KINDS.items():
    for _first in _firsts:
        _entry = (f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})$"))
        _RESOLVERS.setdefault("" if _first == "\0" else _first, []).append(_entry)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _whole(loader: Any, node: Any) -> int:
    return int(node.value)  # YAML 1.1 would read 010 as eight


def _real(loader: Any, node: Any) -> float:
    return float(node.value.replace(".inf", "inf").replace(".nan", "nan").lower())


_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _real)


def load_yaml(text: str, where: str) -> Any:
    """The value of a document.

    Raises:
        UsageError: the text is no YAML, or a key is there twice; the line is named.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        what = getattr(wrong, "problem", None) or str(wrong).splitlines()[0]
        raise UsageError(f"{where}{place}: {what}", hint="see docs/compress.md for an example") from None
    except RecursionError:
        raise UsageError(
            f"{where} is nested too deeply", hint="see docs/compress.md for an example"
        ) from None


def dump_yaml(value: Any) -> str:
    """A document that `load_yaml` reads back as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))
