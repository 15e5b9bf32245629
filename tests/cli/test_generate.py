"""`hasten generate` against a model of bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hasten.cli import main
from hasten.core import EngineOptions
from hasten.runtime.executor import EXECUTORS


def test_stdout_carries_the_continuation_alone(model: Any, capsys: Any) -> None:
    assert main(["generate", "m", "-p", "say it", "--recipe", "w8", "--threads", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "héllo"
    assert "tok/s" in err
    assert model.asked == ["<user>say it<assistant>"]
    assert model.loaded == {
        "ref": "m",
        "recipe": "w8",
        "threads": 2,
        "context": None,
        "options": EngineOptions(threads=2),
        "store": True,
    }


def test_the_device_is_handed_on_and_must_be_there(model: Any, capsys: Any) -> None:
    assert main(["generate", "m", "-p", "x", "--device", "reference", "--gpu-memory", "0.5"]) == 0
    assert model.loaded.pop("options") == EngineOptions(device="reference", gpu_memory="0.5")
    model.loaded.clear()
    for verb in (["generate", "m", "-p", "x"], ["chat", "m"], ["serve", "m"]):
        assert main([*verb, "--device", "abacus"]) == 2
        err = capsys.readouterr().err
        assert "no device 'abacus'" in err and ", ".join(EXECUTORS) in err
    assert not model.loaded


def test_auto_says_on_stderr_what_it_took_and_why(model: Any, stdin: Any, capsys: Any) -> None:
    model.device_because = "no usable GPU here: there is no driver"
    stdin(b"one\n")
    for verb in (["generate", "m", "-p", "x"], ["chat", "m"]):
        assert main([*verb, "--device", "auto"]) == 0
        err = capsys.readouterr().err
        assert err.startswith("--device auto is cpu: no usable GPU here: there is no driver\n")


def test_raw_uses_no_template_and_dash_reads_stdin(model: Any, stdin: Any, capsys: Any) -> None:
    stdin("Größe\n".encode())
    assert main(["generate", "m", "-p", "-", "--raw"]) == 0
    assert model.asked == ["Größe\n"]


def test_n_cuts_and_never_writes_half_a_character(model: Any, capsys: Any) -> None:
    assert main(["generate", "m", "-p", "x", "-n", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == "h�" and document["device"] == "cpu"
    assert document["finish_reason"] == "length"
    assert document["prompt_tokens"] == len("<user>x<assistant>")


def test_json_is_one_document_and_complete(model: Any, capsys: Any) -> None:
    assert main(["generate", "m", "-p", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert err == ""
    assert document["text"] == "héllo"
    assert document["finish_reason"] == "stop"
    assert document["token_ids"] == [*"héllo".encode(), 256]
    assert {"schema_version", "model", "recipe", "load_ms", "ttft_ms", "decode_tok_per_s"} <= document.keys()


def test_zero_tokens_is_an_empty_answer(model: Any, capsys: Any) -> None:
    assert main(["generate", "m", "-p", "x", "-n", "0"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "0 tokens" in err
    assert main(["generate", "m", "-p", "x", "-n", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ttft_ms"] is None


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_refused_before_loading(model: Any, capsys: Any, prompt: str) -> None:
    assert main(["generate", "m", "-p", prompt]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert not model.loaded


def test_stdin_that_is_no_text_is_refused(model: Any, stdin: Any, capsys: Any) -> None:
    stdin(b"caf\xe9!")
    assert main(["generate", "m", "-p", "-"]) == 2
    assert "byte 0xe9 at offset 3" in capsys.readouterr().err


def test_a_prompt_beyond_the_context_is_refused(model: Any, capsys: Any) -> None:
    model.context = 10
    assert main(["generate", "m", "-p", "x" * 20, "--raw"]) == 2
    assert "20 tokens, the context 10" in capsys.readouterr().err


def test_ctrl_c_keeps_the_text_so_far(model: Any, capsys: Any) -> None:
    model.interrupt_after = 1
    assert main(["generate", "m", "-p", "x"]) == 130
    out, err = capsys.readouterr()
    assert out == "h"
    assert "stopped." in err


def test_it_goes_on_to_the_end_unless_a_number_is_given(model: Any, capsys: Any) -> None:
    assert main(["generate", "m", "-p", "x"]) == 0
    assert main(["generate", "m", "-p", "x", "-n", "3"]) == 0
    assert [request.max_new_tokens for request in model.requests] == [model.context, 3]


def test_what_is_asked_reaches_the_engine(model: Any, tmp_path: Any, capsys: Any) -> None:
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "object"}')
    flags = ["--stop", "a", "--stop", "b", "--repeat-penalty", "1.2", "--system", "short", "--top-k", "4"]
    assert main(["generate", "m", "-p", "x", *flags, "--json-schema", str(schema), "--adapter", "tuned"]) == 0
    request = model.requests[-1]
    assert request.stop == ("a", "b") and request.grammar.source == '{"type": "object"}'
    assert (request.sampling.repetition_penalty, request.sampling.top_k) == (1.2, 4)
    assert model.asked == ["<system>short<user>x<assistant>"]
    assert model.loaded["ref"] == "m+lora:tuned"
    assert main(["generate", "m", "-p", "x", "--json-schema", "no such file"]) == 2
    assert "--json-schema" in capsys.readouterr().err
    assert main(["generate", "m", "-p", "x", "--raw", "--system", "short"]) == 2
