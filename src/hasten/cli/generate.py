"""`hasten generate`: one prompt, one continuation."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from hasten.cli.console import CALIBRATED, Answer, emit, note, read_stdin, speak
from hasten.cli.flags import (
    AnswerFlags,
    JsonOption,
    ModelArgument,
    TensorParallelOption,
    fill,
    grammar_of,
    optional,
    parameters,
    with_flags,
)
from hasten.core import SCHEMA_VERSION
from hasten.errors import UsageError

KEPT = f"The text so far is on stdout. {CALIBRATED}"

PromptOption = Annotated[
    str,
    typer.Option(
        "-p", "--prompt", metavar="TEXT", help="The prompt; - reads it from stdin.", show_default=False
    ),
]
RawOption = Annotated[
    bool, optional("--raw", None, "Continue the text as it stands, without the chat template.")
]


def command(
    model: ModelArgument,
    prompt: PromptOption,
    raw: RawOption = False,
    tensor_parallel: TensorParallelOption = 1,
    json: JsonOption = False,
    **flags: Any,
) -> None:
    """Continue one prompt and print the continuation.

    The continuation alone goes to stdout, as it comes; the speed goes to stderr. It ends where the model ends
    it, at a --stop text, or where -n or the context is full. With -n 0 nothing is generated and stdout stays
    empty.
    """
    asked: AnswerFlags = fill(AnswerFlags, flags)
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint='give some text: -p "What is a mutex?"')
    if raw and asked.system:
        raise UsageError("--system needs the chat template, which --raw leaves out", hint="drop one of them")
    sampling, grammar = asked.sampling(), grammar_of(asked.json_schema)
    from hasten.core import ServingOptions
    from hasten.engine.request import Request

    started = time.perf_counter()
    running = asked.opened(model, tensor_parallel)
    load_s = time.perf_counter() - started
    messages = [{"role": "system", "content": asked.system}] if asked.system else []
    messages.append({"role": "user", "content": text})
    ids = running.tokenizer.encode(text) if raw else running.tokenizer.encode_chat(messages)
    most = running.context if asked.max_new_tokens is None else asked.max_new_tokens
    request = Request(tuple(ids), most, sampling, stop=tuple(asked.stop or ()), grammar=grammar)
    answer = speak(running.engine(ServingOptions(prefix_cache=False)).run([request]), aloud=not json)
    if json:
        emit(_document(running, answer, len(ids), load_s))
        return
    if sys.stdout.isatty():
        sys.stdout.write("\n")
    note(f"[{running.recipe.name}] {len(ids)} prompt tokens, {answer.line()}, loaded in {load_s:.2f} s")


with_flags(command, parameters(AnswerFlags))


def _document(running: Any, answer: Answer, prompt_tokens: int, load_s: float) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": running.name,
        "recipe": running.recipe.name,
        "device": running.device,
        "text": answer.text,
        "token_ids": answer.token_ids,
        "prompt_tokens": prompt_tokens,
        "finish_reason": answer.finish_reason,
        "load_ms": load_s * 1000,
        "ttft_ms": answer.ttft_ms,
        "decode_tok_per_s": answer.decode_tok_per_s,
    }
