"""The report of a compression: every step, the curve of distilling, readable and escaped."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_page import EVIL, outline

from hasten.compress.compress import compress
from hasten.compress.job import Means
from hasten.compress.recipe_file import parse_recipe
from hasten.report.pages import compressed_page, learning_curve

RECIPE = """
default: w4
head: w8
prune: [{kind: ffn, amount: 0.34}, {kind: magnitude, amount: 0.1, repair: false}]
distil: {tokens: 1024, batch_tokens: 512}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> dict[str, Any]:
    """plan.json of a small model that went through three kinds of steps."""
    place = tmp_path_factory.mktemp("compressed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_CACHE", str(place / "cache"))
        means = Means(device="cpu", threads=1)
        recipe = parse_recipe(RECIPE, "small")
        compress(tiny_folder("qwen2"), recipe, out=place / "o.hasten", tokens=2048, means=means)
    read: dict[str, Any] = json.loads((place / "o.hasten" / "plan.json").read_text())
    return read


def test_every_step_is_in_it(plan: dict[str, Any]) -> None:
    html = compressed_page(plan)
    steps = plan["compress"]["steps"]
    assert [step["name"] for step in steps] == ["prune ffn", "prune magnitude", "distil", "quantise"]
    for step in steps:
        assert f"<h2>{step['name']}, " in html
    for part in steps[0]["record"]["parts"]:
        assert f'<th scope="row">{part["name"]}</th><td>{part["kept"]}</td>' in html
        assert f"{100 * part['error_after']:.1f} %" in html
    assert steps[0]["lines"][0] in html and steps[0]["lines"][-1] not in html  # the table says it
    assert plan["compress"]["calibration"]["sha256"] in html
    assert "amount: 0.34" in html and html.count("<svg") == 1


def test_it_stands_alone_and_can_be_read_aloud(plan: dict[str, Any]) -> None:
    found = outline(compressed_page(plan))
    tags = [tag for tag, _ in found.seen]
    assert not set(tags) & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href"} & set(attributes) for _, attributes in found.seen)
    assert tags.count("table") == tags.count("caption") == 2
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in found.seen if tag == "th")
    assert "None" not in re.sub("<style>.*?</style>", "", compressed_page(plan), flags=re.S)


def test_what_comes_from_outside_is_escaped(plan: dict[str, Any]) -> None:
    bad = copy.deepcopy(plan)
    bad["source"]["name"] = bad["recipe"]["name"] = bad["compress"]["recipe"] = EVIL
    bad["source"]["files"][0]["path"] = bad["compress"]["calibration"]["name"] = EVIL
    bad["compress"]["notes"] = [EVIL]
    for step in bad["compress"]["steps"]:
        step["name"], step["lines"] = EVIL, [EVIL, *step["lines"]]
    bad["compress"]["steps"][0]["record"]["parts"][0]["name"] = EVIL
    html = compressed_page(bad)
    assert "<script" not in html and "&lt;script&gt;" in html
    outline(html)


def test_what_was_not_measured_says_so(plan: dict[str, Any]) -> None:
    lean = copy.deepcopy(plan)
    lean["compress"].update(calibration=None, peak_rss_bytes=None)
    lean["compress"]["steps"][0]["record"]["parts"][0]["error_after"] = None
    html = compressed_page(lean)
    assert "none was read" in html and "<b>unknown</b>" in html and "not measured" in html


def test_the_curve_falls_as_the_figures_do() -> None:
    kls, losses = (0.5, 0.2, 0.1), (None, 0.3, 0.15)
    points = [
        {"step": i, "tokens": 1000 * i, "seconds": 2.0 * i, "loss": loss, "kl": kl}
        for i, (kl, loss) in enumerate(zip(kls, losses, strict=True))
    ]
    svg = ET.fromstring(learning_curve(points))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    marks = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    floor = max(float(line.attrib["y1"]) for line in svg.iter("line"))
    assert [x for x, _ in marks] == sorted(x for x, _ in marks)
    assert all(0 < x < width and 0 < y < height for x, y in marks)
    heights = [floor - y for _, y in marks]
    assert heights[0] / heights[2] == pytest.approx(5.0, rel=0.02)  # from zero, not from the lowest
    loss = next(line for line in svg.iter("polyline") if "second" in line.attrib["class"])
    assert len(loss.attrib["points"].split()) == 2  # before the first step there is none
    assert learning_curve([]) == ""


def test_a_curve_without_training() -> None:
    """Stopped before the first step: one point, no division by nothing."""
    ET.fromstring(learning_curve([{"step": 0, "tokens": 0, "seconds": 0.0, "loss": None, "kl": 0.0}]))
