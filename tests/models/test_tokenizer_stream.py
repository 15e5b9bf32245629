"""Text of tokens as they come is the text of them all, and never half a character."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hasten.errors import TokenizerError
from hasten.models import gguf_tokenizer
from hasten.models.text_stream import TextStream
from hasten.models.tokenizer import Tokenizer
from text_samples import samples
from tiny_tokenizers import (
    CONTROL,
    byte_level,
    byte_level_metadata,
    sentencepiece_metadata,
    sentencepiece_model,
)


def _byte_level() -> Tokenizer:
    metadata = byte_level_metadata(byte_level(gguf_tokenizer.QWEN2), "qwen2")
    return Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})


def _sentencepiece() -> Tokenizer:
    options = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    metadata = sentencepiece_metadata(sentencepiece_model("bpe", vocab_size=1000, **options))
    return Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in metadata.items()})


def _metaspace() -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    from hasten.models.text_stream import TokenizerFields

    letters = ["<unk>", "\u2581", "a", "b", "\u2581a", "\u2581\u2581", "<0xE4>", "<0xBD>", "<0xA0>"]
    backend = Backend(models.BPE({token: i for i, token in enumerate(letters)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(lambda: backend, TokenizerFields(vocab_size=len(letters)))


KINDS: list[Callable[[], Tokenizer]] = [_byte_level, _sentencepiece, _metaspace]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__[1:])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.param()
    return made


@pytest.mark.parametrize("skip", [False, True])
def test_any_ids_stream_to_what_decode_gives(tokenizer: Tokenizer, skip: bool) -> None:
    rng = random.Random(3)
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size + 3) for _ in range(rng.randint(0, 40))]
        stream = tokenizer.stream(skip_special=skip)
        joined = "".join([*map(stream.push, ids), stream.flush()])
        assert joined == tokenizer.decode(ids, skip_special=skip), ids


def test_bytes_alone_stream_to_what_decode_gives(tokenizer: Tokenizer) -> None:
    """Runs of byte tokens: mostly no UTF-8, some of it nearly."""
    rng = random.Random(4)
    single = [i for i in range(tokenizer.vocab_size) if len(tokenizer.decode([i])) <= 1]
    for _ in range(400):
        ids = [rng.choice(single) for _ in range(rng.randint(0, 12))]
        stream = tokenizer.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids), ids


def test_pieces_are_whole_characters() -> None:
    for tokenizer in (_byte_level(), _sentencepiece()):
        for text in samples(CONTROL, count=300):
            stream = tokenizer.stream(skip_special=False)
            ids = tokenizer.encode(text, add_special=False)
            pieces = [stream.push(i) for i in ids]
            last = stream.flush()
            if "\ufffd" not in text:
                assert "\ufffd" not in "".join([*pieces, last])
            assert "".join([*pieces, last]) == tokenizer.decode(ids, skip_special=False)


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = _byte_level()
    ids = [i for byte in "你!".encode() for i in _ids_of_byte(tokenizer, byte)]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == ["", "", "你", "!"]


def test_an_unfinished_character_comes_at_the_end() -> None:
    tokenizer = _byte_level()
    stream = tokenizer.stream()
    assert stream.push(_ids_of_byte(tokenizer, 0xE4)[0]) == ""
    assert stream.flush() == "\ufffd" and stream.flush() == ""


def _ids_of_byte(tokenizer: Tokenizer, byte: int) -> list[int]:
    from hasten.models.text_stream import byte_alphabet

    vocabulary = {tokenizer._backend.id_to_token(i): i for i in range(tokenizer.vocab_size)}
    return [vocabulary[byte_alphabet()[byte]]]


def test_only_the_first_space_goes() -> None:
    tokenizer = _sentencepiece()
    ids = tokenizer.encode("the quick", add_special=False)
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == "the quick"
    later = tokenizer.stream()
    assert "".join(map(later.push, [*ids, *ids])) + later.flush() == "the quick the quick"


def test_work_a_token_does_not_grow() -> None:
    """A run of a thousand unfinished bytes is decoded once, not a thousand times."""
    tokenizer = _byte_level()
    calls = 0

    def token_of(token_id: int) -> str | None:
        nonlocal calls
        calls += 1
        return tokenizer._backend.id_to_token(token_id)

    stream = TextStream(token_of, tokenizer._decoder)
    byte = _ids_of_byte(tokenizer, 0x80)[0]
    assert "".join(stream.push(byte) for _ in range(1000)) + stream.flush() == "\ufffd" * 1000
    assert calls == 1000


def test_a_decoder_without_a_rule_is_refused() -> None:
    for decoder in (
        {"type": "WordPiece", "prefix": "##"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ):
        with pytest.raises(TokenizerError, match="cannot be streamed"):
            TextStream(lambda _: None, decoder)


def test_save_and_load_stream_alike(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    stream, loaded = tokenizer.stream(), Tokenizer.load(tmp_path).stream()
    ids = list(range(tokenizer.vocab_size))
    assert [stream.push(i) for i in ids] == [loaded.push(i) for i in ids] and stream.flush() == loaded.flush()
