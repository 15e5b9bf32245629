"""`hasten chat` through a pipe, against a model of bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hasten.cli import main


def test_turns_grow_one_conversation_of_all_messages(model: Any, stdin: Any, capsys: Any) -> None:
    stdin(b"one\n\ntwo\n")
    assert main(["chat", "m", "--system", "short"]) == 0
    out, err = capsys.readouterr()
    assert out == "héllo\nhéllo\n"
    assert model.asked == [
        "<system>short<user>one<assistant>",
        "<system>short<user>one<assistant>héllo<user>two<assistant>",
    ]
    assert err.count("tok/s") == 2


def test_reset_help_exit_and_unknown_commands(model: Any, stdin: Any, capsys: Any) -> None:
    stdin(b"one\n/reset\n/help\n/what\n/ etc is a path\n/exit\nnever\n")
    assert main(["chat", "m"]) == 0
    assert model.asked == ["<user>one<assistant>", "<user>/ etc is a path<assistant>"]
    err = capsys.readouterr().err
    assert "started over" in err
    assert "unknown command /what" in err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(model: Any, stdin: Any, capsys: Any) -> None:
    model.interrupt_after = 3
    stdin(b"one\ntwo\n")
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "hé\nhé\n"
    assert "stopped" in err
    assert model.asked[1] == "<user>one<assistant>hé<user>two<assistant>"


def test_a_turn_that_does_not_fit_fails_alone(model: Any, stdin: Any, capsys: Any) -> None:
    model.context = 30
    stdin(b"a turn that is much too long for it\nshort\n")
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "héllo\n"
    assert "the context 30" in err
    assert model.asked == ["<user>short<assistant>"]


def test_a_line_that_is_no_text_is_refused(model: Any, stdin: Any, capsys: Any) -> None:
    stdin(b"fine\nca\xe9\n")
    assert main(["chat", "m"]) == 2
    assert "line 2 of stdin" in capsys.readouterr().err


def test_a_chat_samples_as_the_authors_advise(model: Any, stdin: Any, capsys: Any) -> None:
    model.sampling = {"temperature": 0.7, "top_k": 20.0}
    for flags, wanted in (([], (0.7, 20)), (["--temperature", "0"], (0, 20))):
        stdin(b"one\n")
        assert main(["chat", "m", *flags]) == 0
        sampling = model.requests[-1].sampling
        assert (sampling.temperature, sampling.top_k) == wanted


def test_commands_change_a_conversation(model: Any, stdin: Any, capsys: Any, tmp_path: Any) -> None:
    file = tmp_path / "talk.json"
    lines = ["one", "/again", "two", "/undo", "/set temperature 0.5", "/set top_k x", "/set mood 1"]
    lines += [f"/save {file}", "/system short", "three", "/undo", "/undo", "/again"]
    stdin("\n".join(lines).encode())
    assert main(["chat", "m"]) == 0
    err = capsys.readouterr().err
    first = "<user>one<assistant>"
    assert model.asked == [
        first,
        first,
        f"{first}héllo<user>two<assistant>",
        "<system>short<user>three<assistant>",
    ]
    assert model.requests[-1].sampling.temperature == 0.5
    assert (
        "'x' is no number" in err and "no setting 'mood'" in err and err.count("nothing was asked yet") == 2
    )
    assert [message["role"] for message in json.loads(file.read_text())] == ["user", "assistant"]


def test_blocks_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.cli.chat import _block

    typed = iter(['"""', "a", "", "b", '"""', "c\\", "d", " e "])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert [_block(), _block(), _block()] == ["a\n\nb", "c\nd", "e"]
