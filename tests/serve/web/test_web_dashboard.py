"""The Grafana dashboard: every metric and label it asks for is one that the server reports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

DASHBOARD = json.loads((Path(__file__).parents[3] / "docs/grafana/hasten.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]


@pytest.fixture(scope="module")
def reported() -> dict[str, set[str]]:
    """Name of every series the server reports -> its labels: a real page, after one answer of everything."""
    from hasten.engine.request import EngineStats, Usage
    from hasten.serve.metrics import Metrics

    class Engines:
        def loaded(self) -> list[tuple[str, EngineStats]]:
            return [("m", EngineStats(**{field.name: 1 for field in fields(EngineStats)}))]

    metrics = Metrics(["/v1/models"])
    metrics.watch(Engines().loaded)
    metrics.http("GET", "/v1/models", 200)
    metrics.answered_from_memory("m")
    usage = Usage(
        prompt_tokens=3,
        cached_tokens=0,
        output_tokens=3,
        drafted_tokens=0,
        accepted_tokens=0,
        preemptions=0,
        queue_ms=1.0,
        ttft_ms=2.0,
        e2e_ms=9.0,
    )
    metrics.finished("m", "stop", usage, [0.01])
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(hasten_\w+)(?:\{(.*?)\})? ", metrics.render().decode(), re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


def asked(query: str) -> Iterator[tuple[str, set[str]]]:
    """(series, labels it is chosen by) of a query."""
    for name, labels in re.findall(r"(hasten_\w+)\{(.*?)\}", query):
        yield name, set(re.findall(r"(\w+)=~?", labels)) - {"instance"}


@pytest.mark.parametrize("query", QUERIES)
def test_every_series_exists(query: str, reported: dict[str, set[str]]) -> None:
    series = list(asked(query))
    assert series and len(series) == query.count("hasten_")
    for name, labels in series:
        assert name in reported, name
        assert labels <= reported[name], (name, labels)
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert set(group.split(", ")) <= reported[name], (name, group)
        assert ("rate(" + name in query or "increase(" + name in query) == name.endswith(
            ("_total", "_bucket")
        )


def test_every_series_of_weight_is_shown(reported: dict[str, set[str]]) -> None:
    shown = {name for query in QUERIES for name, _ in asked(query)}
    kinds = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in reported}
    missing = kinds - {re.sub(r"_bucket$", "", name) for name in shown}
    counters = {name.removesuffix("_total") for name in shown}
    assert missing - counters <= {"hasten_engine_requests_total"}  # finished, cancelled and refused are shown


def boxes() -> Iterator[tuple[str, Any]]:
    for panel in DASHBOARD["panels"]:
        yield panel["title"], panel["gridPos"]


def test_panels_lie_side_by_side() -> None:
    cells = [
        (x, y)
        for _, box in boxes()
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_variables_are_declared() -> None:
    used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(DASHBOARD)))
    assert used <= {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in PANELS)
