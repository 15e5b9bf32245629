"""`hasten bench --rate`: a load on a server of a tiny model, and what is refused before one is started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import main

WORK = {"name": "tiny", "prompt": [4, 8, 16], "output": [3, 4, 5], "shared": 48, "ttft_ms": 60_000}


def bench(*flags: str) -> int:
    return main(["bench", *flags])


def test_a_load_on_a_server_of_its_own(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    work = tmp_path / "work.json"
    work.write_text(json.dumps(WORK))
    flags = [str(tiny_folder("llama")), "--workload", str(work), "--rate", "20", "--requests", "6"]
    assert bench(*flags, "--threads", "1", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    load = record["load"]
    assert (load["workload"], load["rate"], load["count"]) == ("tiny", 20.0, 6)
    assert (load["goodput"], load["failed"], load["refused"]) == (1.0, 0.0, 0.0)
    assert load["cached"] > 0.3  # of 48 tokens that all prompts begin with, and 4 to 16 of their own
    for row in load["requests"]:
        assert 3 <= row["output_tokens"] <= 5
        assert 0 < row["ttft_ms"] <= row["latency_ms"]
    assert record["machine"]["cores"] >= 1
    path = tmp_path / "load.json"
    path.write_text(json.dumps(record))
    limits = ("--fail-if", "goodput < 99%", "--fail-if", "ttft_ms.p95 > 60000")
    assert main(["compare", str(path), str(path), *limits, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["paired"] is True  # the same requests at the same moments
    assert compared["figures"]["goodput"]["after"] == 1.0
    assert compared["figures"]["ttft_ms"]["low"] == compared["figures"]["ttft_ms"]["high"] == 0.0
    assert main(["compare", str(path), str(path), "--fail-if", "output_tok_per_s < 1e9"]) == 3
    assert main(["report", str(path)]) == 0
    assert "<svg" in (tmp_path / "load.html").read_text()


@pytest.mark.parametrize(
    ("flags", "said", "hint"),
    [
        (["--rate", "2"], "needs a workload", "--workload chat"),
        (["--rate", "0", "--workload", "chat"], "above 0 requests", "--rate 2"),
        (["--rate", "2", "--workload", "chatt"], "unknown workload", "did you mean chat?"),
        (["--rate", "2", "--workload", "chat", "--ttft", "300"], "with its unit", "--ttft 500ms"),
        (["--rate", "2", "--workload", "chat", "--url", "ftp://x"], "no http://", "http://127.0.0.1:8000"),
        (["--rate", "2", "--workload", "chat", "--url", "http://x:y"], "no address", "http://127.0.0.1:8000"),
        (["--tpot", "20ms"], "--tpot belongs to a load", "--rate 2"),
        (["--url", "http://127.0.0.1:1"], "--url belongs to a load", "--rate 2"),
    ],
)
def test_what_makes_no_load_is_refused(
    flags: list[str], said: str, hint: str, tiny_folder: Callable[..., Path], capsys: Any
) -> None:
    assert bench(str(tiny_folder("llama")), *flags) == 2
    err = capsys.readouterr().err
    assert said in err
    assert hint in err.partition("hint:")[2]
