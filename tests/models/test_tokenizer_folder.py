"""Tokenizers of Hugging Face folders against transformers and sentencepiece."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from hasten.errors import TokenizerError
from hasten.models import gguf_tokenizer
from hasten.models.tokenizer import Tokenizer
from text_samples import samples
from tiny_tokenizers import CHATML, CONTROL, assert_same, byte_level, sentencepiece_model


def write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import PreTrainedTokenizerFast

    backend = byte_level(gguf_tokenizer.LLAMA3)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=CONTROL[0],
        eos_token=CONTROL[2],
        extra_special_tokens=[CONTROL[1]],
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("framed", [False, True])
def test_folder_equals_transformers(folder: Path, framed: bool) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if framed:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        special = [(token, backend.token_to_id(token)) for token in (CONTROL[0], CONTROL[2])]
        parts = [CONTROL[0], "$A", CONTROL[2]]
        backend.post_processor = TemplateProcessing(single=parts, special_tokens=special)
        backend.save(str(folder / "tokenizer.json"))
    reference = PreTrainedTokenizerFast.from_pretrained(folder)
    mine = Tokenizer.from_folder(folder)
    assert_same(mine, reference, samples(CONTROL))
    assert len(mine.encode("a")) == len(mine.encode("a", add_special=False)) + 2 * framed
    messages = [{"role": "user", "content": "Größe 你好"}]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert mine.apply_chat(messages) == expected
    ids = reference.encode(expected, add_special_tokens=False)
    assert mine.encode_chat(messages) == ([mine.bos_id, *ids] if framed else ids)


def test_end_ids_come_from_all_files(folder: Path) -> None:
    write(folder / "generation_config.json", {"eos_token_id": [3, 5]})
    write(folder / "config.json", {"eos_token_id": 5})
    mine = Tokenizer.from_folder(folder)
    own = mine.encode(CONTROL[2])[0]
    assert mine.eos_ids == (own, 3, 5)
    assert mine.bos_id == mine.encode(CONTROL[0])[0]
    assert mine.vocab_size == own + 2 or mine.vocab_size > own


def test_tokens_that_only_the_configuration_knows_are_added(folder: Path) -> None:
    backend = byte_level(gguf_tokenizer.LLAMA3)
    backend.save(str(folder / "tokenizer.json"))
    first = backend.get_vocab_size()
    listed = {
        str(first + 1): {"content": "<b>", "special": False},
        str(first): {"content": "<a>", "special": True},
    }
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": listed, "eos_token": {"content": "<a>"}})
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    mine = Tokenizer.from_folder(folder)
    assert mine.encode("<a><b>") == [first, first + 1]
    assert mine.decode([first, first + 1]) == "<b>" and mine.eos_ids == (first,)


def test_limits_of_the_training_run_are_dropped(folder: Path) -> None:
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
    write(path, document)
    assert len(Tokenizer.from_folder(folder).encode("one two three four")) > 2


def test_chat_templates_of_every_place(folder: Path) -> None:
    message = [{"role": "user", "content": "x"}]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    write(path, config | {"chat_template": named})
    mine = Tokenizer.from_folder(folder)
    assert (mine.apply_chat(message), mine.apply_chat(message, tools=[{"name": "f"}])) == ("D", "T")
    write(folder / "chat_template.json", {"chat_template": "J"})
    assert Tokenizer.from_folder(folder).apply_chat(message) == "J"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.from_folder(folder).apply_chat(message) == "F"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("plain", [True, False], ids=["identity", "nfkc"])
def test_sentencepiece_file_equals_sentencepiece(kind: str, plain: bool, tmp_path: Path) -> None:
    import sentencepiece

    options: dict[str, Any] = {}
    if plain:
        options = {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        }
    model = sentencepiece_model(kind, vocab_size=1000 if plain else 700, **options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    mine = Tokenizer.from_folder(tmp_path)
    assert mine.bos_id == original.bos_id() and mine.eos_ids == (original.eos_id(),)
    assert mine.vocab_size == original.get_piece_size()
    normalizer = mine._backend.normalizer
    compared = tied = 0
    for text in samples():
        ids = mine.encode(text, add_special=False)
        assert mine.encode(text) == [mine.bos_id, *ids]
        # The library's compiled NFKC rules leave some combinations of characters alone, in transformers too.
        if not plain and normalizer.normalize_str(text) != original.normalize(text):
            continue
        compared += 1
        expected = original.encode(text)
        if kind == "unigram" and ids != expected:
            ids, expected, tied = (
                sorted(ids),
                sorted(expected),
                tied + 1,
            )  # equal scores, either order is the best
        assert ids == expected, text
        if original.unk_id() not in ids:
            assert mine.decode(ids) == original.decode(ids), text
    assert (compared == 1000 if plain else compared > 850) and tied < 10


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_damaged_files_are_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        Tokenizer.from_folder(folder)
    assert caught.value.hint


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(TokenizerError, match=r"none of tokenizer.json, tokenizer.model"):
            Tokenizer.from_folder(folder)


@pytest.mark.parametrize("cut", [0, 1, 7, 100, -3])
def test_cut_sentencepiece_file_is_named(tmp_path: Path, cut: int) -> None:
    model = sentencepiece_model("bpe", vocab_size=600)
    (tmp_path / "tokenizer.model").write_bytes(model[:cut])
    with pytest.raises(TokenizerError, match=r"tokenizer.model is no SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


def test_other_sentencepiece_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("char", vocab_size=400))
    with pytest.raises(TokenizerError, match="its kind is char"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_flipped_bytes_give_a_tokenizer_or_an_error_of_ours(kind: str, tmp_path: Path) -> None:
    rng = random.Random(5)
    model = sentencepiece_model(kind, vocab_size=700)
    refused = 0
    for _ in range(60):
        flipped = bytearray(model)
        flipped[rng.choice((rng.randrange(len(model)), rng.randrange(60)))] = rng.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(flipped)
        try:
            tokenizer = Tokenizer.from_folder(tmp_path)
            tokenizer.decode(tokenizer.encode("the Größe 你好"))
        except TokenizerError:
            refused += 1
    assert 0 < refused < 60


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token": 5},
        {"eos_token": {}},
        {"additional_special_tokens": 5},
        {"added_tokens_decoder": {"x": {}}},
    ],
)
def test_wrong_kinds_in_the_configuration_are_named(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "tokenizer_config.json"
    write(path, json.loads(path.read_text()) | change)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(folder)


def test_many_configured_tokens_are_added_at_once(folder: Path) -> None:
    """One by one, each builds the search for all: 20,000 took minutes, all at once a tenth of a second."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = Tokenizer.from_folder(folder).vocab_size
    many = {str(known + i): {"content": f"<x{i}>", "special": i % 2 == 0} for i in range(20_000)}
    write(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": many})
    started = time.process_time()
    tokenizer = Tokenizer.from_folder(folder)
    assert time.process_time() - started < 20
    assert tokenizer.encode("<x0><x19999>", add_special=False) == [known, known + 19_999]
    assert tokenizer.decode([known, known + 19_999]) == "<x19999>"  # special ones are skipped


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_a_pipe_in_place_of_a_file(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(TokenizerError, match=rf"{name} cannot be (read|used).*named pipe"):
        Tokenizer.from_folder(folder)


def test_a_link_that_leads_nowhere_is_said(folder: Path) -> None:
    """What the hub's cache lost: taken for missing, the tokenizer would silently be another one."""
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("blobs/gone")
    with pytest.raises(TokenizerError, match="cannot be read"):
        Tokenizer.from_folder(folder)


MERGES = ["t h", "th e", "1 2", "12 3"]


def slow_folder(folder: Path, kind: str, added: dict[str, int], listed: bool) -> Path:
    """vocab.json and merges.txt; added tokens in added_tokens.json, or in the configuration."""
    from tiny_tokenizers import vocabulary  # 256 letters first

    letters = vocabulary()[0][:256]
    ids = {token: i for i, token in enumerate([*letters, *(m.replace(" ", "") for m in MERGES)])}
    write(folder / "vocab.json", ids)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config: dict[str, Any] = {"tokenizer_class": kind, "eos_token": "<|im_end|>"}
    if listed:
        entries = {str(i): {"content": token, "special": True} for token, i in added.items()}
        config["added_tokens_decoder"] = entries
    else:
        write(folder / "added_tokens.json", added)
    write(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
@pytest.mark.parametrize("listed", [False, True])
def test_vocab_and_merges_without_tokenizer_json(kind: str, listed: bool, tmp_path: Path) -> None:
    import transformers

    added = {"<|endoftext|>": 260, "<|im_start|>": 261, "<|im_end|>": 262}
    folder = slow_folder(tmp_path, kind, added, listed)
    mine = Tokenizer.from_folder(folder)
    assert mine.encode("the<|im_end|>", add_special=False) == [257, 262]
    assert mine.eos_ids == (262,) and mine.vocab_size == 263
    reference = getattr(transformers, kind).from_pretrained(folder)
    for text in samples(()):
        assert mine.encode(text) == reference.encode(text), text


def test_vocab_and_merges_of_a_class_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="how OtherTokenizer cuts text"):
        Tokenizer.from_folder(slow_folder(tmp_path, "OtherTokenizer", {}, True))


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_have_the_ids_that_are_written(tmp_path: Path, listed: bool) -> None:
    folder = slow_folder(tmp_path, "GPT2Tokenizer", {"<|im_start|>": 263, "<|im_end|>": 267}, listed)
    mine = Tokenizer.from_folder(folder)
    assert mine.encode("<|im_start|>the<|im_end|>") == [263, 257, 267]
    assert mine.decode([262, 257, 264]) == "the"  # ids that nothing has give nothing
    again = tmp_path / "again"
    again.mkdir()
    mine.save(again)
    assert Tokenizer.load(again).encode("<|im_start|>the<|im_end|>") == [263, 257, 267]


@pytest.mark.parametrize("listed", [False, True])
def test_added_tokens_beside_a_sentencepiece_file(tmp_path: Path, listed: bool) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model("bpe"))
    plain = Tokenizer.from_folder(tmp_path)
    added = {"<|im_start|>": plain.vocab_size, "<|im_end|>": plain.vocab_size + 3}
    if listed:
        entries = {str(i): {"content": token, "normalized": True} for token, i in added.items()}
        write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": entries})
    else:
        write(tmp_path / "added_tokens.json", added)
    ids = Tokenizer.from_folder(tmp_path).encode(
        "<|im_start|>user a<|im_end|> b<|im_end|>", add_special=False
    )
    assert (ids[0], ids.count(added["<|im_end|>"]), ids[-1]) == (
        added["<|im_start|>"],
        2,
        added["<|im_end|>"],
    )


def test_an_id_that_another_token_has_is_refused(tmp_path: Path) -> None:
    folder = slow_folder(tmp_path, "GPT2Tokenizer", {"<|im_end|>": 257}, True)
    with pytest.raises(TokenizerError, match=r"gives '<\|im_end\|>' the id 257, and 'the' has that id"):
        Tokenizer.from_folder(folder)


def test_a_tokenizer_json_whose_added_ids_leave_a_gap(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    last = document["added_tokens"][-1]
    last["id"] += 5
    write(folder / "tokenizer.json", document)
    assert Tokenizer.from_folder(folder).encode(last["content"]) == [last["id"]]
    document["added_tokens"][-1]["id"] = 3
    write(folder / "tokenizer.json", document)
    with pytest.raises(TokenizerError, match="an id that cannot be"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("flags", [(True, False), (True, True), (False, False)])
def test_bos_and_eos_where_the_configuration_says_so(
    folder: Path, kind: str, flags: tuple[bool, bool]
) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    write(folder / "tokenizer.json", {**document, "post_processor": None})
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": kind, "add_bos_token": flags[0], "add_eos_token": flags[1]}
    write(folder / "tokenizer_config.json", config)
    mine = Tokenizer.from_folder(folder)
    plain = mine.encode("a b", add_special=False)
    bos, eos = ([mine.bos_id] if flags[0] else []), ([mine.eos_ids[0]] if flags[1] else [])
    assert mine.encode("a b") == [*bos, *plain, *eos]
