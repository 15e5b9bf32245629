"""`hasten estimate`: from a configuration alone, at once, with errors that say what next."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hasten.bench import calibrate
from hasten.cli import main

sys.path.append(str(Path(__file__).parents[1] / "speed"))
from paces import machine

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with the config.json of a 70B and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    return tmp_path


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was calibrated."""
    monkeypatch.setattr(calibrate, "kept", lambda threads=None: machine(noise=0.05))


def estimated(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(["estimate", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_a_70b_without_its_weights_takes_under_a_second(config: Path, timed: None, capsys: Any) -> None:
    main(["estimate", str(config), "--machine", "h200"])  # imports
    capsys.readouterr()
    started = time.process_time()
    found = estimated(capsys, str(config), "--context", "4096,32768", "--rate", "0.01")
    assert time.process_time() - started < 1.0
    assert len(found["estimates"]) == 3 * 2 * 2 and len(found["fleets"]) == 3 * 2
    first = found["estimates"][0]
    assert first["recipe"] == "bf16" and found["parameters"] == 69_501_714_432
    assert first["weight_bytes"] == 2 * 69_501_714_432
    assert first["memory"]["weights"] == 2 * (69_501_714_432 + 128256 * 8192)
    assert first["memory"]["keys_and_values"] == 4096 * 80 * 2 * 8 * 128 * 2
    assert found["machine"]["is_measured"]
    for one in found["estimates"]:
        assert one["ttft_ms"]["low"] < one["ttft_ms"]["value"] < one["ttft_ms"]["high"]
    narrow = next(one for one in found["estimates"] if one["recipe"] == "w4")
    assert narrow["tpot_ms"]["value"] < first["tpot_ms"]["value"]
    helps = next(one["would_help"] for one in found["recipes"] if one["recipe"] == "bf16")
    assert any(help["what"] == "weights in 4 bits" and help["time"] < 0.97 for help in helps)


def test_a_disturbed_calibration_is_told(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from dataclasses import replace

    disturbed = replace(machine(), untrusted=98, timed=215)
    monkeypatch.setattr(calibrate, "kept", lambda threads=None: disturbed)
    estimated_with = main(["estimate", str(config), "--recipe", "w4", "--json"])
    captured = capsys.readouterr()
    assert estimated_with == 0 and json.loads(captured.out)["calibration"]["untrusted"] == 98
    assert "98 of 215 times were disturbed" in captured.err and "--calibrate" in captured.err


def test_published_peaks_are_marked(config: Path, capsys: Any) -> None:
    assert (
        main(["estimate", str(config), "--machine", "h200", "--tensor-parallel", "2", "--recipe", "fp8"]) == 0
    )
    out = capsys.readouterr().out
    assert "2 x NVIDIA H200 SXM: published peaks, not measured" in out and "fp8" in out
    assert main(["estimate", str(config), "--machine", "l4", "--recipe", "w4", "--rate", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "copies for 0.5 requests a second" in out


def test_a_file_that_is_there_gives_its_own_formats(tiny_gguf: Any, timed: None, capsys: Any) -> None:
    path, _ = tiny_gguf("llama-wide", "Q8_0")
    found = estimated(capsys, str(path), "--prompt", "20", "--output", "4", "--batch", "1")
    assert [one["recipe"] for one in found["estimates"]] == ["source", "w4"]
    assert 8.0 < found["estimates"][0]["bits_per_weight"] <= 16.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine", "h2000"], "no machine"),
        (["--batch", "0"], "--batch takes whole numbers"),
        (["--batch", "1,x"], "--batch takes whole numbers"),
        (["--context", "100"], "no room"),
        (["--prompt", "200000"], "more than the model's context"),
        (["--recipe", "w3"], "unknown recipe"),
        (["--recipe", "mix:1%"], "mixture"),
        (["--workload", "speed"], "unknown workload"),
        (["--cached", "1.5"], "between 0 and 1"),
        (["--accepted", "2"], "cannot be accepted"),
        (["--tensor-parallel", "2"], "for GPUs"),
        (["--rate", "0"], "--rate must be above 0"),
        (["--recipe", "fp8"], "no kernel"),
    ],
)
def test_mistakes_have_hints(arguments: list[str], said: str, config: Path, timed: None, capsys: Any) -> None:
    assert main(["estimate", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and "hint: " in error and "Traceback" not in error


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert main(["estimate", str(tmp_path), "--machine", "h100"]) == 1
    assert "resnet" in capsys.readouterr().err
