"""`hasten cache replay`: table, document, plot, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hasten.cli.cache import replay
from hasten.engine.request import Request, Usage
from hasten.engine.trace import TraceModel, TraceWriter
from hasten.errors import FormatError, UsageError


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    writer = TraceWriter(tmp_path / "t.jsonl")
    model = TraceModel("<tiny>", 32, 1000, 20, 4, True, 1.0, 0.01)
    usage = Usage(100, 60, 0, 0, 0, 0, 0.0, 100.0, 100.0)
    for n in range(20):
        writer.add(model, Request((*range(100), n % 7)), [[1, 2]], usage)
    writer.close()
    return tmp_path / "t.jsonl"


def test_the_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay(trace)
    out, err = capsys.readouterr()
    assert out == "" and "<tiny>: 20 requests, 2,020 prompt tokens" in err
    assert [line.split()[0] for line in err.splitlines() if "%" in line][:4] == [
        "lru",
        "lfu",
        "s3fifo",
        "cost",
    ]
    assert "recording found 59.4 %" in err


def test_the_document_and_the_plot(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "p.svg"
    replay(trace, policy="lru,cost", ram_gb="0.000006,0.00002", disk_gb="0,1", plot=plot, json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["schema_version"] and found["model"]["model"] == "<tiny>"
    assert len(found["results"]) == 8
    assert {r["policy"] for r in found["results"]} == {"lru", "cost"}
    assert all(0 < r["hit_ratio"] < 1 for r in found["results"])
    root = ElementTree.fromstring(plot.read_text())
    drawn = [element.tag.rpartition("}")[2] for element in root.iter()]
    assert drawn.count("polyline") == 4
    assert "&lt;tiny&gt;" in plot.read_text() and "lru with" in plot.read_text()


def test_one_size_is_drawn_too(trace: Path, tmp_path: Path) -> None:
    replay(trace, plot=tmp_path / "p.svg")
    assert ElementTree.fromstring((tmp_path / "p.svg").read_text()) is not None


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"policy": "lru,fifo"}, "'fifo'"),
        ({"ram_gb": "1,x"}, "'x'"),
        ({"ram_gb": "-1"}, "sizes"),
        ({"disk_gb": "nan"}, "sizes"),
        ({"ram_gb": "0"}, "no page"),
        ({"model": "other"}, "other"),
    ],
)
def test_wrong_flags(trace: Path, flags: dict[str, str], what: str) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        replay(trace, **flags)
    assert caught.value.hint


def test_a_file_that_is_no_trace(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello\n")
    with pytest.raises(FormatError):
        replay(tmp_path / "x")
