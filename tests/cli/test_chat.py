"""`hasten chat` through a pipe, against a model of bytes."""

from __future__ import annotations

from typing import Any

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
