"""The tiny models' tokenizer, tiny trained ones, and GGUF files with nothing but a tokenizer in them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from text_samples import corpus

VOCAB = 263
END = VOCAB - 1  # id of the special token <|end|>
CHAT_TEMPLATE = (
    "{% for m in messages %}<|end|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(split: str, vocab_size: int = 900) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` trained on the corpus, without special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def byte_level_metadata(tokenizer: Any, pre: str) -> dict[str, Any]:
    """The `tokenizer.ggml.*` values a GGUF writer makes of it; with control and user-defined tokens."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [token for token, _ in vocab] + [*CONTROL, "<tool_call>", "[PAD0]"]
    first = len(vocab)
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [1] * first + [3, 3, 3, 4, 5],
        "merges": [" ".join(merge) for merge in merges],
        "bos_token_id": first,
        "eos_token_id": first + 2,
        "padding_token_id": first,
        "add_bos_token": False,
    }


def sentencepiece_model(kind: str, vocab_size: int = 800, **options: Any) -> bytes:
    """A SentencePiece model file ("bpe" or "unigram") trained on the corpus."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=out,
        model_type=kind,
        vocab_size=vocab_size,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return out.getvalue()


def sentencepiece_metadata(model: bytes) -> dict[str, Any]:
    """The `tokenizer.ggml.*` values a GGUF writer makes of a SentencePiece BPE model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.get_piece_size())

    def kind(index: int) -> int:
        if processor.is_unknown(index):
            return 2
        if processor.is_control(index):
            return 3
        return 6 if processor.is_byte(index) else 1

    return {
        "model": "llama",
        "pre": "default",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [processor.get_score(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
    }


def write_gguf(path: Path, architecture: str, tokenizer: dict[str, Any], template: str | None = None) -> Path:
    """A GGUF file with a tokenizer, the sizes that a configuration needs, and no tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_sliding_window(32)
    for name, value in tokenizer.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """The tokens in order, and the merges, of the byte-level tokenizer that goes with every tiny model."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("Ġ", "a")]
    return [*letters, *(a + b for a, b in merges), "<|end|>"], merges


def save_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json, chat template included."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens[:-1])}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(tokens[-1], special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_same(mine: Any, reference: Any, texts: list[str]) -> None:
    """Encoding and decoding, with and without special tokens, and streaming."""
    for text in texts:
        for special in (False, True):
            ids = mine.encode(text, add_special=special)
            theirs = reference.encode(text, add_special_tokens=special)
            doubled = special and theirs[:2] == [mine.bos_id] * 2  # a bos that is typed gets no second one
            assert ids == (theirs[1:] if doubled else theirs), text
            for skip in (False, True):
                expected = reference.decode(ids, skip_special_tokens=skip)
                assert mine.decode(ids, skip_special=skip) == expected, text
                stream = mine.stream(skip_special=skip)
                assert "".join([*map(stream.push, ids), stream.flush()]) == expected, text
