"""What an artifact keeps of a tokenizer, and what encode and decode refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.errors import ArtifactError, TokenizerError, UsageError
from hasten.models import gguf_tokenizer
from hasten.models.tokenizer import Tokenizer
from text_samples import samples
from tiny_tokenizers import (
    CHATML,
    CONTROL,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
    sentencepiece_model,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.QWEN2), "qwen2") | {"add_bos_token": True}
    keys = {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    return Tokenizer.from_gguf(keys | {"tokenizer.chat_template": CHATML})


def test_loaded_equals_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fields == tokenizer.fields and loaded.special_ids == tokenizer.special_ids
    for text in samples(CONTROL, count=300):
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids and loaded.decode(ids) == tokenizer.decode(ids)
    messages = [{"role": "user", "content": "x"}]
    assert loaded.encode_chat(messages) == tokenizer.encode_chat(messages)


def test_sentencepiece_survives_too(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model("bpe", vocab_size=1000, byte_fallback=True))
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for text in samples(("<s>",), count=300):
        assert loaded.encode(text) == tokenizer.encode(text)


def test_transformers_reads_what_is_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(tmp_path)
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in samples(CONTROL, count=100):
        theirs = reference.encode(text)
        doubled = theirs[:2] == [tokenizer.bos_id] * 2  # a bos that is typed gets no second one
        assert theirs[doubled:] == tokenizer.encode(text)
    messages = [{"role": "user", "content": "x"}]
    assert reference.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat(messages, False)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode("a b") == tokenizer.encode("a b") and again.bos_id == tokenizer.bos_id


def _vocabulary_of_another(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"].pop()
    document["model"]["vocab"].popitem()
    (folder / "tokenizer.json").write_text(json.dumps(document))


def _with_field(folder: Path, name: str, value: object) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["hasten"][name] = value
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda d: (d / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
        (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json cannot be read"),
        (lambda d: (d / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json cannot be read"),
        (lambda d: (d / "tokenizer_config.json").write_text("[]"), "not written by Hasten"),
        (lambda d: (d / "tokenizer_config.json").write_text("{}"), "not written by Hasten"),
        (
            lambda d: (d / "tokenizer_config.json").write_text('{"hasten": {"schema_version": 9}}'),
            "version 9",
        ),
        (lambda d: _with_field(d, "add_bos", True), "does not know the field hasten.add_bos"),
        (_vocabulary_of_another, "were saved"),
    ],
)
def test_damaged_artifacts_are_named(tokenizer: Tokenizer, tmp_path: Path, damage: object, says: str) -> None:
    tokenizer.save(tmp_path)
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=says) as caught:
        Tokenizer.load(tmp_path).encode("x")
    assert caught.value.hint


def test_saving_where_nothing_can_be_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        tokenizer.save(tmp_path / "nowhere")


def test_bytes_that_are_no_utf8_are_pointed_at(tokenizer: Tokenizer) -> None:
    prompt = os.fsdecode("é".encode() + b"ab\xffcd")
    with pytest.raises(UsageError, match=r"byte 0xff at byte 4 \(character 3\)") as caught:
        tokenizer.encode(prompt)
    assert caught.value.hint
    with pytest.raises(UsageError, match=r"lone surrogate U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(UsageError, match="got bytes"):
        tokenizer.encode(b"x")  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[-1], [1 << 40], ["a"], [None]])
def test_ids_that_are_none_are_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.raises(UsageError, match="token ids"):
        tokenizer.decode(ids)


def test_empty_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [tokenizer.bos_id] and tokenizer.encode("", add_special=False) == []
    assert tokenizer.decode([]) == ""


def test_a_model_without_template_says_raw() -> None:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.QWEN2), "qwen2")
    tokenizer = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    with pytest.raises(TokenizerError, match="no chat template") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert caught.value.hint and "--raw" in caught.value.hint


def test_loading_imports_nothing_heavy(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    code = (
        "import sys; from hasten.models.tokenizer import Tokenizer\n"
        f"Tokenizer.load({str(tmp_path)!r}).encode('x')\n"
        "heavy = {'jinja2', 'torch', 'transformers', 'huggingface_hub', 'gguf', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
