"""`hasten compress`: a model by a recipe, as an artifact."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cache import write_atomic
from hasten.cli.console import Ticker, emit, note
from hasten.cli.flags import JsonOption, ThreadsOption, argument, given, optional
from hasten.core import SCHEMA_VERSION
from hasten.errors import UsageError
from hasten.recipe import appended_methods

if TYPE_CHECKING:
    from hasten.compress.result import Compressed, Observer, Progress

KEPT = "Finished layers and the last checkpoint are kept: run the same command again to go on from there."

ModelArgument = Annotated[
    str, argument("MODEL", "A GGUF file, a Hugging Face folder, a hub id (Qwen/Qwen3-0.6B), or demo.")
]
RecipeOption = Annotated[
    str,
    given(
        "--recipe",
        "FILE|NAME",
        "A YAML file (docs/compress.md; it may prune and distil, too), or a name: w8, w6, w5, w4, with -g64, "
        f"-g128, -asym, -head8, -kv8, {appended_methods()} appended.",
    ),
]
OutOption = Annotated[
    Path | None, optional("--out", "DIR", "The artifact. Default: MODEL-RECIPE.hasten here.")
]
CALIBRATION = (
    "UTF-8 text, a .jsonl file, or a Hugging Face dataset: owner/name[:split[:column]]. "
    "Default: every fifth topic of pydoc_data.topics, which is not judged on."
)
CalibrationOption = Annotated[str | None, optional("--calibration", "FILE|DATASET", CALIBRATION)]
TokensOption = Annotated[
    int, given("--tokens", "N", "Calibration tokens; distilling has its own count.", min=1)
]
DEVICE = "Where distilling computes: cpu or cuda. Default: a GPU if there is one."
DeviceOption = Annotated[str | None, optional("--device", "D", DEVICE)]
SECONDS = "Stop distilling after so long. Default: when its tokens are read."
SecondsOption = Annotated[float | None, optional("--distil-seconds", "S", SECONDS, min=1)]
ForceOption = Annotated[bool, optional("--force", None, "Replace an artifact of another model too.")]


def command(
    model: ModelArgument,
    recipe: RecipeOption = "w4-best",
    out: OutOption = None,
    calibration: CalibrationOption = None,
    tokens: TokensOption = 16_384,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    distil_seconds: SecondsOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Quantise, prune and distil a model by a recipe, and write an artifact.

    What cannot be done is said before any work. A run that was stopped goes on from its last finished layer
    when the same command is given again. An artifact of the same model that is there already is replaced in
    one step; one of another model needs --force.
    """
    from hasten.compress.compress import compress
    from hasten.compress.job import Means
    from hasten.compress.recipe_file import recipe_from
    from hasten.models.source import file_name_of
    from hasten.report.pages import compressed_page
    from hasten.weights.artifact import read_plan

    if recipe.strip().startswith("mix:"):
        raise UsageError(
            f"{recipe} is searched for, not given",
            hint=f"hasten optimize {model} --max-ppl-increase {recipe.strip()[4:].strip() or '1%'}",
        )
    found = recipe_from(recipe)
    place = out if out is not None else Path(f"{file_name_of(model)}-{file_name_of(found.name)}.hasten")
    means = Means(threads, device, distil_seconds)
    with Ticker() as ticker:
        made = compress(
            model,
            found,
            calibration,
            out=place,
            force=force,
            tokens=tokens,
            means=means,
            observer=_watcher(ticker),
        )
    write_atomic(place / "report.html", compressed_page(read_plan(place)).encode())
    if json:
        emit(_document(model, made))
        return
    sys.stdout.write(_text(made))
    note(f"hint: what it costs in quality: hasten eval {shlex.quote(str(place))}")


def _watcher(ticker: Ticker) -> Observer:
    def watch(progress: Progress) -> None:
        ticker.count(
            progress.stage if progress.total else f"{progress.stage} {progress.detail}".strip(),
            progress.done,
            progress.total,
            detail=progress.detail if progress.total else "",
            seconds_left=progress.seconds_left,
        )

    return watch


def _size(made: Compressed) -> int:
    assert made.artifact is not None
    return sum(file.stat().st_size for file in made.artifact.iterdir() if file.is_file())


def _document(model: str, made: Compressed) -> dict[str, Any]:
    from hasten.compress.compress import record

    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "artifact": str(made.artifact),
        "bytes": _size(made),
        "bits_per_weight": made.bits_per_weight,
        **record(made),
        "recipe": made.recipe.name,
    }


def _text(made: Compressed) -> str:
    width = max(len(step.name) for step in made.steps) + 2
    lines = []
    for step in made.steps:
        first, *rest = step.lines or ("",)
        lines.append(f"{step.name:<{width}}{first}  ({step.seconds:,.1f} s)")
        lines += [" " * width + line for line in rest]
    lines += [f"{'note':<{width}}{text}" for text in made.notes]
    text = made.calibration
    if text is not None:
        lines.append(f"{'text':<{width}}{text['tokens']:,} tokens of {text['name']}")
    peak = "" if made.peak_rss_bytes is None else f", memory at most {made.peak_rss_bytes / 1e9:,.1f} GB"
    lines.append(
        f"{made.artifact}  {_size(made) / 1e6:,.1f} MB, {made.bits_per_weight:.2f} bits a weight, "
        f"{made.seconds:,.1f} s{peak}"
    )
    return "\n".join(lines) + "\n"
