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
from hasten.cli import main
from hasten.core import Budget
from hasten.optimize.choice import Aims
from hasten.optimize.search import Effort, Search
from hasten.report import STYLE
from hasten.report.charts import (
    Bar,
    Foretold,
    Spread,
    bars,
    foretold,
    frontier,
    points_of,
    predictor,
    reached,
    roof_of,
    roofline,
    spreads,
)
from hasten.report.optimized import factors, optimized_page

EVIL = "<script>alert('x')</script>\"&"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """plan.json of a search."""
    folder: Path = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_CACHE", str(folder / "cache"))
        workshop = FakeWorkshop(kept_bits=8)
        text = workshop.text(evaluation=4097)
        search = Search(workshop, Aims(Budget(0.01)), text, Effort(tokens=4096))
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
    sections = (
        *(
            "What was asked",
            "What was chosen, and why",
            "Speed against quality",
            "Where the speed comes from",
        ),
        *("How long tokens take", "Memory", "Cost and energy", "Everything that was tried"),
        *("Why not the others", "How this was measured", "How to repeat it"),
    )
    places = [html.index(f">{one}<") for one in sections]
    assert places == sorted(places)
    assert "hasten optimize" in html[places[-1] :]
    assert "unknown: no price" in html
    assert "unknown: no counter" in html


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
    figures = [attributes for tag, attributes in found.seen if tag == "svg"]
    assert len(figures) >= 5
    assert all(svg["role"] == "img" for svg in figures)
    named = [name for svg in figures for name in str(svg["aria-labelledby"]).split()]
    there = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
    assert sorted(named) == sorted(there)
    assert len(set(named)) == len(named)
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
    tried = [c for c in plan["search"]["candidates"] if c["recipe"] in places]
    closest, furthest = (end(tried, key=lambda c: c["verdict"]["kl_mean"])["recipe"] for end in (min, max))
    assert places[closest][0] < places[furthest][0]
    fastest, slowest = (end(tried, key=lambda c: c["weight_bytes"])["recipe"] for end in (min, max))
    assert places[fastest][1] < places[slowest][1]


def test_speed_that_was_not_measured_is_predicted_and_hollow(plan: dict[str, Any]) -> None:
    points = {p.name: p for p in points_of(plan["search"])}
    out = next(c for c in plan["search"]["candidates"] if c["measurement"] is None)
    name, size = out["recipe"], out["weight_bytes"]
    assert not points[name].measured
    assert points[name].speed == pytest.approx(1e6 / (500 + size), rel=1e-6)  # the fake's own rule
    assert 'class="fail hollow"' in frontier(plan["search"])


def test_no_prediction_from_one_measurement(plan: dict[str, Any]) -> None:
    lone = {**plan["search"], "candidates": []}
    assert predictor(lone)(1000.0) is None
    assert frontier(lone) == ""


def measured(tpot: float, ttft: float, read: float) -> dict[str, Any]:
    """A measurement of 11 tokens in and 11 out."""
    return {
        "ttft_ms": {"median": ttft},
        "tpot_ms": {"median": tpot},
        "decode_tok_per_s": {"median": 1000 / tpot},
        "prefill_tok_per_s": {"median": 11_000 / ttft},
        "workload": {"prompt": 11, "output": 11, "batch": 1},
        "decode_bytes": read,
        "decode_ops": 2e9,
        "prompt_bytes": read,
        "prompt_ops": 22e9,
    }


def test_a_speedup_is_split_into_factors_that_multiply_to_it() -> None:
    """Half the bytes halve the decode steps; the rest of the gain is a higher rate."""
    found = factors(measured(10.0, 100.0, 1e9), measured(4.0, 50.0, 0.5e9))
    assert found is not None
    assert (found.start_ms, found.end_ms) == (200.0, 90.0)
    assert found.after_algorithm_ms == pytest.approx(100 + 10 * 5)
    assert found.algorithm * found.hardware == pytest.approx(found.whole)
    assert found.hardware == pytest.approx(150 / 90)
    slower = factors(measured(10.0, 100.0, 1e9), measured(12.0, 100.0, 0.5e9))
    assert slower is not None
    assert slower.hardware < 1
    unknown = {**measured(10.0, 100.0, 0.0), "weight_bytes": None}
    assert factors(unknown, measured(4.0, 50.0, 1e9)) is None


def test_marks_of_the_roofline_stand_where_the_figures_say() -> None:
    machine = {"read_gb_per_s": 50.0, "int8_tops": 2.0, "bf16_tflops": None}
    roof, ceilings = roof_of(machine, "cpu")
    assert (roof, [one.name for one in ceilings]) == (50e9, ["int8"])
    decode, prompt = reached("w4", measured(20.0, 44.0, 1e9), strong=True)
    assert (decode.ops_per_byte, decode.ops_per_s) == (2.0, pytest.approx(1e11))
    assert (prompt.ops_per_byte, prompt.ops_per_s) == (22.0, pytest.approx(5e11))
    svg = ET.fromstring(roofline(roof, ceilings, [decode, prompt]))
    (circle,) = svg.iter("circle")
    (square,) = svg.iter("rect")
    (slope,) = svg.iter("polyline")
    start, end = (tuple(map(float, pair.split(","))) for pair in slope.attrib["points"].split())
    x, y = float(circle.attrib["cx"]), float(circle.attrib["cy"])
    roof_there = start[1] + (end[1] - start[1]) * (x - start[0]) / (end[0] - start[0])
    assert y == pytest.approx(roof_there, abs=0.2)  # 1e9 bytes in 20 ms are just what the memory gives
    assert float(square.attrib["x"]) > x
    assert float(square.attrib["y"]) < y
    assert "above the roof" in roofline(0.8 * roof, ceilings, [decode, prompt])  # it was measured too low
    assert roofline(None, ceilings, [decode]) == ""
    assert roofline(roof, [], [decode]) == ""
    gpu = {"accelerators": [{"copy_gb_per_s": 4000.0, "bf16_tflops": 800.0, "fp8_tflops": None}]}
    assert roof_of(gpu, "cuda")[0] == 4e12


def test_listed_charts_are_valid_and_their_marks_lie_inside() -> None:
    shares = tuple(10.0 + number for number in range(22))
    charts = [
        bars(
            "a", "A", [Bar("one", "5 ms", 0.0, 5.0, "before"), Bar("two", "-3 ms", 2.0, 5.0, "cache")], "ms"
        ),
        spreads("b", "B", [Spread("one", shares), Spread("two", (), (3.0, 4.0))], "ms"),
        foretold("c", "C", [Foretold("one", "tok/s", 9.0, 10.0, 8.0, 11.0)]),
    ]
    for chart in charts:
        svg = ET.fromstring(chart)
        _, _, width, height = map(float, svg.attrib["viewBox"].split())
        for mark in svg.iter("rect"):
            assert (
                0 <= float(mark.attrib["x"]) <= float(mark.attrib["x"]) + float(mark.attrib["width"]) <= width
            )
        assert all(0 <= float(mark.attrib["cx"]) <= width for mark in svg.iter("circle"))
        assert all(float(one.attrib["transform"][10:-1].split()[1]) <= height for one in svg.iter("g"))
    assert "median 20.0, p99 30.0 ms" in charts[1]  # GAP_SHARES has 0.5 in the middle and 0.99 before the end
    assert "9.0 for 10.0 tok/s: -10 %" in charts[2]
    assert not any((bars("a", "A", [], "ms"), spreads("b", "B", [], "ms"), foretold("c", "C", [])))


def test_peers_stand_in_the_figure_and_in_the_list_of_losers(plan: dict[str, Any]) -> None:
    with_peer = copy.deepcopy(plan)
    candidate = next(c for c in with_peer["search"]["candidates"] if c["measurement"])
    peer = {**candidate, "name": "llama.cpp:q4_0", "because": "22 % slower."}
    del peer["recipe"]
    with_peer["search"]["peers"] = [peer]
    html = optimized_page(with_peer)
    assert "another engine" in html
    assert "another engine" not in optimized_page(plan)
    assert 'class="peer"' in html
    assert "<dt>llama.cpp:q4_0</dt><dd>22 % slower.</dd>" in html


def test_peers_come_from_a_benchmark_and_a_verdict(
    plan: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = (one for one in plan["search"]["candidates"] if one["measurement"] is not None)
    candidate = copy.deepcopy(next(timed))
    entry = {"name": "llama.cpp:q4_0", **candidate["measurement"]}
    bench = {
        "machine": plan["machine"],
        "workload": candidate["measurement"]["workload"],
        "subject": {"name": "hasten"},
        "peers": [entry],
        "ratios": {"llama.cpp:q4_0": {"decode": 1.5, "decode_interval": [1.4, 1.6]}},
    }
    quality = {**candidate["verdict"], "kl_mean": 0.097, "text": plan["text"]}
    files = {"plan": plan, "bench": bench, "quality": quality}
    files["short"] = {**bench, "workload": {**bench["workload"], "prompt": 5}}
    files["other"] = {**quality, "text": {"sha256": "0"}}
    paths = {name: tmp_path / f"{name}.json" for name in files}
    for name, value in files.items():
        paths[name].write_text(json.dumps(value))
    run = ["report", str(paths["plan"]), "--peers", str(paths["bench"])]
    assert main([*run, "--judged", f"llama.cpp:q4_0={paths['quality']}"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert 'class="peer"' in page
    assert "hasten decodes 1.50 times as fast as this (1.40 to 1.60)" in page
    assert "this is 0.097 nats from the source" in page
    assert main(run) == 0
    page = (tmp_path / "report.html").read_text()
    assert "was not judged" in page
    assert 'class="peer"' not in page  # it has no place in the figure without a divergence
    capsys.readouterr()
    for words, said in (
        ([*run[:3], str(paths["short"])], "the load differs"),
        ([*run, "--judged", f"llama.cpp:q4_0={paths['other']}"], "the text differs"),
        ([*run, "--judged", f"vllm={paths['quality']}"], "vllm was not timed"),
        ([*run, "--judged", "vllm"], "names no file"),
        ([*run[:2], "--judged", "a=b"], "--peers was not given"),
        ([*run[:3], str(paths["quality"])], "cannot stand in one report"),
    ):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "hint: " in err


def test_cost_and_energy_are_computed_where_they_are_known(plan: dict[str, Any]) -> None:
    rich = copy.deepcopy(plan)
    rich["aims"] = {"price_per_hour": 3.6, "tpot_ms": 20.0, "traffic": {"name": "chat", "about": "turns"}}
    rich["search"]["untried"] = [{"recipe": "w3", "because": "slower, as predicted"}]
    rich["seconds"] = 90.0
    rich["measurement"]["joules_per_token"] = 7.2
    work = {"prompt": 512, "output": 101, "batch": 2}
    speed = {"decode_tok_per_s": {"median": 100.0}, "ttft_ms": {"median": 20.0}}
    rich["measurement"] |= {
        "workload": work,
        **{k: {**rich["measurement"][k], **v} for k, v in speed.items()},
    }
    html = optimized_page(rich)
    # 202 tokens in 0.02 s and 200 / 100 s are 100 a second: 10,000 s at 0.001 each
    assert "10 a million tokens of answers" in html
    assert "20 ms a token" in html
    assert "1 more could not win" in html
    assert "<dt>w3</dt><dd>slower, as predicted</dd>" in html
    assert "took 1.5 minutes" in html
    assert "7.2 J a token, 2 kWh a million tokens" in html


def test_a_plan_of_an_older_version_opens(plan: dict[str, Any]) -> None:
    """Without rounds, waits and what was asked of the machine: those charts are left out."""
    old = copy.deepcopy(plan)
    found = [old["search"]["baseline"], *old["search"]["candidates"]]
    for one in [old["measurement"], *(entry["measurement"] for entry in found)]:
        for name in ("gaps_ms", "decode_bytes", "decode_ops", "prompt_bytes", "prompt_ops"):
            (one or {}).pop(name, None)
        for name in ("ttft_ms", "tpot_ms", "decode_tok_per_s", "prefill_tok_per_s"):
            (one or {}).get(name, {}).pop("values", None)
    html = optimized_page(old)
    outline(html)
    assert "Where the speed comes from" in html  # from the bytes of the weights
    assert "How long tokens take" not in html


COLOURS = re.compile(r"--(good|bad|pick|peer|ink|soft|paper): #([0-9a-f]{6})")
DEUTAN = ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969))
PROTAN = ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052))
"""Machado, Oliveira and Fernandes, 2009: how linear RGB looks without one kind of cone."""


def linear(colour: str) -> list[float]:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def luminance(rgb: list[float]) -> float:
    return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_can_be_read_and_told_apart_without_red_or_green(scheme: int) -> None:
    """Contrast of text as WCAG asks; marks of different kinds still differ for eyes that lack a cone."""
    parts = STYLE.split("prefers-color-scheme: dark")
    colours = {name: linear(value) for name, value in COLOURS.findall(parts[scheme].partition("}")[0])}
    paper = luminance(colours.pop("paper"))
    for name, colour in colours.items():
        bright, dark = sorted((luminance(colour), paper), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, name
    kinds = [colours[name] for name in ("good", "bad", "pick")]
    for matrix in (DEUTAN, PROTAN):
        seen = [[sum(m * c for m, c in zip(row, one, strict=True)) for row in matrix] for one in kinds]
        gaps = [max(abs(a - b) for a, b in zip(seen[i], seen[j], strict=True)) for i, j in ((0, 2), (1, 2))]
        assert min(gaps) > 0.1
