"""How much each group of layers suffers from few bits: the map a mixture is drawn from.

One group at a time is packed to 4 bits in an otherwise unharmed model, by the method the mixture will be made
with, and the KL divergence to the bf16 source is measured on held-out calibration text, which neither
calibration nor evaluation sees. What the unharmed model (values kept, int8 activations) diverges by itself is
taken off. At other widths the harm is scaled: to second order KL grows with the square of the perturbation,
and the perturbation's variance is the quantisation's squared error, which is computed from the weights:

    harm(layout) = harm(4 bits) x mean over the group's tensors of error(layout) / error(4 bits) x fit(layout)

This is the second-order view of HAWQ (Dong et al., 2019), measured instead of derived. Some groups are
measured at other widths too: `fit` is what their harms together are over their predictions, and what single
ones still differ by is the prediction's error, which the report states.

Measuring all groups at all widths would take five times as long; the harm of a single group at 6 bits is a
hundredth of what int8 activations do and drowns in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hasten.compress.result import Observer, Progress
from hasten.core import READERS, Format, ModelSpec, Recipe
from hasten.optimize.workshop import Built, Workshop
from hasten.quality.divergence import Reference
from hasten.quality.text import Window, windows

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


@dataclass(frozen=True)
class Offer:
    """What a search tries on a device: what makes a difference there."""

    uniform: tuple[str, ...] = UNIFORM
    menu: tuple[Format, ...] = MENU
    by_layer: bool = True  # each layer's products get widths of their own; else all layers' the same


OFFERS: Mapping[str, Offer] = {
    "cuda": Offer(
        # 5 and 6 bits are streamed as 8; e4m3 multiplies prompts twice as fast as bf16
        ("source", "w8-g128", "fp8-head16", "fp8", "w4-g128-head8", "w4-head8", "w4-g128", "w4"),
        (MENU[0], MENU[1], Format.of(8), MENU[6], MENU[5], Format.of(8, group=128)),
        by_layer=False,  # the kernel for one sequence has one format a product
    )
}
"""By `EngineOptions.device`; a device that is not here is offered what the CPU is."""


def offer_for(device: str) -> Offer:
    """What a search tries on a device of `EngineOptions.device`."""
    return OFFERS.get(device, Offer())


PROBE = MENU[0]
"""The layout whose harm is measured; that of the others is scaled from it."""

_CHECKED = slice(1, 4)
"""Layouts of a menu at which some groups are measured too, to hold the scaling against."""


@dataclass(frozen=True)
class Group:
    """Linear layers that always get the same layout, because the engine computes them in one pass."""

    name: str  # "layers.3.qkv", "head"
    tensors: tuple[str, ...]  # canonical names


def groups(config: ModelSpec, by_layer: bool = True) -> tuple[Group, ...]:
    """Every group of a model in the order it is computed: four a layer, then the head.

    Args:
        by_layer: False joins each of the four over all layers.
    """
    head = Group("head", (config.head_name,))
    if not by_layer:
        layers = range(len(config.blocks))
        joined = [
            Group(name, tuple(f"layers.{layer}.{part}" for layer in layers for part in parts))
            for name, parts in READERS.items()
        ]
        return (*joined, head)
    found = [
        Group(f"layers.{layer}.{name}", tuple(f"layers.{layer}.{part}" for part in parts))
        for layer in range(len(config.blocks))
        for name, parts in READERS.items()
    ]
    return (*found, head)


def menu_of(
    group: Group, shapes: Mapping[str, tuple[int, int]], menu: Sequence[Format] = MENU
) -> tuple[Format, ...]:
    """The layouts of a menu whose groups divide the inputs of a group of layers."""
    return tuple(
        layout
        for layout in menu
        if layout.group == PROBE.group or all(shapes[name][1] % layout.group == 0 for name in group.tensors)
    )


def uniform(source_bits: float, calibrated: bool = False, device: str = "cpu") -> tuple[Recipe, ...]:
    """The fixed recipes to try; without `source` where that is 16 bits wide, the baseline itself."""
    known = offer_for(device).uniform
    names = known if source_bits < 16.0 else known[1:]
    if calibrated:
        names = (*names, BEST)
    return tuple(Recipe.parse(name) for name in names)


_WINDOW = 256
_TOKENS = 512
_FEWEST_TOKENS = 64
_RECKONED = 0.5e12  # operations a second of a core, bf16 and int8 steps of few hundred tokens: a usual one
_TOO_SLOW = 4.0
_LEAST_OF_MEDIAN = 0.1
"""A measured harm below this part of the median is noise and is raised to it."""
_CHECKED_GROUPS = 4
"""The most harmful groups are checked: their harms stand out of the noise and decide the mixture."""
_FURTHEST_FIT = 4.0
"""A fit beyond this factor either way is no property of the layout but noise."""


@dataclass(frozen=True)
class Choice:
    """One layout a group may get."""

    layout: Format | None  # None: the source's values are kept
    bytes: int
    harm: float  # predicted KL divergence it adds, nats


@dataclass(frozen=True)
class Sensitivity:
    """What 4 bits cost in one group, measured, and all it may be given, predicted from that."""

    group: Group
    harm: float  # KL that PROBE adds, nats; 0 where the source is as narrow already
    menu: tuple[Choice, ...]

    def harm_of(self, layout: Format | None) -> float | None:
        """Predicted KL of one layout, nats; None if the menu lacks it."""
        return next((choice.harm for choice in self.menu if choice.layout == layout), None)


@dataclass(frozen=True)
class Check:
    """One group measured at a width that the map predicts."""

    group: str
    layout: Format
    harm: float  # KL it adds, nats, measured


@dataclass(frozen=True)
class Harms:
    """What was measured, all that has to be kept to draw the map again."""

    at_probe: tuple[float, ...]  # nats, one a group, in the order of `groups`
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class SensitivityMap:
    """Every group's harm at every width."""

    groups: tuple[Sensitivity, ...]
    checks: tuple[Check, ...] = ()
    method: str = "rtn"

    @cached_property
    def error(self) -> float | None:
        """Median of |predicted / measured - 1| over the checks; None where nothing was checked."""
        off = [abs(predicted / check.harm - 1) for check, predicted in self.checked() if check.harm > 0]
        return statistics.median(off) if off else None

    def checked(self) -> list[tuple[Check, float]]:
        """The checks with what the map predicts, nats."""
        by_name = {s.group.name: s for s in self.groups}
        return [(check, by_name[check.group].harm_of(check.layout) or 0.0) for check in self.checks]


def base_recipe(kept: Mapping[str, Format]) -> Recipe:
    """The unharmed model: the source's values, 16-bit ones as 8-bit integers to be quick."""
    wide = {name: Format.of(8) for name, layout in kept.items() if layout.bits == 16}
    return Recipe(name="base", default=None, layers=wide)


def measure_harms(
    workshop: Workshop,
    source: Built,
    text: str,
    *,
    seconds: float,
    observer: Observer,
    method: str = "rtn",
) -> Harms:
    """Harm of every group, in the order they are computed, and of some at other widths.

    Args:
        source: in bf16.
        text: calibration text that nothing was calibrated on.
        seconds: time the comparisons may take on a usual machine. For large models and few cores fewer tokens
            are read, at least 64.
    """
    offer = offer_for(workshop.options.device)
    found = groups(workshop.config, offer.by_layer)
    checked = offer.menu[_CHECKED]
    kept = workshop.kept()
    to_measure = sum(not _is_narrow(group, kept, PROBE) for group in found)
    checks_most = min(_CHECKED_GROUPS, len(found)) * len(checked)
    with_checks = len(found) + checks_most
    base = workshop.build(base_recipe(kept))
    try:
        reference = _reference(workshop, source, base, text, seconds / (to_measure + checks_most))
        bench = _Bench(workshop, base, reference, method, _kl(reference, base))
        harms = []
        for number, group in enumerate(found):
            observer(Progress("sensitivity", group.name, number, with_checks))
            harms.append(bench.harm(group, PROBE))
        checks: list[Check] = []
        shapes = workshop.config.linear_shapes()
        for group, layout in _to_check(found, harms, checked):
            if layout not in menu_of(group, shapes, offer.menu):
                continue
            observer(Progress("sensitivity", group.name, len(found) + len(checks), with_checks))
            checks.append(Check(group.name, layout, bench.harm(group, layout)))
    finally:
        base.close()
    observer(Progress("sensitivity", "done", with_checks, with_checks))
    return Harms(tuple(harms), tuple(checks))


def draw(workshop: Workshop, harms: Harms, *, method: str = "rtn") -> SensitivityMap:
    """The map from what was measured with `method`: noise raised to a floor, other widths scaled."""
    positive = [harm for harm in harms.at_probe if harm > 0]
    floor = _LEAST_OF_MEDIAN * statistics.median(positive) if positive else 0.0
    offer, shapes = offer_for(workshop.options.device), workshop.config.linear_shapes()
    found = groups(workshop.config, offer.by_layer)
    plain = {
        group.name: {
            layout: max(harm, floor) * scale
            for layout, scale in _scales(workshop, group, menu_of(group, shapes, offer.menu)).items()
        }
        for group, harm in zip(found, harms.at_probe, strict=True)
    }
    fits = {layout: _fit(layout, harms.checks, plain) for layout in offer.menu}
    kept = workshop.kept()
    drawn = []
    for group, harm in zip(found, harms.at_probe, strict=True):
        by_layout = {layout: value * fits[layout] for layout, value in plain[group.name].items()}
        drawn.append(Sensitivity(group, max(harm, floor), _menu(workshop, group, by_layout, kept)))
    return SensitivityMap(tuple(drawn), harms.checks, method)


@dataclass(frozen=True)
class _Bench:
    """An unharmed model in which one group at a time is swapped."""

    workshop: Workshop
    base: Built
    reference: Reference
    method: str
    start: float  # KL of the unharmed model itself, nats

    def harm(self, group: Group, layout: Format) -> float:
        """KL that one group at one layout adds, nats."""
        if _is_narrow(group, self.workshop.kept(), layout):
            return 0.0  # as narrow as that in the file: keeping is free and nothing narrower is offered
        before = self.workshop.swap(self.base, group.tensors, layout, self.method)
        try:
            return _kl(self.reference, self.base) - self.start
        finally:
            self.workshop.restore(self.base, before)


def _is_narrow(group: Group, kept: Mapping[str, Format], layout: Format) -> bool:
    """Whether the file holds a group in no more bits than a layout has."""
    return all(kept[name].bits_per_weight <= layout.bits_per_weight for name in group.tensors)


def _to_check(
    found: Sequence[Group], harms: Sequence[float], layouts: Sequence[Format]
) -> list[tuple[Group, Format]]:
    worst = sorted(range(len(found)), key=lambda i: -harms[i])[:_CHECKED_GROUPS]
    return [(found[i], layout) for i in sorted(worst) for layout in layouts if harms[i] > 0]


def _fit(layout: Format, checks: Sequence[Check], plain: Mapping[str, Mapping[Format, float]]) -> float:
    """What the checked groups' harms at a layout are over their predictions, all together."""
    at = [check for check in checks if check.layout == layout and check.harm > 0]
    predicted = sum(plain[check.group][layout] for check in at)
    if not at or predicted <= 0:
        return 1.0
    return min(max(sum(check.harm for check in at) / predicted, 1 / _FURTHEST_FIT), _FURTHEST_FIT)


def _scales(workshop: Workshop, group: Group, layouts: Sequence[Format]) -> dict[Format, float]:
    """Squared rounding error of each layout over that of PROBE, mean over the group's tensors."""
    at_probe = {name: error for name in group.tensors if (error := workshop.error(name, PROBE)) > 0}
    if not at_probe:
        return dict.fromkeys(layouts, 0.0)
    others = {
        layout: statistics.fmean(workshop.error(name, layout) / error for name, error in at_probe.items())
        for layout in layouts
        if layout != PROBE
    }
    return {layout: others.get(layout, 1.0) for layout in layouts}


def _menu(
    workshop: Workshop, group: Group, harms: Mapping[Format, float], kept: Mapping[str, Format]
) -> tuple[Choice, ...]:
    shapes = workshop.config.linear_shapes()

    def choice(layout: Format | None, harm: float) -> Choice:
        sizes = {name: (layout or kept[name]).bytes_of(*shapes[name]) for name in group.tensors}
        return Choice(layout, sum(sizes.values()), harm)

    return (choice(None, 0.0), *(choice(layout, harm) for layout, harm in harms.items()))


def _reference(
    workshop: Workshop, source: Built, base: Built, text: str, seconds_a_group: float
) -> Reference:
    """Held-out windows that fit the time as it is reckoned, and not as it is measured.

    Measured time would give other tokens from run to run, and with them another map and another mixture. It
    counts where the machine is slower by more than `_TOO_SLOW`.
    """
    threads = workshop.options.threads or workshop.machine(ceilings=False).cores
    one_token = 2.0 * workshop.config.weights_read / (_RECKONED * threads)
    tokens = _TOKENS
    while tokens > _FEWEST_TOKENS and tokens * one_token > seconds_a_group:
        tokens //= 2
    while True:
        reference = Reference(source, _windows(workshop, text, tokens), keep_logits=True)
        _kl(reference, base)  # computes the source's side, once
        began = time.perf_counter()
        _kl(reference, base)
        spent = time.perf_counter() - began
        if spent <= _TOO_SLOW * seconds_a_group or tokens <= _FEWEST_TOKENS:
            return reference
        tokens //= 2


def _windows(workshop: Workshop, text: str, tokens: int) -> tuple[Window, ...]:
    return windows(text, workshop.tokenizer(), tokens=tokens, length=min(tokens, _WINDOW))


def _kl(reference: Reference, model: Built) -> float:
    parts = [reference.compare(model, index).kl for index in range(len(reference.windows))]
    return float(sum(part.sum() for part in parts) / sum(part.size for part in parts))
