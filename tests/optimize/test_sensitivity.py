"""The sensitivity map, on the model of NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from fakes import CONFIG, FakeWorkshop
from hasten.compress.result import Progress, silent
from hasten.core import EngineOptions, Format, Recipe
from hasten.optimize import sensitivity
from hasten.optimize.calibrated import split
from hasten.optimize.sensitivity import (
    MENU,
    Check,
    Harms,
    base_recipe,
    draw,
    groups,
    measure_harms,
    menu_of,
    offer_for,
    uniform,
)
from hasten.quality.divergence import Reference
from hasten.quality.text import windows


@pytest.fixture
def workshop() -> FakeWorkshop:
    return FakeWorkshop()


def test_groups_cover_every_linear_layer_once() -> None:
    names = [name for group in groups(CONFIG) for name in group.tensors]
    assert sorted(names) == sorted(CONFIG.linear_shapes())
    assert len(groups(CONFIG)) == 4 * len(CONFIG.blocks) + 1


def test_harm_is_the_divergence_of_one_group_alone(workshop: FakeWorkshop) -> None:
    text = workshop.text()
    source = workshop.build(Recipe.parse("bf16"))
    held_out = split(text.calibration)[1]
    found = draw(workshop, measure_harms(workshop, source, held_out, seconds=60, observer=silent)).groups
    cut = windows(held_out, workshop.tokenizer(), tokens=512, length=256)

    def kl(recipe: Recipe) -> float:
        model = workshop.build(recipe)
        return float(np.mean([Reference(source, cut).compare(model, i).kl.mean() for i in range(len(cut))]))

    base = base_recipe(workshop.kept())
    start = kl(base)
    for s in found:
        if s.group.name in ("layers.1.down", "head", "layers.0.qkv"):
            layers = {**base.layers, **dict.fromkeys(s.group.tensors, Format.of(4))}
            alone = kl(Recipe("one", layers=layers)) - start
            assert s.harm == pytest.approx(alone, rel=1e-4), s.group.name


def test_other_widths_follow_the_rounding_error(workshop: FakeWorkshop) -> None:
    for s in draw(workshop, Harms((0.01,) * 9)).groups:
        harms = [s.harm_of(layout) for layout in MENU[:5]]
        assert harms[0] == pytest.approx(0.01)
        assert harms == sorted(harms, reverse=True)  # type: ignore[type-var]
        assert harms[2] / harms[0] == pytest.approx(0.22, abs=0.06)  # type: ignore[operator]  (7 / 15)^2
        assert s.harm_of(None) == 0.0
        assert s.harm_of(Format.of(4, group=128)) is None


def test_predicted_sums_are_near_what_whole_recipes_do(workshop: FakeWorkshop) -> None:
    text = workshop.text()
    source = workshop.build(Recipe.parse("bf16"))
    harms = measure_harms(workshop, source, text.calibration, seconds=60, observer=silent)
    found = draw(workshop, harms).groups
    cut = windows(text.evaluation, workshop.tokenizer(), tokens=2048)
    reference = Reference(source, cut)
    for name, layout in (("w4", Format.of(4)), ("w5", Format.of(5))):
        model = workshop.build(Recipe.parse(name))
        kl = np.mean([reference.compare(model, i).kl.mean() for i in range(len(cut))])
        assert sum(s.harm_of(layout) or 0.0 for s in found) == pytest.approx(kl, rel=0.5)


def test_noise_is_raised_to_a_floor(workshop: FakeWorkshop) -> None:
    found = draw(workshop, Harms((-0.001, 0.0, 0.01, 0.02, 0.03, 0.01, 0.01, 0.01, 0.01))).groups
    assert found[0].harm == found[1].harm == pytest.approx(0.001)
    assert found[4].harm == 0.03


def test_what_is_narrow_already_is_not_measured() -> None:
    workshop = FakeWorkshop(kept_bits=4)
    seen: list[Progress] = []
    source = workshop.build(Recipe.parse("bf16"))
    harms = measure_harms(workshop, source, workshop.text().calibration, seconds=60, observer=seen.append)
    assert harms.at_probe == (0.0,) * 9
    assert harms.checks == ()
    assert len(seen) == 10


def test_a_slow_machine_reads_fewer_tokens(workshop: FakeWorkshop) -> None:
    source = workshop.build(Recipe.parse("bf16"))
    lengths: list[int] = []
    hidden = source.hidden
    source.hidden = lambda tokens: (lengths.append(tokens.size), hidden(tokens))[1]  # type: ignore[method-assign]
    measure_harms(workshop, source, workshop.text().calibration, seconds=1e-6, observer=silent)
    assert lengths == [64], "reckoned from the model's size, so that no run is timed first"


def test_a_machine_far_slower_than_reckoned_reads_fewer(
    workshop: FakeWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = workshop.build(Recipe.parse("bf16"))
    lengths: list[int] = []
    hidden = source.hidden
    source.hidden = lambda tokens: (lengths.append(tokens.size), hidden(tokens))[1]  # type: ignore[method-assign]
    monkeypatch.setattr(sensitivity, "_RECKONED", 1e18)
    measure_harms(workshop, source, workshop.text().calibration, seconds=1e-6, observer=silent)
    assert lengths == [256, 256, 256, 128, 64]


def test_uniform_recipes() -> None:
    assert [r.name for r in uniform(16.0)] == ["w8", "w6", "w5", "w5-head8", "w4-head8", "w4"]
    assert "source" in [r.name for r in uniform(8.5)]
    on_gpu = [r.name for r in uniform(16.0, device="cuda")]
    assert {"fp8", "w8-g128", "w4-g128"} <= set(on_gpu) and not any("w5" in n or "w6" in n for n in on_gpu)


def test_calibrated_uniform_recipes_come_last() -> None:
    assert [r.name for r in uniform(16.0, calibrated=True)][-2:] == ["w4", "w4-best"]


def test_some_groups_are_held_against_the_scaling(workshop: FakeWorkshop) -> None:
    source = workshop.build(Recipe.parse("bf16"))
    harms = measure_harms(workshop, source, workshop.text().calibration, seconds=60, observer=silent)
    drawn = draw(workshop, harms)
    worst = sorted(range(9), key=lambda i: -harms.at_probe[i])[:4]
    names = [group.name for group in groups(CONFIG)]
    assert {check.group for check in drawn.checks} == {names[i] for i in worst}
    assert {check.layout for check in drawn.checks} == set(MENU[1:4])
    assert drawn.error is not None
    assert drawn.error < 0.4
    by_layout: dict[Format, list[tuple[float, float]]] = {}
    for check, predicted in drawn.checked():
        by_layout.setdefault(check.layout, []).append((check.harm, predicted))
    for pairs in by_layout.values():  # fitted: together they are what was measured
        assert sum(p for _, p in pairs) == pytest.approx(sum(m for m, _ in pairs), rel=1e-6)


def test_what_was_measured_corrects_the_scaling(workshop: FakeWorkshop) -> None:
    plain = draw(workshop, Harms((0.01,) * 9))
    at_5 = plain.groups[3].harm_of(Format.of(5))
    assert at_5 is not None
    twice = draw(workshop, Harms((0.01,) * 9, (Check(plain.groups[3].group.name, Format.of(5), 2 * at_5),)))
    assert twice.groups[3].harm_of(Format.of(5)) == pytest.approx(2 * at_5)
    assert twice.groups[5].harm_of(Format.of(5)) == pytest.approx(
        2 * (plain.groups[5].harm_of(Format.of(5)) or 0)
    )
    assert twice.groups[3].harm_of(Format.of(6)) == plain.groups[3].harm_of(Format.of(6))
    assert twice.error == pytest.approx(0.0)
    assert plain.error is None


def test_the_map_is_measured_with_the_mixtures_own_method() -> None:
    workshop = FakeWorkshop(can_calibrate=True)
    source, text = workshop.build(Recipe.parse("bf16")), workshop.text().calibration
    rounded = measure_harms(workshop, source, text, seconds=60, observer=silent)
    calibrated = measure_harms(workshop, source, text, seconds=60, observer=silent, method="gptq")
    assert sum(calibrated.at_probe) < 0.5 * sum(rounded.at_probe)


def test_groups_that_do_not_divide_are_not_offered() -> None:
    wide = dict.fromkeys(("layers.0.q", "layers.0.k", "layers.0.v"), (64, 128))
    mixed = {**wide, "layers.0.v": (64, 96)}
    group = groups(CONFIG)[0]
    assert menu_of(group, wide) == MENU
    assert menu_of(group, mixed) == MENU[:5]


def test_a_gpu_has_one_width_a_product() -> None:
    """Its kernel for one sequence streams each product in one format: five groups, drawn like any others."""
    names = [group.name for group in groups(CONFIG, by_layer=False)]
    assert names == ["qkv", "o", "gate_up", "down", "head"]
    joined = [name for group in groups(CONFIG, by_layer=False) for name in group.tensors]
    assert sorted(joined) == sorted(name for group in groups(CONFIG) for name in group.tensors)
    workshop = FakeWorkshop()
    workshop.options = EngineOptions(threads=1, device="cuda")
    source = workshop.build(Recipe.parse("bf16"))
    harms = measure_harms(workshop, source, workshop.text().calibration, seconds=5, observer=silent)
    drawn = draw(workshop, harms)
    assert [s.group.name for s in drawn.groups] == names
    widths = {str(c.layout) for s in drawn.groups for c in s.menu if c.layout is not None}
    assert widths <= {str(layout) for layout in offer_for("cuda").menu} and "w8" in widths
