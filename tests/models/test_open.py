"""Finding a model: folders, files, hub ids, and the errors of each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import pytest
from safetensors.torch import load_file, save_file

from gguf_bytes import smallest_model
from hasten.errors import FormatError, ModelError
from hasten.models.open import INDEX, open_model
from hasten.models.source import file_name_of, ref_of, sha256_of


def test_a_gguf_file_and_a_folder_that_holds_one(tmp_path: Path) -> None:
    path = tmp_path / "some-model.gguf"
    path.write_bytes(smallest_model().build())
    for ref in (path, str(path), tmp_path):
        source = open_model(ref)
        assert (source.name, source.config.architecture) == ("some-model", "qwen2")
        assert [file.path for file in source.files] == [path]
    assert source.metadata["general.architecture"] == "qwen2"
    assert len(sha256_of(source.files[0])) == 64
    shutil.copy(path, tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"has 2 GGUF files: other\.gguf, some-model\.gguf"):
        open_model(tmp_path)


def test_a_folder_with_its_ends_of_text(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder("qwen2"), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 262]}')
    source = open_model(folder)
    assert source.name == "copy" and source.config.eos_token_ids == (262, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(ModelError, match="eos_token_id"):
        open_model(folder)


def test_a_head_of_its_own_where_the_configuration_ties_it(
    tiny_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    assert not open_model(folder).config.head.tied and "file's own head is used" in caplog.text
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    source = open_model(folder)
    assert source.config.head.tied and "lm_head.weight" in source.unused


def test_adapters_and_pickles_are_said_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    with pytest.raises(ModelError, match=r"a LoRA adapter, .* someone/base") as caught:
        open_model(tmp_path)
    assert f"someone/base --adapter {tmp_path}" in (caught.value.hint or "")
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"only pytorch_model\.bin") as caught:
            open_model(tmp_path)
        assert "save_pretrained" in (caught.value.hint or "")
        (tmp_path / "config.json").write_text("{}")


def test_the_tokenizer_is_built_once(tiny_folder: Callable[..., Path]) -> None:
    source = open_model(tiny_folder("qwen2"))
    assert source.tokenizer() is source.tokenizer()
    assert source.tokenizer().vocab_size > 0


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match="no file"):
        open_model(tmp_path / "gone.gguf")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ModelError, match="is an artifact"):
        open_model(tmp_path)
    (tmp_path / "plan.json").unlink()
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(FormatError, match="not a GGUF file"):
        open_model(tmp_path / "readme.txt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        open_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff\xfe", "[" * 100_000])
def test_a_config_that_is_no_json_object(tiny_folder: Callable[..., Path], tmp_path: Path, text: str) -> None:
    shutil.copy(tiny_folder("qwen2") / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=r"config\.json"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "ref", ["", "no such folder", "a/b/c", "/no/such/folder", "../gone", "x/y/z.bin", "\0"]
)
def test_what_is_neither_a_path_nor_an_id(ref: str) -> None:
    with pytest.raises(ModelError):
        open_model(ref)


def response(status: int) -> Any:
    """As much of an HTTP library's answer as the hub's errors look at."""
    return SimpleNamespace(
        status_code=status, headers={}, request=SimpleNamespace(headers={}, url="https://x")
    )


@pytest.mark.parametrize(
    ("raised", "message", "hint"),
    [
        (
            hub_errors.RepositoryNotFoundError("404", response=response(404)),
            "no model 'x/y'",
            "check the name",
        ),
        (hub_errors.GatedRepoError("403", response=response(403)), "gated", "hf auth login"),
        (hub_errors.LocalEntryNotFoundError("offline"), "cannot be reached", "HF_HUB_OFFLINE"),
        (hub_errors.OfflineModeIsEnabled("offline"), "cannot be reached", "HF_HUB_OFFLINE"),
        (hub_errors.HfHubHTTPError("500", response=response(500)), "failed", "try again"),
        (ConnectionError("reset"), "failed", "try again"),
        (hub_errors.HTTPError("refused"), "failed", "try again"),
        (hub_errors.RevisionNotFoundError("404", response=response(404)), "does not exist", "check"),
    ],
)
def test_what_the_hub_says_is_explained(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str, hint: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        open_model("x/y")
    assert hint in (caught.value.hint or "")


def test_offline_and_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="not in the hub's cache"):  # conftest sets HF_HUB_OFFLINE
        open_model("hasten-test/never-published")


def test_a_hub_id_opens_what_was_downloaded(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def snapshot(ref: str, **options: Any) -> str:
        asked.update(options, ref=ref)
        return str(tiny_folder("qwen3"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    source = open_model("owner/name")
    assert (source.name, source.config.architecture, asked["ref"]) == ("owner/name", "qwen3", "owner/name")
    assert "*.safetensors" in asked["allow_patterns"] and "[!a]*/*" in asked["ignore_patterns"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(ModelError, match=r"holds no config.json"):
        open_model("owner/name")


def test_gguf_models_of_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(smallest_model().build())
    q4 = "UD-Q4_K_M/m-UD-Q4_K_M-0000%d-of-00002.gguf"
    names = ["README.md", "mmproj-f16.gguf", "m-Q8_0.gguf", "m-Q4_K_S.gguf", q4 % 1, q4 % 2]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo: list(names))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path / "empty"))
    asked: list[str] = []

    def fetch(repo: str, file: str) -> str:
        asked.append(file)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    (tmp_path / "empty").mkdir()
    for ref, files in (
        ("o/n:Q8_0", [names[2]]),
        ("o/n:q4_k_s", [names[3]]),
        ("o/n:Q4_K_M", [q4 % 1, q4 % 2]),
        ("o/n/" + q4 % 2, [q4 % 1, q4 % 2]),
        ("o/n", [q4 % 1, q4 % 2]),  # what most take
    ):
        asked.clear()
        open_model(ref)
        assert asked == files, ref
    with pytest.raises(ModelError, match=r"4 GGUF models|3 GGUF models, none of them with IQ2_M"):
        open_model("o/n:IQ2_M")


def test_one_file_of_a_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(smallest_model().build())
    asked: list[str] = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a: asked.extend(a) or str(path))  # type: ignore[func-returns-value]
    source = open_model("owner/name/m.gguf")
    assert asked == ["owner/name", "m.gguf"] and source.name == "owner/name/m.gguf"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", INDEX])
def test_a_pipe_in_place_of_a_file(tiny_folder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match="named pipe") as caught:
        open_model(folder)
    assert name in caught.value.message and caught.value.hint


def test_a_pipe_in_place_of_a_gguf_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="named pipe"):
        open_model(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("ref", "name"),
    [
        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"),
        ("meta-llama/Llama-3.1-8B", "Llama-3.1-8B"),
        ("Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf", "Qwen3-0.6B-Q8_0"),
        ("models/v1.5.GGUF", "v1.5"),
        ("demo", "demo"),
        ("a b\u00e9/c d", "c-d"),
        ("...", "model"),
    ],
)
def test_what_files_made_from_a_model_are_called(ref: str, name: str) -> None:
    assert file_name_of(ref) == name


def test_the_folder_here_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Llama-3.2-3B").mkdir()
    monkeypatch.chdir(tmp_path / "Llama-3.2-3B")
    assert file_name_of(".") == "Llama-3.2-3B"


def test_a_model_is_found_again_by_its_ref(
    tiny_folder: Callable[..., Path], tiny_gguf: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (gguf, _) = tiny_folder("llama"), tiny_gguf("llama", "BF16")
    monkeypatch.chdir(folder.parent)
    for given, ref in ((Path(folder.name), folder), (gguf, gguf), (gguf.parent / gguf.name, gguf)):
        assert ref_of(open_model(given)) == str(ref)
        assert open_model(ref_of(open_model(given))).content == open_model(ref).content
