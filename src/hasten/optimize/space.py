"""What is tried: uniform widths, the head apart, and the widths a mixture may be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core import Format, ModelConfig, Recipe
from hasten.recipe import Method

UNIFORM = ("source", "w8", "w6", "w5", "w5-head8", "w4-head8", "w4")
"""Recipes tried on every model, widest first; the mixture comes after them and is calibrated by them."""

BEST = "w4-best"
"""Tried too where torch can calibrate it."""

MENU = (
    Format.of(4),
    Format.of(4, symmetric=False),
    Format.of(5),
    Format.of(6),
    Format.of(8),
    Format.of(4, group=64),
    Format.of(4, group=128),
)
"""What a mixture gives a group, if not the source's values: 4.125 to 8.5 bits a weight."""

PROBE = MENU[0]
"""The layout whose harm is measured; that of the others is scaled from it."""

CHECKED = MENU[1:4]
"""Layouts at which some groups are measured too, to hold the scaling against."""

_PARTS = (("qkv", ("q", "k", "v")), ("o", ("o",)), ("gate_up", ("gate", "up")), ("down", ("down",)))


def is_calibrated(layout: Format, method: Method) -> bool:
    """Whether a mixture's integers of this layout come from calibration: 8 bits round as well without."""
    return method != "rtn" and layout.bits < 8


@dataclass(frozen=True)
class Group:
    """Linear layers that always get the same layout, because the engine computes them in one pass."""

    name: str  # "layers.3.qkv", "head"
    tensors: tuple[str, ...]  # canonical names


def groups(config: ModelConfig) -> tuple[Group, ...]:
    """Every group of a model in the order it is computed: four a layer, then the head."""
    found = [
        Group(f"layers.{layer}.{name}", tuple(f"layers.{layer}.{part}" for part in parts))
        for layer in range(config.num_layers)
        for name, parts in _PARTS
    ]
    return (*found, Group("head", ("embed" if config.tied_head else "head",)))


def menu_of(group: Group, shapes: Mapping[str, tuple[int, int]]) -> tuple[Format, ...]:
    """The layouts of the menu whose groups divide the inputs of a group of layers."""
    return tuple(
        layout
        for layout in MENU
        if layout.group == PROBE.group or all(shapes[name][1] % layout.group == 0 for name in group.tensors)
    )


def uniform(source_bits: float, calibrated: bool = False) -> tuple[Recipe, ...]:
    """The fixed recipes to try; without `source` where that is 16 bits wide, the baseline itself."""
    names = UNIFORM if source_bits < 16.0 else UNIFORM[1:]
    if calibrated:
        names = (*names, BEST)
    return tuple(Recipe.parse(name) for name in names)
