"""`hasten bench`: its document and its errors, without running an engine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hasten.bench import compare as bout_module
from hasten.bench.compare import Comparison, Outcome
from hasten.bench.figures import Ratio, Sample
from hasten.bench.measure import measurement_of, with_ceilings
from hasten.cli import main
from hasten.core import Accelerator, Machine, Workload
from hasten.errors import PeerError
from hasten.speed.cost import Cost

MACHINE = Machine("A Processor", ("scalar",), 2, None, None, None, None, read_gb_per_s=50.0)


def outcome(name, speed):
    run = Sample(512, 512 / speed, 127, 127 / speed, ((1, 2),))
    measured = measurement_of(
        [run] * 3,
        Workload(),
        engine=name.partition(":")[0],
        version="1",
        form="w4",
        weight_bytes=10,
        threads=2,
        peak_rss_bytes=None,
    )
    return Outcome(name, measured, (run,) * 3, "", "text")


def comparison(failed=None):
    ratio = Ratio(2.0, 1.9, 2.1, 3)
    peers = {} if failed else {"llama.cpp:q4_0": outcome("llama.cpp:q4_0", 50)}
    ratios = {name: {"decode": ratio, "prefill": ratio} for name in peers}
    return Comparison("demo", outcome("hasten:w4", 100), peers, ratios, failed or {})


@pytest.fixture
def asked(monkeypatch):
    requests = []

    def bout(request, say):
        requests.append(request)
        return comparison(), MACHINE

    monkeypatch.setattr(bout_module, "bout", bout)
    monkeypatch.delenv("HASTEN_PEER_PYTHON", raising=False)
    return requests


def test_the_document(asked, capsys):
    flags = ["--recipe", "w4", "--against", "llama.cpp:q4_0", "--against", "transformers", "--threads", "2"]
    assert main(["bench", "demo", *flags, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert asked[0].against == ("llama.cpp:q4_0", "transformers") and asked[0].threads == 2
    assert asked[0].workload == Workload(512, 128, 1) and asked[0].runs == 5
    wanted = {"engine", "version", "format", "weight_bytes", "peak_rss_bytes"}
    figures = {"prefill_tok_per_s", "decode_tok_per_s", "ttft_ms", "tpot_ms"}
    for entry in (record["subject"], *record["peers"]):
        assert wanted | figures <= set(entry)
        for figure in figures:
            assert set(entry[figure]) == {"median", "p10", "p90", "n", "values"}
            assert len(entry[figure]["values"]) == 3
    assert record["subject"]["fraction_of_read_ceiling"] is None
    assert record["ratios"]["llama.cpp:q4_0"]["decode"] == 2.0
    assert record["machine"]["read_gb_per_s"] == 50.0 and record["workload"]["prompt"] == 512


def test_the_report_of_a_benchmark(asked, capsys, tmp_path):
    assert main(["bench", "demo", "--against", "llama.cpp:q4_0", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    record["model"] = "<script>"
    record["failed"] = {"openvino:int4": {"error": "<b>killed</b>", "hint": None}}
    for one in (record["subject"], *record["peers"]):
        one["gaps_ms"] = [5.0 + place for place in range(22)]
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(record))
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'speed.html'}\n"
    page = (tmp_path / "speed.html").read_text()
    assert "<script" not in page and "<b>killed" not in page
    for said in (
        "llama.cpp:q4_0",
        "2.00 [1.90, 2.10]",
        "did not finish",
        "median 15.0, p99 25.0 ms",
        "512 tokens in",
    ):
        assert said in page, said
    other = tmp_path / "other.html"
    assert main(["report", str(path), "--out", str(other)]) == 0
    assert other.read_text() == page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"subject": {}}', "is no whole result: KeyError"),
        ('{"candidates": [], "artifact": "a.hasten"}', "hint: hasten report a.hasten"),
        ('{"name": 1}', "no result to report"),
        ("[]", "no JSON object"),
    ],
)
def test_what_cannot_be_reported_is_refused(text, said, capsys, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_the_table_goes_to_stderr(asked, capsys):
    assert main(["bench", "demo"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "llama.cpp:q4_0" in shown.err and "2.00x" in shown.err and "unknown" in shown.err


def test_a_failed_peer_is_exit_1_and_the_others_are_printed(monkeypatch, capsys):
    failed = {"openvino:int4": PeerError("openvino:int4 was killed by SIGSEGV")}
    monkeypatch.setattr(bout_module, "bout", lambda request, say: (comparison(failed), MACHINE))
    assert main(["bench", "demo", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["failed"]["openvino:int4"]["error"].endswith("SIGSEGV")
    assert "hint: leave it out: drop --against openvino:int4" in shown.err


def test_a_gpus_figures_are_held_against_its_ceilings(monkeypatch, capsys):
    gpu = Accelerator("Some GPU", 80 << 30, "9.0", 4000.0, 800.0, 1500.0, 50.0, 50.0, 3.0, 9.0)
    found = comparison()
    cost = Cost(2 * 10**9, 0.0, 0.0, 2e9, 0.0, 0.0, 512 * 2e9, 0.0)
    measured = replace(found.subject.measurement, device="cuda")
    machine = replace(MACHINE, accelerators=(gpu,))
    measured = with_ceilings(measured, cost, machine)
    assert measured.fraction_of_read_ceiling == pytest.approx(100 * 2e9 / 4e12)
    assert measured.fraction_of_gpu_ceiling == pytest.approx(100 * 2e9 / 800e12)
    assert measured.fraction_of_int8_ceiling is None
    fp8 = with_ceilings(
        replace(measured, format="fp8"), replace(cost, prompt_bf16_ops=0, prompt_int8_ops=1e9), machine
    )
    assert fp8.fraction_of_gpu_ceiling == pytest.approx(100 * 1e9 / 512 / 1500e12)
    unknown = with_ceilings(measured, cost, MACHINE)
    assert unknown.fraction_of_read_ceiling is unknown.fraction_of_gpu_ceiling is None
    found = replace(found, subject=replace(found.subject, measurement=measured))
    monkeypatch.setattr(bout_module, "bout", lambda request, say: (found, machine))
    assert main(["bench", "demo", "--device", "cuda", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cuda"
    assert main(["bench", "demo", "--device", "cuda"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "of a copy's 4,000 GB/s" in said and "ceilings measured now on Some GPU" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--against", "tgi"], "unknown engine"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--against", "vllm"], "vllm is timed on cuda here, and --device is cpu"),
        (["--output", "1"], "at least 2"),
        (["--runs", "0"], "--runs"),
    ],
)
def test_what_cannot_be_measured_is_a_usage_error(flags, said, capsys):
    assert main(["bench", "demo", *flags]) == 2
    assert said in capsys.readouterr().err
