"""`hasten compress`: what it prints, what it refuses, Ctrl-C."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from hasten.cli import main
from hasten.cli.console import Ticker
from hasten.models.artifact import load_artifact
from hasten.models.text_stream import TokenizerFields
from hasten.models.tokenizer import Tokenizer
from hasten.quality.text import default_text

RECIPE = """
name: my recipe
default: w4
head: w8
layers: {layers.*.q: w6}
prune: [{kind: ffn, amount: 0.34}]
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything happens in a folder of its own."""
    monkeypatch.setenv("HASTEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tiny_folder: Callable[..., Path]) -> str:
    return str(tiny_folder("llama"))


def test_a_recipe_file(model: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "r.yaml").write_text(RECIPE)
    assert main(["compress", model, "--recipe", "r.yaml", "--tokens", "1024", "--threads", "1"]) == 0
    said = capsys.readouterr()
    made = Path(f"{Path(model).name}-my-recipe.hasten")
    assert load_artifact(made).packed.config.blocks[0].feed_forward.width == 64
    lines = said.out.splitlines()
    assert lines[0].startswith("prune ffn  prune ffn: 192 of 288 FFN channels kept  (")
    assert any(line.startswith("quantise ") and "bits a weight" in line for line in lines)
    assert any(line.startswith("note ") and "different widths" in line for line in lines)
    assert "text       1,024 tokens of pydoc_data.topics" in lines
    assert lines[-1].startswith(f"{made}  0.") and " MB, " in lines[-1] and lines[-1].endswith(" GB")
    assert f"hint: what it costs in quality: hasten eval {made}" in said.err
    assert "prune ffn" in said.err and "quantise" in said.err


def test_one_json_document(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", model, "--recipe", "w4-head8", "--out", "o.hasten", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["artifact"] == "o.hasten" and document["recipe"] == "w4-head8"
    assert document["bytes"] == sum(file.stat().st_size for file in Path("o.hasten").iterdir())
    assert 4.5 < document["bits_per_weight"] < 8.5
    assert [step["name"] for step in document["steps"]] == ["quantise"]
    assert document["calibration"] is None and document["notes"] == []
    assert "<h2>quantise, " in Path("o.hasten/report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--recipe", "w4bits"], 2, "unknown recipe 'w4bits'"),
        (["--recipe", "nothing.yaml"], 2, "nothing.yaml: No such file"),
        (["--recipe", "typo.yaml"], 2, "did you mean default"),
        (["--recipe", "layer.yaml"], 2, "near it: layers.2.down"),
        (["--recipe", "both.yaml"], 2, "contradictory rules for layers.0.q"),
        (["--recipe", "group.yaml"], 2, "groups of 32 do"),
        (["--recipe", "mix:1%"], 2, "--max-ppl-increase 1%"),
        (["--recipe", "w4-gptq", "--calibration", "little.txt"], 2, "too few"),
        (["--recipe", "w4-gptq", "--calibration", "empty.txt"], 2, "too few"),
        (["--recipe", "w4-gptq", "--calibration", "missing.txt"], 2, "No such file"),
        (["--recipe", "w4", "--calibration", "little.txt"], 2, "reads no calibration text"),
        (["--recipe", "w4", "--out", "typo.yaml"], 1, "may be replaced"),
        (["--recipe", "w4", "--tokens", "0"], 2, "--tokens"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, what: str, model: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "typo.yaml").write_text("defualt: w4")
    (place / "layer.yaml").write_text("{default: w4, layers: {layers.7.down: w8}}")
    (place / "both.yaml").write_text("{default: w4, layers: {layers.0.*: w8, layers.*.q: w6}}")
    (place / "group.yaml").write_text("default: w4-g64")
    (place / "little.txt").write_text("a few words")
    (place / "empty.txt").write_text("")
    before = sorted(place.rglob("*"))
    assert main(["compress", model, *arguments]) == code
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error: ") == 1 and what in said.err
    assert sorted(place.rglob("*")) == before


def test_ctrl_c_says_how_to_go_on(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.compress.compress.pack_model", stop)
    assert main(["compress", model, "--recipe", "w4"]) == 130
    assert "run the same command again to go on from there" in capsys.readouterr().err
    assert not list(Path().glob("*.hasten"))


def test_time_left_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("hasten.cli.console.time.monotonic", lambda: now[0])
    with Ticker() as ticker:
        for second, layer, left in (
            (0, 0, None),
            (10, 1, 240.0),
            (31, 3, 220.0),
            (40, 4, 60.0),
            (62, 9, 6000.0),
        ):
            now[0] = float(second)
            ticker.count("quantise", layer, 24, detail="a layer", seconds_left=left)
    assert capsys.readouterr().err.splitlines() == [
        "[  0.0 s] quantise",
        "[ 31.0 s] quantise 3 of 24, a layer, about 4 min left",
        "[ 62.0 s] quantise 9 of 24, a layer, about 1.7 h left",
    ]


def test_help_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from hasten.cli import main; assert main(['compress', '--help']) == 0; "
        "found = {'torch', 'numpy', 'yaml'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_models_whose_names_begin_alike(
    tiny_folder: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dots of Llama-3.2-1B belong to its name, and no model writes over another's artifact."""
    for name, kind in (("Llama-3.2-1B", "llama"), ("Llama-3.2-3B", "mistral")):
        shutil.copytree(tiny_folder(kind), place / "of" / name)
        assert main(["compress", f"of/{name}", "--recipe", "w4"]) == 0
    assert sorted(p.name for p in place.glob("*.hasten")) == [
        "Llama-3.2-1B-w4.hasten",
        "Llama-3.2-3B-w4.hasten",
    ]
    (place / "of" / "Llama-3.2-1B").rename(place / "Llama-3.2-1B")  # moved: its files are the same
    assert main(["compress", "Llama-3.2-1B", "--recipe", "w4"]) == 0
    capsys.readouterr()
    shutil.copytree(tiny_folder("mistral"), place / "other" / "Llama-3.2-1B")
    before = (place / "Llama-3.2-1B-w4.hasten" / "plan.json").read_bytes()
    assert main(["compress", "other/Llama-3.2-1B", "--recipe", "w4"]) == 1
    said = capsys.readouterr().err
    assert "another model" in said and str(place / "Llama-3.2-1B") in said and "--force" in said
    assert (place / "Llama-3.2-1B-w4.hasten" / "plan.json").read_bytes() == before
    assert main(["compress", "other/Llama-3.2-1B", "--recipe", "w4", "--force"]) == 0
    assert load_artifact("Llama-3.2-1B-w4.hasten").packed.config.architecture == "mistral"


def test_another_training_of_the_same_size_is_another_model(
    tiny_folder: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in ("a", "b"):
        shutil.copytree(tiny_folder("llama"), place / run / "checkpoint")
    weights = place / "b" / "checkpoint" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # a bit of the last weight
    weights.write_bytes(data)
    assert main(["compress", "a/checkpoint", "--recipe", "w4"]) == 0
    assert main(["compress", "b/checkpoint", "--recipe", "w4"]) == 1
    assert "another model" in capsys.readouterr().err


def test_a_damaged_artifact_may_be_made_again(model: str, place: Path) -> None:
    (place / "x.hasten").mkdir()
    (place / "x.hasten" / "plan.json").write_text("{")
    assert main(["compress", model, "--recipe", "w4", "--out", "x.hasten"]) == 0


def wordy(folder: Path, tiny_folder: Callable[..., Path]) -> Path:
    """A tiny model with 400 tokens, so that some of them can go."""
    shutil.copytree(tiny_folder("llama"), folder)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=399, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator([default_text().calibration[:20_000]], trainer)
    backend.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    end = backend.token_to_id("<|end|>")
    Tokenizer(lambda: backend, TokenizerFields(None, (end,), 400, {"eos_token": "<|end|>"})).save(folder)
    tensors = load_file(folder / "model.safetensors")
    seed = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(400, tensors[name].shape[1], generator=seed).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.update(vocab_size=400, eos_token_id=end, bos_token_id=None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize("pruned", ["vocabulary", "ffn"])
def test_the_printed_hint_works(
    pruned: str, tiny_folder: Callable[..., Path], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model from a folder of one's own, and one with a smaller vocabulary than its source."""
    model = wordy(place / "somewhere" / "v1.5-base", tiny_folder)
    amount = {"vocabulary": 0.2, "ffn": 0.34}[pruned]
    (place / "r.yaml").write_text(f"{{default: w8, prune: [{{kind: {pruned}, amount: {amount}}}]}}")
    assert main(["compress", str(model), "--recipe", "r.yaml", "--tokens", "1024", "--threads", "1"]) == 0
    (hint,) = [line for line in capsys.readouterr().err.splitlines() if "hasten eval" in line]
    command = shlex.split(hint[hint.index("hasten eval") :])
    assert main([*command[1:], "--tokens", "600", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] >= 600 and document["ppl_source"] > 1 and document["kl_mean"] > 0
    model.rename(place / "gone")
    assert main([*command[1:], "--tokens", "600"]) == 2
    said = capsys.readouterr().err
    assert str(model) in said and "--against" in said
    assert main([*command[1:], "--tokens", "600", "--against", "gone", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kl_mean"] == document["kl_mean"]
