"""Tokenizers out of GGUF files against transformers on the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.errors import TokenizerError
from hasten.models import gguf_tokenizer
from hasten.models.gguf import GgufFile
from hasten.models.tokenizer import Tokenizer
from text_samples import samples
from tiny_tokenizers import (
    CHATML,
    CONTROL,
    assert_same,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
    sentencepiece_model,
    write_gguf,
)

BYTE_LEVEL = [("qwen2", "qwen2"), ("llama", "llama-bpe"), ("llama", "tekken"), ("qwen2", "gpt-2")]
SENTENCEPIECE = ["llama", "phi3", "gemma3"]


def ours(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(GgufFile.open(path).metadata)


def theirs(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize(("architecture", "pre"), BYTE_LEVEL)
def test_byte_level_equals_transformers(architecture: str, pre: str, tmp_path: Path) -> None:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.kind_of(pre).splits[0]), pre)
    path = write_gguf(tmp_path / "model.gguf", architecture, metadata, CHATML)
    mine = ours(path)
    assert_same(mine, theirs(path), samples((*CONTROL, "<tool_call>")))
    for text in samples((*CONTROL, "<tool_call>")):
        assert mine.decode(mine.encode(text), skip_special=False) == text


@pytest.mark.parametrize("architecture", SENTENCEPIECE)
def test_sentencepiece_equals_transformers(architecture: str, tmp_path: Path) -> None:
    options = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    metadata = sentencepiece_metadata(sentencepiece_model("bpe", vocab_size=1000, **options))
    if architecture == "gemma3":
        metadata["add_space_prefix"] = False
    if architecture == "phi3":
        metadata["token_type"][2] = 1  # transformers does not know that Phi-3's control tokens swallow spaces
    path = write_gguf(tmp_path / "model.gguf", architecture, metadata)
    assert_same(ours(path), theirs(path), samples(("<s>", "<unk>")))


def test_every_pre_tokenizer_name_builds_and_keeps_text() -> None:
    trained = byte_level(gguf_tokenizer.GPT2)
    for name in gguf_tokenizer.KINDS:
        metadata = {f"tokenizer.ggml.{k}": v for k, v in byte_level_metadata(trained, name).items()}
        tokenizer = Tokenizer.from_gguf(metadata)
        for text in samples(count=60):
            assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text, name


def test_splits_are_those_of_transformers() -> None:
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    for name, split in mapping.GGUF_PRE_TOKENIZER_SPLITS.items():
        if name in gguf_tokenizer.KINDS:
            assert gguf_tokenizer.KINDS[name].splits == (split,), name


def test_digits_stay_single_where_the_model_learned_so() -> None:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.GPT2), "smollm")
    smollm = Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})
    assert len(smollm.encode("1234567")) == 7


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    trained = byte_level_metadata(byte_level(gguf_tokenizer.QWEN2), "qwen2")
    return {f"tokenizer.ggml.{k}": v for k, v in trained.items()} | {"general.architecture": "qwen2"}


def test_special_ids(metadata: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_gguf(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokenizer.bos_id == tokens.index("<|endoftext|>")
    assert tokenizer.eos_ids == (tokens.index("<|im_end|>"), tokens.index("<|endoftext|>"))
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode("<tool_call>") == [tokens.index("<tool_call>")]
    assert tokenizer.decode([tokens.index("<tool_call>")]) == "<tool_call>"
    assert tokenizer.decode([tokens.index("<|im_end|>"), len(tokens) + 5]) == ""


def test_bos_and_eos_are_added_where_the_file_says(metadata: dict[str, Any]) -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = Tokenizer.from_gguf(metadata | flags)
    plain = tokenizer.encode("a b", add_special=False)
    assert tokenizer.encode("a b") == [tokenizer.bos_id, *plain, tokenizer.eos_ids[0]]
    llama = {k: v for k, v in metadata.items() if not k.endswith("add_bos_token")}
    llama["tokenizer.ggml.pre"] = "llama-bpe"
    assert Tokenizer.from_gguf(llama).encode("") == [tokenizer.bos_id]


def test_control_tokens_may_use_any_character(metadata: dict[str, Any]) -> None:
    token = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    tokens = [*metadata["tokenizer.ggml.tokens"], token]
    types = [*metadata["tokenizer.ggml.token_type"], 3]
    tokenizer = Tokenizer.from_gguf(
        metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    )
    assert tokenizer.encode(token) == [len(tokens) - 1] and len(tokens) - 1 in tokenizer.eos_ids


def test_strings_may_be_bytes(metadata: dict[str, Any]) -> None:
    raw = {
        key: [item.encode() for item in value]
        if isinstance(value, list) and isinstance(value[0], str)
        else value
        for key, value in metadata.items()
    }
    assert Tokenizer.from_gguf(raw).encode("Größe 你好") == Tokenizer.from_gguf(metadata).encode("Größe 你好")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", 3]}, "list of strings"),
        ({"tokenizer.ggml.tokens": [b"\xff"]}, "no UTF-8"),
        ({"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["zzz yyy"]}, "merges do not fit"),
        ({"tokenizer.ggml.merges": ["nospace"]}, "is no pair of tokens"),
        (
            {"tokenizer.ggml.precompiled_charsmap": b"\0" * 8, "tokenizer.ggml.model": "llama"},
            "cannot be used",
        ),
        ({"tokenizer.ggml.token_type": [1, 2]}, "one a token"),
        ({"tokenizer.ggml.token_type": 1.5}, "one a token"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "no id of the"),
        ({"tokenizer.ggml.model": "t5"}, "needs an unknown token"),
        ({"tokenizer.ggml.model": "rwkv"}, "supported are gpt2, llama and t5"),
        ({"tokenizer.ggml.pre": "nobody"}, "known are .*llama-bpe.*qwen2"),
        ({"tokenizer.chat_template": 5}, "must be text"),
    ],
)
def test_bad_metadata_is_named(metadata: dict[str, Any], change: dict[str, Any], says: str) -> None:
    changed = {key: value for key, value in (metadata | change).items() if value is not None}
    with pytest.raises(TokenizerError, match=says) as caught:
        Tokenizer.from_gguf(changed)
    assert caught.value.hint


@pytest.mark.parametrize("kind", [1, 4])
def test_ends_of_turn_that_are_stored_as_text(
    metadata: dict[str, Any], kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], list(metadata["tokenizer.ggml.token_type"])
    end, start = tokens.index("<|im_end|>"), tokens.index("<|im_start|>")
    types[end], types[start] = kind, 1
    more = {"tokenizer.ggml.token_type": types, "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>")}
    tokenizer = Tokenizer.from_gguf(metadata | more | {"tokenizer.chat_template": CHATML})
    assert end in tokenizer.eos_ids and "<|im_end|> is stored as text" in caplog.text
    ids = tokenizer.encode_chat([{"role": "user", "content": "a"}])
    assert ids.count(end) == 1 and ids.count(start) == 2  # the template writes both: both are found whole


def test_ids_that_point_nowhere_are_left_out(
    metadata: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    far = {"tokenizer.ggml.bos_token_id": 10**6, "tokenizer.ggml.eos_token_id": 2**32 - 1}
    tokenizer = Tokenizer.from_gguf(metadata | far)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokenizer.bos_id is None and "bos_token_id is 1000000" in caplog.text
    assert tokenizer.eos_ids == (tokens.index("<|endoftext|>"), tokens.index("<|im_end|>"))


def test_a_missing_pre_tokenizer_is_what_the_architecture_has(
    metadata: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    silent = {key: value for key, value in metadata.items() if not key.endswith(".pre")}
    text = "I'm 12345 x"
    assert Tokenizer.from_gguf(silent).encode(text) == Tokenizer.from_gguf(metadata).encode(text)
    assert "tokenizer.ggml.pre is missing): 'qwen2' is taken" in caplog.text
    other = Tokenizer.from_gguf(silent | {"general.architecture": "llama"})
    known = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": "default"})
    assert other.encode(text) == known.encode(text)
    assert "'default' is taken, as llama.cpp does" in caplog.text


@pytest.mark.parametrize("writes", [False, True])
def test_a_chat_begins_with_one_bos(writes: bool) -> None:
    keys = sentencepiece_metadata(sentencepiece_model("bpe"))
    metadata = {f"tokenizer.ggml.{k}": v for k, v in keys.items()} | {"general.architecture": "llama"}
    template = ("{{ bos_token }}" if writes else "") + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": template})
    assert tokenizer.bos_id is not None
    ids = tokenizer.encode_chat([{"role": "user", "content": "a b"}])
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert tokenizer.encode("<s>a b")[:1] == [tokenizer.bos_id]
    assert tokenizer.encode("<s>a b").count(tokenizer.bos_id) == 1
    assert tokenizer.count("<s>a b") == len(tokenizer.encode("<s>a b"))
    bare = Tokenizer.from_gguf(
        metadata | {"tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": template}
    )
    assert bare.encode_chat([{"role": "user", "content": "a b"}]).count(tokenizer.bos_id) == writes


@pytest.mark.demo
def test_demo_model_equals_transformers() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    from hasten.models.source import demo_file

    path = demo_file().path
    file = GgufFile.open(path)
    mine = Tokenizer.from_gguf(file.metadata)
    texts = samples(("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "<|fim_prefix|>"))
    reference = theirs(path)
    assert_same(mine, reference, texts)
    assert mine.eos_ids == (151645, 151643) and mine.vocab_size == 151936
    # The same once more without transformers' reading of the file.
    tokens = file.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = gguf_tokenizer.split_words(gguf_tokenizer.kind_of("qwen2"))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [t for i, t in enumerate(tokens) if file.metadata["tokenizer.ggml.token_type"][i] == 3]
    )
    backend.add_tokens(["<tool_call>", "</tool_call>"])
    assert_same(mine, PreTrainedTokenizerFast(tokenizer_object=backend), texts)
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert mine.apply_chat(messages) == expected
