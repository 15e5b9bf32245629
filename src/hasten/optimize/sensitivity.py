"""How much each group of layers suffers from few bits: the map a mixture is drawn from.

One group at a time is packed to 4 bits in an otherwise unharmed model, and the KL divergence to the bf16
source is measured on calibration text, which evaluation never sees. What the unharmed model (values kept,
int8 activations) diverges by itself is taken off. At other widths the harm is scaled: to second order KL
grows with the square of the perturbation, and the perturbation's variance is the quantisation's squared
error, which is computed from the weights:

    harm(layout) = harm(4 bits) x mean over the group's tensors of error(layout) / error(4 bits)

This is the second-order view of HAWQ (Dong et al., 2019), measured instead of derived.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core import Layout, Recipe
from hasten.optimize.mix import Choice
from hasten.optimize.progress import Observer, Progress
from hasten.optimize.space import MENU, PROBE, Group, groups
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.divergence import Reference
from hasten.quality.text import Text, Window, windows
from hasten.speed.cost import packed_bytes

_WINDOW = 256
_TOKENS = 512
_FEWEST_TOKENS = 64
_LEAST_OF_MEDIAN = 0.1
"""A measured harm below this part of the median is noise and is raised to it."""


@dataclass(frozen=True)
class Sensitivity:
    """What 4 bits cost in one group, measured, and all it may be given, predicted from that."""

    group: Group
    harm: float  # KL that PROBE adds, nats; 0 where the source is as narrow already
    menu: tuple[Choice, ...]

    def harm_of(self, layout: Layout | None) -> float | None:
        """Predicted KL of one layout, nats; None if the menu lacks it."""
        return next((choice.harm for choice in self.menu if choice.layout == layout), None)


def base_recipe(kept: Mapping[str, Layout]) -> Recipe:
    """The unharmed model: the source's values, 16-bit ones as 8-bit integers to be quick."""
    wide = {name: Layout(8) for name, layout in kept.items() if layout.bits == 16}
    return Recipe(name="base", default=None, layers=wide)


def measure_sensitivity(
    workshop: Workshop, source: Built, text: Text, *, seconds: float, observer: Observer
) -> tuple[Sensitivity, ...]:
    """Harm of every group, in the order they are computed.

    Args:
        workshop: makes the models.
        source: the source in bf16.
        text: its calibration part is read.
        seconds: time this may take; on a slow machine fewer tokens are read, at least 64.
        observer: told of each group.
    """
    kept = workshop.kept()
    found = groups(workshop.config)
    base = workshop.build(base_recipe(kept))
    try:
        reference = _reference(workshop, source, base, text, seconds / len(found))
        start = _kl(reference, base)
        harms = []
        for number, group in enumerate(found):
            observer(Progress("sensitivity", group.name, number, len(found)))
            harms.append(_harm(workshop, base, reference, group, start, kept))
    finally:
        base.close()
    observer(Progress("sensitivity", "done", len(found), len(found)))
    return draw(workshop, found, harms)


def draw(workshop: Workshop, found: tuple[Group, ...], harms: list[float]) -> tuple[Sensitivity, ...]:
    """The map from measured harms (nats, one a group): noise raised to a floor, other widths scaled."""
    positive = [harm for harm in harms if harm > 0]
    floor = _LEAST_OF_MEDIAN * statistics.median(positive) if positive else 0.0
    kept = workshop.kept()
    return tuple(
        Sensitivity(group, max(harm, floor), _menu(workshop, group, max(harm, floor), kept))
        for group, harm in zip(found, harms, strict=True)
    )


def _harm(
    workshop: Workshop,
    base: Built,
    reference: Reference,
    group: Group,
    start: float,
    kept: Mapping[str, Layout],
) -> float:
    if all(kept[name].bits_per_weight <= PROBE.bits_per_weight for name in group.tensors):
        return 0.0  # as narrow as that in the file: keeping is free and nothing narrower is offered
    wide = base_recipe(kept).layers
    workshop.swap(base, group.tensors, PROBE)
    harm = _kl(reference, base) - start
    for name in group.tensors:
        workshop.swap(base, (name,), wide.get(name))
    return harm


def _menu(workshop: Workshop, group: Group, harm: float, kept: Mapping[str, Layout]) -> tuple[Choice, ...]:
    shapes = workshop.config.linear_shapes()
    at_probe = {name: workshop.error(name, PROBE) for name in group.tensors}
    menu = [Choice(None, sum(packed_bytes(shapes[name], kept[name]) for name in group.tensors), 0.0)]
    for layout in MENU:
        ratios = [
            workshop.error(name, layout) / at_probe[name] for name in group.tensors if at_probe[name] > 0
        ]
        scale = statistics.fmean(ratios) if ratios else 0.0
        menu.append(
            Choice(layout, sum(packed_bytes(shapes[name], layout) for name in group.tensors), harm * scale)
        )
    return tuple(menu)


def _reference(
    workshop: Workshop, source: Built, base: Built, text: Text, seconds_a_group: float
) -> Reference:
    """Calibration windows that fit the time: one full comparison is timed, the rest follows from it."""
    reference = Reference(source, _windows(workshop, text, _TOKENS), keep_logits=True)
    _kl(reference, base)  # computes the source's side, once
    began = time.perf_counter()
    _kl(reference, base)
    spent = time.perf_counter() - began
    if spent <= seconds_a_group:
        return reference
    tokens = max(_FEWEST_TOKENS, int(_TOKENS * seconds_a_group / spent) // 32 * 32)
    return Reference(source, _windows(workshop, text, tokens), keep_logits=True)


def _windows(workshop: Workshop, text: Text, tokens: int) -> tuple[Window, ...]:
    return windows(text.calibration, workshop.tokenizer(), tokens=tokens, length=min(tokens, _WINDOW))


def _kl(reference: Reference, model: Built) -> float:
    parts = [reference.compare(model, index).kl for index in range(len(reference.windows))]
    return float(sum(part.sum() for part in parts) / sum(part.size for part in parts))
