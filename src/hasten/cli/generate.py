"""`hasten generate`: one prompt, one continuation."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from hasten.cli.console import CALIBRATED, Answer, emit, note, note_device, opened, read_stdin, speak
from hasten.cli.flags import (
    AdapterOption,
    ContextOption,
    DeviceOption,
    GpuMemoryOption,
    JsonOption,
    JsonSchemaOption,
    MinPOption,
    ModelArgument,
    NewTokensOption,
    RecipeOption,
    RepeatPenaltyOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TensorParallelOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    grammar_of,
    optional,
    sampling_of,
)
from hasten.core import SCHEMA_VERSION, EngineOptions
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
    max_new_tokens: NewTokensOption = None,
    recipe: RecipeOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = "",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repeat_penalty: RepeatPenaltyOption = None,
    seed: SeedOption = 0,
    stop: StopOption = None,
    json_schema: JsonSchemaOption = None,
    raw: RawOption = False,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    tensor_parallel: TensorParallelOption = 1,
    json: JsonOption = False,
) -> None:
    """Continue one prompt and print the continuation.

    The continuation alone goes to stdout, as it comes; the speed goes to stderr. It ends where the model ends
    it, at a --stop text, or where -n or the context is full. With -n 0 nothing is generated and stdout stays
    empty.
    """
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint='give some text: -p "What is a mutex?"')
    if raw and system:
        raise UsageError("--system needs the chat template, which --raw leaves out", hint="drop one of them")
    flags = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repeat_penalty,
    }  # fmt: skip
    sampling, grammar = sampling_of({}, flags, seed), grammar_of(json_schema)
    from hasten.core import ServingOptions
    from hasten.engine.request import Request

    started = time.perf_counter()
    options = EngineOptions(
        threads=threads,
        context=context,
        device=device,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel,
    )
    running = opened(model, recipe, options, adapter or ())
    load_s = time.perf_counter() - started
    note_device(running)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    ids = running.tokenizer.encode(text) if raw else running.tokenizer.encode_chat(messages)
    most = running.context if max_new_tokens is None else max_new_tokens
    request = Request(tuple(ids), most, sampling, stop=tuple(stop or ()), grammar=grammar)
    answer = speak(running.engine(ServingOptions(prefix_cache=False)).run([request]), aloud=not json)
    if json:
        emit(_document(running, answer, len(ids), load_s))
        return
    if sys.stdout.isatty():
        sys.stdout.write("\n")
    note(f"[{running.recipe.name}] {len(ids)} prompt tokens, {answer.line()}, loaded in {load_s:.2f} s")


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
