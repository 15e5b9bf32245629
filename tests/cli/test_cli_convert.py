"""`hasten convert`: what it prints, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hasten.cli import main
from hasten.core import Format, Recipe
from hasten.models.artifact import save
from hasten.models.open import open_model
from hasten.weights.packed import pack_model
from tiny_models import TINY, save_folder


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    source = open_model(save_folder(TINY["llama-wide"], tmp_path / "source"))
    base = Recipe.parse("w4-head8")
    layers = {"layers.0.o": Format.of(4, symmetric=False), "layers.1.down": Format.of(8, symmetric=False)}
    recipe = Recipe("mixture", base.default, base.head, layers)
    return save(tmp_path / "model.hasten", pack_model(source, recipe), source, {})


def test_one_json_document(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = artifact.parent / "model.gguf"
    assert main(["convert", str(artifact), "--to", "gguf", "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["format"] == "gguf" and document["path"] == str(out)
    assert document["bytes"] == out.stat().st_size
    assert document["matrices"] == {"F16": 1, "Q4_0": 12, "Q4_1": 1, "Q8_0": 2}
    assert document["exact"] is False
    (rounded,) = document["rounded"]
    assert rounded["tensor"] == "blk.1.ffn_down.weight" and 0 < rounded["relative_error"] < 2**-11


def test_text_says_what_was_rounded(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = artifact.parent / "folder"
    assert main(["convert", str(artifact), "--to", "compressed-tensors", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "int4-g32" in said.out and "rounded " in said.out and "relative error at most" in said.out
    assert "float16" in said.out and "writing" in said.err
    assert (out / "model.safetensors").is_file()


def test_the_place_has_a_default(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact.parent)
    assert main(["convert", str(artifact), "--to", "gguf"]) == 0
    assert main(["convert", "model.hasten", "--to", "gptq"]) == 0
    assert Path("model.gguf").is_file() and Path("model-gptq/config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["{artifact}", "--to", "tflite"], 2, "formats: gguf, compressed-tensors, gptq, openvino, onnx"),
        (["{artifact}", "--to", "gguf:q4_k_x"], 2, "did you mean q4_k_m?"),
        (["{artifact}", "--to", "gguf:w8"], 2, "packed already"),
        (["none/model", "--to", "ggfu"], 2, "did you mean gguf?"),
        (["{artifact}", "--to", "gguf", "--out", "{artifact}"], 2, "is a folder"),
        (["nothing.hasten", "--to", "gguf"], 1, "there is no artifact"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, what: str, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(artifact.parent.rglob("*"))
    assert main(["convert", *(word.format(artifact=artifact) for word in arguments)]) == code
    assert what in capsys.readouterr().err
    assert sorted(artifact.parent.rglob("*")) == before


def test_a_model_in_one_step(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(artifact.parent)
    assert main(["convert", "source", "--to", "gguf:q4_k_m"]) == 0
    said = capsys.readouterr()
    assert "source-q4_k_m.gguf" in said.out and "13 Q4_K, 3 Q6_K" in said.out
    assert "writing tensors" in said.err and "relative error at most" in said.out
    assert main(["convert", "source", "--to", "gguf:q8_0", "--output", "other.gguf", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["model"], document["path"]) == ("source", "other.gguf")
    assert document["matrices"] == {"Q8_0": 16}


def test_the_older_name_works(artifact: Path) -> None:
    out = artifact.parent / "old.gguf"
    assert main(["export", str(artifact), "--to", "gguf", "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"GGUF"
    assert main(["export", "--help"]) == 0


def test_force_replaces(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = artifact.parent / "model.gguf"
    command = ["convert", str(artifact), "--to", "gguf", "--out", str(out)]
    out.write_bytes(b"precious")
    assert main(command) == 1
    assert "--force" in capsys.readouterr().err and out.read_bytes() == b"precious"
    assert main([*command, "--force"]) == 0
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_graphs_are_exact_folders(to: str, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = artifact.parent / to
    assert main(["convert", str(artifact), "--to", to, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["exact"] is True and document["rounded"] == []
    assert document["matrices"] == {"i4-g32": 12, "i8-g32": 2, "u4-g32": 1, "u8-g32": 1}
    assert document["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert main(["convert", str(artifact), "--to", to, "--out", str(out)]) == 1
    assert "--force" in capsys.readouterr().err


def test_it_imports_no_torch() -> None:
    import subprocess

    code = (
        "import importlib, sys, hasten.cli.convert; from hasten.export import FORMATS; "
        "places = [f.place.partition(':')[0] for f in FORMATS.values() if f.package is None]; "
        "[importlib.import_module(place) for place in places]; "
        "sys.exit(any(m in sys.modules for m in ('torch', *(f.package for f in FORMATS.values()))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
