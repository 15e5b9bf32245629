"""The flags that several verbs share, each declared once; their help comes from the dataclass they fill."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from hasten.core import EngineOptions


def help_of(noun: type, name: str) -> str:
    """The `help` metadata of a dataclass field, as a sentence."""
    text = str(next(f for f in dataclasses.fields(noun) if f.name == name).metadata["help"])
    return text[0].upper() + text[1:] + "."


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .hasten artifact, a GGUF file, a Hugging Face folder, a hub id (Qwen/Qwen3-0.6B), or demo.",
        show_default=False,
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="R",
        help="How weights are stored: source, bf16, w8, w6, w5, w4, with -g64, -g128, -head8, -kv8, -gptq "
        "appended; w4-best; mix:1% (the best mixture within +1 %); or a recipe file. "
        "Default: the artifact's recipe, or the file's own values.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, help=help_of(EngineOptions, "threads"), show_default=False),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", metavar="N", min=1, help=help_of(EngineOptions, "context"), show_default=False),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", show_default=False)
]
NewTokensOption = Annotated[
    int, typer.Option("-n", "--max-new-tokens", metavar="N", min=0, help="Tokens to generate at most.")
]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature", metavar="T", min=0.0, help="0 takes the likeliest token; above it, samples."
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", metavar="K", min=0, help="Sample among the K likeliest tokens; 0 is all.")
]
TopPOption = Annotated[
    float,
    typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Sample within this total probability."),
]
MinPOption = Annotated[
    float,
    typer.Option(
        "--min-p", metavar="P", min=0.0, max=1.0, help="Drop tokens below P times the likeliest one."
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of the sampling: same seed, same text.")
]
