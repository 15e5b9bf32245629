"""`hasten show` on tiny models and on an artifact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import main


def shown(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main(["show", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_what_a_gguf_file_is(tiny_gguf: Callable[..., Any], capsys: Any) -> None:
    path, _ = tiny_gguf("llama-wide", "Q4_K")
    found = shown(capsys, str(path), "--context", "100")
    assert (found["architecture"], found["layers"], found["width"]) == ("llama", found["layers"], 256)
    assert set(found["formats"]["q"]) == {"Q4_K"} and next(iter(found["formats"])) == "embed"
    mixer = (found["kv_heads"], found["head_dim"])
    assert found["memory"]["kv_bytes"] == found["layers"] * 2 * 2 * 100 * mixer[0] * mixer[1]
    assert found["memory"]["bytes"] > found["memory"]["weight_bytes"] > 0
    assert found["tokenizer"]["templates"] == ["default"]
    assert main(["show", str(path)]) == 0
    assert "q: Q4_K" in capsys.readouterr().out


def test_what_is_unusual_is_said_on_stdout(
    tiny_folder: Callable[..., Path], tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20}')
    found = shown(capsys, str(folder))
    assert any("file's own head is used" in line for line in found["unusual"])
    assert found["tokenizer"]["sampling"] == {"temperature": 0.6, "top_k": 20.0}
    (folder / "tokenizer.json").write_text("{")
    found = shown(capsys, str(folder))
    assert found["tokenizer"] is None and any("tokenizer cannot be used" in line for line in found["unusual"])
    assert main(["show", str(tmp_path / "gone")]) == 1
