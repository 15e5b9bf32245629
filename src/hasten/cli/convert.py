"""`hasten convert`: a model as a file of another engine, quantised on the way where that is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.console import Ticker, emit, show
from hasten.cli.flags import AdapterOption, JsonOption, ModelArgument, ThreadsOption, optional
from hasten.core import SCHEMA_VERSION, as_json

if TYPE_CHECKING:
    from hasten.export import Exported

KEPT = "Nothing was written."

TO = (
    "gguf, compressed-tensors, gptq, openvino or onnx. Behind a colon how weights are stored: a type of GGUF "
    "files (gguf:q4_k_m; also q4_k_s, q5_k_m, q5_k_s, q6_k, q8_0, q4_0, q4_1, q5_0, q5_1, bf16), or a recipe "
    "(gptq:w4-g128, openvino:w8, gguf:w4-best). Default: the values that the model holds."
)
ToOption = Annotated[str, optional("--to", "FORMAT[:TYPE]", TO)]
OUT = "The file (gguf) or folder to write. Default: named after the model, here."
OutOption = Annotated[
    Path | None, typer.Option("--out", "--output", metavar="PATH", help=OUT, show_default=False)
]
ForceOption = Annotated[bool, optional("--force", None, "Replace what is there, in one step.")]


def command(
    model: ModelArgument,
    to: ToOption,
    out: OutOption = None,
    adapter: AdapterOption = None,
    force: ForceOption = False,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Write a model in another engine's format, quantised if asked.

    Without a type the weights keep their values; where a format has to round one, it is said by how much.
    What a format cannot carry is refused with the reason, before anything is written. The verb's older name,
    export, works too.
    """
    from hasten.loading import convert
    from hasten.models.source import with_adapters

    with Ticker() as ticker:
        written = convert(
            with_adapters(model, adapter or ()),
            to,
            out,
            force=force,
            threads=threads,
            observer=lambda progress: show(ticker, progress),
            progress=lambda done, total: ticker.count("writing tensors", done, total),
            said=ticker.say,
        )
    if json:
        emit(_document(model, written))
    else:
        sys.stdout.write(_text(written))


def _document(model: str, written: Exported) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "format": written.format,
        "path": str(written.path),
        "bytes": written.bytes,
        "matrices": dict(written.carried),
        "exact": written.is_exact,
        "rounded": [as_json(one) for one in written.rounding],
        "notes": list(written.notes),
    }


def _text(written: Exported) -> str:
    from hasten.export import FORMATS

    kinds = ", ".join(f"{count} {kind}" for kind, count in written.carried.items())
    lines = [
        f"{written.path}  {written.bytes / 1e6:,.1f} MB, {written.format}",
        f"matrices  {kinds}",
        f"loads in  {FORMATS[written.format].loads_in}",
    ]
    rounded = [one for one in written.rounding if one.relative_error > 0]
    if rounded:
        worst = max(rounded, key=lambda one: one.relative_error)
        kinds = ", ".join(sorted({one.stored_as for one in rounded}))
        lines.append(
            f"rounded   {len(rounded)} tensors to {kinds}, relative error at most "
            f"{worst.relative_error:.1e} ({worst.tensor}); all others are exact"
        )
    else:
        lines.append("rounded   nothing: every value is the model's")
    lines += [f"note      {text}" for text in written.notes]
    return "\n".join(lines) + "\n"
