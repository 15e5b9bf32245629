"""Rules for layers: `layers.*.down`, `layers.0-3.q,k,v`, `head`, spelled out for a model.

A rule's parts are separated by dots as in a layer's name. Each is one name or several with commas between;
`*` stands for anything, `3-7` for these numbers, both ends included. Where two rules meet, the one that
names fewer of the other's layers wins: one that takes a part of what the other takes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from hasten.core import Format, ModelSpec
from hasten.errors import UsageError


def layer_names(config: ModelSpec) -> list[str]:
    """Every matrix a rule may name: the linear layers, and the embedding even where it is no head."""
    return list(dict.fromkeys([*config.linear_shapes(), "embed"]))


def matches(rule: str, names: Iterable[str]) -> frozenset[str]:
    """The names that a rule stands for."""
    wanted = rule.strip().split(".")
    return frozenset(name for name in names if _fits(wanted, name.split(".")))


def _fits(wanted: list[str], parts: list[str]) -> bool:
    pairs = zip(wanted, parts, strict=False)
    return len(wanted) == len(parts) and all(_part_fits(want, part) for want, part in pairs)


def _part_fits(wanted: str, part: str) -> bool:
    for one in wanted.split(","):
        span = re.fullmatch(r"(\d+)-(\d+)", one.strip())
        if span and part.isdecimal() and int(span[1]) <= int(part) <= int(span[2]):
            return True
        if fnmatchcase(part, one.strip()):
            return True
    return False


def spelled_out(rules: Mapping[str, Format], config: ModelSpec, where: str) -> dict[str, Format]:
    """Layer -> layout for every layer that a rule names, in the model's order.

    Raises:
        UsageError: a rule that names no layer (the nearest names are shown), or two rules that give a layer
            different layouts and neither is the narrower one.
    """
    names = layer_names(config)
    taken = {rule: _taken(rule, names, config, where) for rule in rules}
    found: dict[str, Format] = {}
    for name in names:
        mine = [rule for rule in rules if name in taken[rule]]
        narrowest = [rule for rule in mine if not any(taken[other] < taken[rule] for other in mine)]
        if len({rules[rule] for rule in narrowest}) > 1:
            raise _contradiction(name, narrowest, rules, where)
        if narrowest:
            found[name] = rules[narrowest[0]]
    return found


def _taken(rule: str, names: list[str], config: ModelSpec, where: str) -> frozenset[str]:
    taken = matches("embed" if rule == "head" and config.tied_head else rule, names)
    if taken:
        return taken
    near = _nearest(rule, names)
    raise UsageError(
        f"{where}: {rule!r} names no layer of this model, which has {config.num_layers} "
        f"(layers.0 to layers.{config.num_layers - 1})",
        hint=f"near it: {', '.join(near)}",
    )


def _nearest(rule: str, names: list[str]) -> list[str]:
    """Real names like a rule: by its last part where that exists, else by its letters."""
    last = [name for name in names if name.rsplit(".", 1)[-1] == rule.rsplit(".", 1)[-1]]
    plain = re.sub(r"[*,]|(?<=\d)-\d+", "", rule).replace("..", ".0.")
    return difflib.get_close_matches(plain, last or names, n=3, cutoff=0.4) or [*names[:2], names[-1]]


def _contradiction(name: str, rules: list[str], layouts: Mapping[str, Format], where: str) -> UsageError:
    first = rules[0]
    other = next(rule for rule in rules if layouts[rule] != layouts[first])
    return UsageError(
        f"{where}: contradictory rules for {name}: {first!r} says {layouts[first]}, "
        f"{other!r} says {layouts[other]}, and neither is a part of the other",
        hint=f"add a rule for what both name, such as {name}: {layouts[first]}",
    )
