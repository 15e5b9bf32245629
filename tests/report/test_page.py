"""The report: whole, alone, escaped, readable by machines that read to people."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeWorkshop
from hasten.core import Budget
from hasten.optimize.search import Effort, Search
from hasten.report.optimized import frontier, optimized_page, points_of, predictor

EVIL = "<script>alert('x')</script>\"&"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """plan.json of a search."""
    folder: Path = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_CACHE", str(folder / "cache"))
        workshop = FakeWorkshop(kept_bits=8)
        text = workshop.text(evaluation=4097)
        search = Search(workshop, Budget(0.01), "latency", text, Effort(tokens=4096))
        search.run(folder / "letters.hasten")
    read: dict[str, Any] = json.loads((folder / "letters.hasten" / "plan.json").read_text())
    return read


class Outline(HTMLParser):
    """Tags that open and close in order."""

    VOID = frozenset({"meta", "br", "link", "img", "i/"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    found.close()
    assert not found.open
    return found


def test_everything_is_in_it(plan: dict[str, Any]) -> None:
    html = optimized_page(plan)
    for candidate in plan["search"]["candidates"]:
        assert html.count(candidate["recipe"]) >= 3  # figure, table, reasons
        assert candidate["because"].split(";")[0].split("(")[0] in html
    for word in ("layer 1", "gate_up", "head", plan["text"]["sha256"], "letters.hasten", "paired bootstrap"):
        assert word in html


def test_it_stands_alone(plan: dict[str, Any]) -> None:
    html = optimized_page(plan)
    found = outline(html)
    assert not {tag for tag, _ in found.seen} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in found.seen:
        assert not {"src", "href", "xlink:href"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


def test_it_can_be_read_aloud_and_on_a_phone(plan: dict[str, Any]) -> None:
    found = outline(optimized_page(plan))
    tags = [tag for tag, _ in found.seen]
    assert tags.count("table") == tags.count("caption") == 2
    (svg,) = [attributes for tag, attributes in found.seen if tag == "svg"]
    assert svg["role"] == "img"
    assert svg["aria-labelledby"] == "f-title f-desc"
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in found.seen if tag == "th")
    assert any(a.get("name") == "viewport" for tag, a in found.seen if tag == "meta")
    assert ("html", {"lang": "en"}) in found.seen
    assert "prefers-color-scheme: dark" in optimized_page(plan)


def test_what_comes_from_outside_is_escaped(plan: dict[str, Any]) -> None:
    bad = copy.deepcopy(plan)
    bad["model"] = bad["machine"]["cpu"] = bad["machine"]["os"] = bad["text"]["name"] = EVIL
    bad["search"]["artifact"] = bad["versions"]["hasten"] = EVIL
    bad["because"] = [EVIL, EVIL]
    bad["sensitivity"][0].update(group=EVIL, layout=EVIL)
    chosen = bad["search"]["chosen"] = "w4" + EVIL
    for candidate in bad["search"]["candidates"]:
        candidate["because"] = EVIL
        candidate["verdict"]["status"] = EVIL
    bad["search"]["candidates"][0]["recipe"] = chosen
    html = optimized_page(bad)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    outline(html)
    ET.fromstring(frontier(bad["search"]))


def test_unknown_is_called_unknown(plan: dict[str, Any]) -> None:
    assert plan["machine"]["read_gb_per_s"] is None
    html = optimized_page(plan)
    assert "unknown GB/s" in html
    assert "None" not in html
    assert "nan" not in re.sub("<style>.*</style>", "", html)


def test_without_a_sensitivity_map(plan: dict[str, Any]) -> None:
    html = optimized_page({**plan, "sensitivity": []})
    assert "Where few bits hurt" not in html
    outline(html)


def test_the_figure_is_valid_and_its_marks_lie_inside(plan: dict[str, Any]) -> None:
    svg = ET.fromstring(frontier(plan["search"]))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    circles = [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]
    assert circles
    assert all(0 < x < width and 0 < y < height for x, y in circles)
    marks = len(circles) + len(list(svg.iter("polygon")))
    assert marks == len(plan["search"]["candidates"])


def test_faster_is_higher_and_closer_is_left(plan: dict[str, Any]) -> None:
    svg = ET.fromstring(frontier(plan["search"]))
    places = {}
    for circle in svg.iter("circle"):
        title = circle.find("title")
        assert title is not None
        assert title.text
        places[title.text.split(":")[0]] = (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
    assert places["w8"][0] < places["w6"][0]
    assert places["w8"][1] > places["w6"][1]


def test_speed_that_was_not_measured_is_predicted_and_hollow(plan: dict[str, Any]) -> None:
    points = {p.name: p for p in points_of(plan["search"])}
    assert not points["w4"].measured
    size = next(c["weight_bytes"] for c in plan["search"]["candidates"] if c["recipe"] == "w4")
    assert points["w4"].speed == pytest.approx(1e6 / (500 + size), rel=1e-6)  # the fake's own rule
    assert 'class="fail hollow"' in frontier(plan["search"])


def test_no_prediction_from_one_measurement(plan: dict[str, Any]) -> None:
    lone = {**plan["search"], "candidates": []}
    assert predictor(lone)(1000.0) is None
    assert frontier(lone) == ""
