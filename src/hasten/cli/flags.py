"""Flags: those that several verbs share, and those that are made from the fields of a frozen dataclass.

A verb whose `command` takes `**flags` gets the flags of dataclasses by `with_flags` and fills them by `fill`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args, get_origin, get_type_hints

import typer

from hasten.cache.reading import read_text
from hasten.cli.console import note_device, opened
from hasten.core import EngineOptions
from hasten.errors import UsageError
from hasten.recipe import appended_methods, share_of

if TYPE_CHECKING:
    from hasten.engine.grammar import Grammar
    from hasten.engine.model import LanguageModel
    from hasten.runtime.sampling import SamplingOptions


def help_of(noun: type, name: str) -> str:
    """The `help` metadata of a dataclass field, as a sentence."""
    text = str(next(f for f in dataclasses.fields(noun) if f.name == name).metadata["help"])
    return text[0].upper() + text[1:] + "."


def argument(metavar: str, help: str) -> Any:
    """An argument of a verb."""
    return typer.Argument(metavar=metavar, help=help, show_default=False)


def given(flag: str, metavar: str | None, help: str, **more: Any) -> Any:
    """A flag whose default is shown."""
    return typer.Option(flag, metavar=metavar, help=help, **more)


def optional(flag: str, metavar: str | None, help: str, **more: Any) -> Any:
    """A flag whose default needs a sentence of the help, and not a value in brackets."""
    return typer.Option(flag, metavar=metavar, help=help, show_default=False, **more)


MODEL = "A .hasten artifact, a GGUF file, a Hugging Face folder, a hub id (Qwen/Qwen3-0.6B), or demo."
RECIPE = (
    f"How weights are stored: source, bf16, w8, w6, w5, w4, with -g64, -g128, -head8, -kv8, "
    f"{appended_methods()} appended; mix:1% (the best mixture within +1 %); or a recipe file. "
    "Default: the artifact's recipe, or the file's own values."
)
ModelArgument = Annotated[str, argument("MODEL", MODEL)]
RecipeOption = Annotated[str | None, optional("--recipe", "R", RECIPE)]
DeviceOption = Annotated[str, given("--device", "NAME", help_of(EngineOptions, "device"))]
TensorParallelOption = Annotated[
    int, given("--tensor-parallel", "N", help_of(EngineOptions, "tensor_parallel"), min=1)
]
GpuMemoryOption = Annotated[
    str | None, optional("--gpu-memory", "SIZE", help_of(EngineOptions, "gpu_memory"))
]
ThreadsOption = Annotated[int | None, optional("--threads", "N", help_of(EngineOptions, "threads"), min=1)]
ContextOption = Annotated[int | None, optional("--context", "N", help_of(EngineOptions, "context"), min=1)]
JsonOption = Annotated[bool, optional("--json", None, "Print one JSON document on stdout.")]
TextOption = Annotated[
    Path | None,
    optional("--text", "FILE", "UTF-8 text to judge on. Default: the prose and code of pydoc_data.topics."),
]
WORKLOAD = (
    "What a service is asked: chat, support, translate, summarize, decide, code, a JSON file of your own, or "
    "a trace that hasten serve --record wrote."
)
WorkloadOption = Annotated[str | None, optional("--workload", "NAME", WORKLOAD)]
TokensOption = Annotated[int, given("--tokens", "N", "Tokens to judge on; more narrow the interval.", min=1)]

ADAPTER = "A LoRA adapter to merge into the model: a folder of PEFT, a GGUF file, or a hub id; repeatable."
AdapterOption = Annotated[list[str] | None, optional("--adapter", "PATH", ADAPTER)]


_ADVICE = "Default: 0 for generate; for chat what the model's authors advise."
_SCHEMA = "The answer is JSON that follows this schema: JSON text, or a file of it."


@dataclass(frozen=True)
class AnswerFlags:
    """What `generate` and `chat` ask of a model and of its answers."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--max-new-tokens",
            metavar="N",
            min=0,
            help="Tokens to generate at most. Default: to the end of the text.",
            show_default=False,
        ),
    ] = None
    recipe: RecipeOption = None
    adapter: AdapterOption = None
    system: Annotated[str, optional("--system", "TEXT", "Instructions the conversation opens with.")] = ""
    temperature: Annotated[
        float | None,
        optional("--temperature", "T", f"0 takes the likeliest token; above it, samples. {_ADVICE}", min=0.0),
    ] = None
    top_k: Annotated[
        int | None, optional("--top-k", "K", "Sample among the K likeliest; 0 is all.", min=0)
    ] = None
    top_p: Annotated[
        float | None, optional("--top-p", "P", "Sample within this total probability.", min=0.0, max=1.0)
    ] = None
    min_p: Annotated[
        float | None,
        optional("--min-p", "P", "Drop tokens below P times the likeliest one.", min=0.0, max=1.0),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        optional("--repeat-penalty", "X", "Above 1: tokens that were there already become less likely."),
    ] = None
    seed: Annotated[int, given("--seed", "N", "Seed of the sampling: same seed, same text.")] = 0
    stop: Annotated[
        list[str] | None, optional("--stop", "TEXT", "End the answer before this text; repeatable.")
    ] = None
    json_schema: Annotated[str | None, optional("--json-schema", "SCHEMA", _SCHEMA)] = None
    threads: ThreadsOption = None
    context: ContextOption = None
    device: DeviceOption = "cpu"
    gpu_memory: GpuMemoryOption = None

    def sampling(self, advised: Mapping[str, float] | None = None) -> SamplingOptions:
        """How tokens are chosen: by the flags that were given, else as is advised, else greedily.

        Raises:
            UsageError: a value outside its range.
        """
        from hasten.runtime.sampling import SamplingOptions

        values: dict[str, Any] = {
            **(advised or {}),
            **{name: v for name in _CHOOSING if (v := getattr(self, name)) is not None},
        }
        if self.repeat_penalty is not None:
            values["repetition_penalty"] = self.repeat_penalty
        if "top_k" in values:
            values["top_k"] = int(values["top_k"])
        return SamplingOptions(**values, seed=self.seed)

    def opened(self, model: str, tensor_parallel: int = 1) -> LanguageModel:
        """The model as it is asked for; a device that was chosen for the user is said."""
        options = EngineOptions(
            threads=self.threads,
            context=self.context,
            device=self.device,
            gpu_memory=self.gpu_memory,
            tensor_parallel=tensor_parallel,
        )
        running = opened(model, self.recipe, options, self.adapter or ())
        note_device(running)
        return running


_CHOOSING = ("temperature", "top_k", "top_p", "min_p")


def grammar_of(schema: str | None) -> Grammar | None:
    """The grammar of a `--json-schema` value: JSON text, or the name of a file that holds it.

    Raises:
        UsageError: a file that cannot be read.
    """
    if schema is None:
        return None
    from hasten.engine.grammar import Grammar

    text = schema
    if not schema.lstrip().startswith(("{", "true", "false")):
        try:
            text = read_text(schema.removeprefix("@"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--json-schema {schema!r:.60} is no JSON object, and no file that can be read: {error}",
                hint='give a schema such as \'{"type": "object"}\', or a file of one',
            ) from error
    return Grammar("json_schema", text)


def parameters(noun: type, env: Mapping[str, str] | None = None) -> list[inspect.Parameter]:
    """One keyword parameter a field of a dataclass, annotated as typer reads it.

    A tuple becomes a flag that may be given again and again, under the singular of its name.

    Args:
        noun: the dataclass; every field has a default, and `help` metadata or a flag for its type.
        env: field -> environment variable that stands in for the flag.
    """
    hints = get_type_hints(noun, include_extras=True)
    return [
        _parameter(noun, item, hints[item.name], (env or {}).get(item.name))
        for item in dataclasses.fields(noun)
    ]


def _parameter(noun: type, item: Any, hint: Any, env: str | None) -> inspect.Parameter:
    if get_origin(hint) is Annotated:
        return inspect.Parameter(
            item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=hint
        )
    repeated = get_origin(hint) is tuple
    name = (item.name.removesuffix("s") if repeated else item.name).replace("_", "-")
    flag = f"--{name}/--no-{name}" if hint is bool else f"--{name}"
    default = None if repeated and not item.default else item.default
    plain: Any = Optional[types.GenericAlias(list, get_args(hint)[:1])] if repeated else hint  # noqa: UP045
    if {str, float} <= set(get_args(hint)):
        plain = Optional[str]  # typer takes one type  # noqa: UP045
    settings: dict[str, Any] = {"help": help_of(noun, item.name), "envvar": env}
    if hint is not bool:
        settings |= {"metavar": _metavar(hint), "show_default": default is not None}
    annotation = Annotated[plain, typer.Option(flag, **settings)]
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _metavar(hint: Any) -> str | None:
    words = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
    return next((words[part] for part in (hint, *get_args(hint)) if part in words), None)


def with_flags(command: Callable[..., None], more: Iterable[inspect.Parameter]) -> None:
    """Give a verb's `command` parameters in place of its `**flags`; its own come first in the help."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    found = [*own, *more]
    command.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in found}


def fill(noun: type, values: Mapping[str, Any]) -> Any:
    """The dataclass of flag values; flags that belong to others are passed over."""
    taken = {}
    for item in dataclasses.fields(noun):
        if item.name in values:
            value = values[item.name]
            taken[item.name] = tuple(value or ()) if isinstance(item.default, tuple) else value
    return noun(**taken)


_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(flag: str, text: str) -> float:
    """A time: `500ms`, `1.5s`, `10m`, `2h` -> seconds. A number alone is refused: it might mean either.

    Raises:
        UsageError: it cannot be read, or is nothing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|min|m|h)\s*", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(
            f"{flag} takes a time with its unit above 0, got {text!r}", hint=f"use {flag} 500ms, 90s or 10m"
        )
    return float(match[1]) * _UNITS[match[2]]


def fraction(text: str, flag: str = "--max-ppl-increase") -> float:
    """A quality budget: `1%` or `0.01` -> 0.01.

    Raises:
        UsageError: neither, negative, or 1 and more without a percent sign, which is surely a slip.
    """
    found = share_of(text)
    if found is None:
        raise UsageError(f"{flag} must be a share such as 1% or 0.01, got {text!r}", hint=f"use {flag} 1%")
    value, in_percent = found
    if value >= 1 and not in_percent:
        raise UsageError(
            f"{flag} {text} would allow {value:.0%}; it is a share, or has a percent sign",
            hint=f"use {flag} {text.strip()}%",
        )
    return value
