"""Calibration text: every way to name it, and every way to get it wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from hasten.compress.calibration import FEWEST, calibration_from, cut
from hasten.errors import MachineError, TokenizerError, UsageError
from hasten.models.open import open_model
from hasten.models.tokenizer import Tokenizer
from hasten.quality.text import default_text


class Bytes:
    """One token a byte; chats as `<role>content`."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        assert not add_generation_prompt
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


LINES = [f"Line {i} tells of {i * i}, which is a number like many others.\n\n" for i in range(200)]


def text_of(calibration: Any) -> str:
    return bytes(calibration.ids.astype(np.uint8).reshape(-1).tolist()).decode(errors="replace")


def test_the_default_text() -> None:
    found = calibration_from(None, Bytes(), 4096)
    assert found.tokens == 4096 and found.ids.dtype == np.int32
    assert found.name == "pydoc_data.topics"
    assert found.sha256 == cut("x", default_text().calibration, Bytes(), tokens=4096).sha256


def test_a_text_file(tmp_path: Path) -> None:
    notes: list[str] = []
    for name in ("prose.txt", "prose.md", "prose", "prose.py"):
        file = tmp_path / name
        file.write_text("".join(LINES), encoding="utf-8")
        found = calibration_from(file, Bytes(), 3000, said=notes.append)
        assert found.name == name
        assert found.sha256 == cut("x", "".join(LINES), Bytes(), tokens=3000).sha256
        assert calibration_from(str(file), Bytes(), 3000).sha256 == found.sha256
    assert notes == []


def test_a_long_file_is_thinned_out_evenly(tmp_path: Path) -> None:
    lines = "".join(f"{i:06d} is the number of this line, and nothing else.\n" for i in range(20_000))
    file = tmp_path / "long.txt"
    file.write_text(lines, encoding="utf-8")
    notes: list[str] = []
    found = calibration_from(file, Bytes(), 4096, said=notes.append)
    assert notes == ["long.txt is longer than needed: every 5th part of it is read"]
    assert found.tokens == 4096
    seen = sorted(int(word) for word in text_of(found).split() if len(word) == 6 and word.isdigit())
    assert seen[0] < 2000 and seen[-1] > 17_000


ROWS: dict[str, Callable[[str], dict[str, Any]]] = {
    "text": lambda t: {"text": t, "id": 3},
    "messages": lambda t: {"messages": [{"role": "user", "content": t}]},
    "prompt": lambda t: {"prompt": t[:9], "completion": t[9:]},
    "chat": lambda t: {
        "prompt": [{"role": "user", "content": t[:9]}],
        "completion": [{"role": "assistant", "content": t[9:]}],
    },
}


@pytest.mark.parametrize("kind", ROWS)
def test_json_lines(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [line.strip() + "\u2028." for line in LINES]
    rows = [json.dumps(ROWS[kind](text), ensure_ascii=False) for text in texts]
    file.write_text("\n".join([rows[0], "", "  ", *rows[1:]]) + "\n", encoding="utf-8")
    found = calibration_from(file, Bytes(), 3000)
    marked = {
        "messages": [f"<user>{t}" for t in texts],
        "chat": [f"<user>{t[:9]}<assistant>{t[9:]}" for t in texts],
    }
    assert found.sha256 == cut("x", "\n\n".join(marked.get(kind, texts)), Bytes(), tokens=3000).sha256


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2 is no JSON"),
        ("[1]", "line 2 is no JSON object"),
        ("[" * 100_000, "line 2 is no JSON"),
        ('{"txt": "a"}', "line 2 has no text: it has 'txt'"),
        ("{}", "line 2 has no text: it has nothing"),
        ('{"text": 3}', "line 2: 'text' must be text, got int"),
        ('{"prompt": "a", "completion": null}', "line 2: 'completion' must be text, got NoneType"),
        ('{"text": "a\\ud800"}', "line 2: 'text' is no Unicode: lone surrogate at character 1"),
        ('{"prompt": "a"}', "line 2 has no text: it has 'prompt'"),
    ],
)
def test_a_bad_line_is_named(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UsageError) as error:
        calibration_from(file, Bytes(), 100)
    assert what in error.value.message and str(file) in error.value.message
    assert '"messages"' in str(error.value.hint) or "leave the row out" in str(error.value.hint)


def test_messages_go_through_the_models_template(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    tokenizer = open_model(tiny_folder("llama")).tokenizer()
    file = tmp_path / "chat.jsonl"
    row = {"messages": [{"role": "user", "content": "the thin man"}, {"role": "assistant", "content": "ran"}]}
    file.write_text((json.dumps(row) + "\n") * 200, encoding="utf-8")
    found = calibration_from(file, tokenizer, 2048)
    end = tokenizer.id_of("<|end|>")
    assert (found.ids == end).sum() > 20  # the template's own special tokens are tokens
    file.write_text(json.dumps({"messages": "hello"}) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"chat\.jsonl, line 1: "):
        calibration_from(file, tokenizer)


def test_a_model_without_a_template(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for part in tiny_folder("llama").iterdir():
        (folder / part.name).write_bytes(part.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    file = tmp_path / "chat.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}]}', encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"line 1: "):
        calibration_from(file, Tokenizer.from_folder(folder))


@pytest.mark.parametrize(
    ("content", "count"), [("", "0"), (" \n\n", "3"), ("short", "5"), ("x" * 2047, "2,047")]
)
def test_too_little_text(content: str, count: str, tmp_path: Path) -> None:
    for name in ("little.txt", "little.jsonl"):
        file = tmp_path / name
        is_rows = name.endswith("l")
        file.write_text(json.dumps({"text": content}) if is_rows else content, encoding="utf-8")
        with pytest.raises(UsageError, match=f"{name} has {count} tokens.*{FEWEST:,} are the least"):
            calibration_from(file, Bytes())


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        calibration_from(tmp_path / "nothing", Bytes())
    for name in ("data/nothing.txt", "./nothing", "~/nothing/here", "nothing", "a/b:c:d:e"):
        with pytest.raises(UsageError, match="No such file"):
            calibration_from(name, Bytes())
    with pytest.raises(UsageError, match="directory"):
        calibration_from(tmp_path, Bytes())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="is not UTF-8: byte 3"):
        calibration_from(tmp_path / "latin.txt", Bytes())
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(UsageError, match=r"has 2\.1 GB"):
        calibration_from(tmp_path / "huge.txt", Bytes())


def test_evaluation_text_in_calibration_is_said(tmp_path: Path) -> None:
    file = tmp_path / "seen.txt"
    file.write_text("".join(LINES) + default_text().evaluation[:20_000], encoding="utf-8")
    notes: list[str] = []
    calibration_from(file, Bytes(), 3000, said=notes.append)
    (said,) = notes
    assert "paragraphs of seen.txt are in the default evaluation text" in said
    indented = "\n\n".join(
        "  " + p.replace("\n", "\n  ") for p in default_text().evaluation.split("\n\n")[3:9]
    )
    file.write_text("".join(LINES) + indented, encoding="utf-8")
    calibration_from(file, Bytes(), 3000, said=notes.append)
    assert len(notes) == 2
    file.write_text(default_text().calibration, encoding="utf-8")
    calibration_from(file, Bytes(), 3000, said=notes.append)
    assert len(notes) == 2


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package: `rows` is what every dataset holds, `asked` what was asked for."""
    from importlib.machinery import ModuleSpec

    fake = ModuleType("datasets")
    fake.__spec__ = ModuleSpec("datasets", None)
    fake.rows, fake.asked = [], []  # type: ignore[attr-defined]

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        fake.asked.append((name, config, split, streaming))
        if isinstance(fake.rows, Exception):
            raise fake.rows
        return iter(fake.rows)

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_a_dataset(datasets: Any) -> None:
    datasets.rows = [{"text": line, "body": line.upper()} for line in LINES]
    plain = calibration_from("owner/name", Bytes(), 3000)
    assert plain.sha256 == cut("x", "\n\n".join(LINES), Bytes(), tokens=3000).sha256
    assert plain.name == "owner/name"
    loud = calibration_from("owner/na.me-2/raw_v1:test:body", Bytes(), 3000)
    assert loud.sha256 == cut("x", "\n\n".join(LINES).upper(), Bytes(), tokens=3000).sha256
    assert datasets.asked == [("owner/name", None, "train", True), ("owner/na.me-2", "raw_v1", "test", True)]


def test_no_more_of_a_dataset_is_read_than_needed(datasets: Any) -> None:
    taken = 0

    class Endless:
        def __iter__(self) -> Any:
            nonlocal taken
            while True:
                taken += 1
                yield {"text": LINES[taken % len(LINES)]}

    datasets.load_dataset = lambda *_, **__: Endless()
    assert calibration_from("owner/name", Bytes(), 2048).tokens == 2048
    assert taken < 64 * 2048 / 50


def test_a_dataset_that_cannot_be_read(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.rows = ConnectionError("Couldn't reach 'owner/name'\n on the Hub (offline mode is enabled)")
    with pytest.raises(MachineError, match=r"dataset owner/name cannot be read: Couldn't reach .* \(offline"):
        calibration_from("owner/name", Bytes())
    datasets.rows = [{"text": LINES[0]}, {"text": None}]
    with pytest.raises(UsageError, match="owner/name, row 2: 'text' must be text"):
        calibration_from("owner/name", Bytes())
    with pytest.raises(UsageError, match="row 1 has no column 'body'") as error:
        calibration_from("owner/name:train:body", Bytes())
    assert error.value.hint == "columns are text"
    datasets.rows = []
    with pytest.raises(UsageError, match="0 tokens"):
        calibration_from("owner/name", Bytes())
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("hasten.compress.calibration.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="there is no file owner/name") as error:
        calibration_from("owner/name", Bytes())
    assert "pip install datasets" in str(error.value.hint)
