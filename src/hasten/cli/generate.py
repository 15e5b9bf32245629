"""`hasten generate`: one prompt, one continuation."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from hasten.cli.console import CALIBRATED, Answer, emit, note, note_device, opened, read_stdin, speak
from hasten.cli.flags import (
    ContextOption,
    DeviceOption,
    GpuMemoryOption,
    JsonOption,
    MinPOption,
    ModelArgument,
    NewTokensOption,
    RecipeOption,
    SeedOption,
    TemperatureOption,
    TensorParallelOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    optional,
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
    max_new_tokens: NewTokensOption = 128,
    recipe: RecipeOption = None,
    temperature: TemperatureOption = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = 0,
    raw: RawOption = False,
    threads: ThreadsOption = None,
    context: ContextOption = None,
    device: DeviceOption = "cpu",
    gpu_memory: GpuMemoryOption = None,
    tensor_parallel: TensorParallelOption = 1,
    json: JsonOption = False,
) -> None:
    """Continue one prompt and print the continuation.

    The continuation alone goes to stdout, as it comes; the speed goes to stderr. With -n 0 nothing is
    generated and stdout stays empty.
    """
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty", hint='give some text: -p "What is a mutex?"')
    from hasten.runtime.sampling import SamplingOptions

    sampling = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    started = time.perf_counter()
    options = EngineOptions(
        threads=threads,
        context=context,
        device=device,
        gpu_memory=gpu_memory,
        tensor_parallel=tensor_parallel,
    )
    running = opened(model, recipe, options)
    load_s = time.perf_counter() - started
    note_device(running)
    tokenizer = running.tokenizer
    ids = tokenizer.encode(text) if raw else tokenizer.encode_chat([{"role": "user", "content": text}])
    answer = speak(running.stream(ids, max_new_tokens, sampling), tokenizer, aloud=not json)
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
