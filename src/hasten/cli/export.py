"""`hasten export`: an artifact as a file of another engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hasten.cli.console import Ticker, emit
from hasten.cli.flags import JsonOption, argument, optional
from hasten.core import SCHEMA_VERSION, as_json

if TYPE_CHECKING:
    from hasten.export import Exported

KEPT = "Nothing was written."

ArtifactArgument = Annotated[str, argument("ARTIFACT", "A .hasten artifact.")]
FormatOption = Annotated[str, optional("--to", "F", "gguf, compressed-tensors, gptq, openvino or onnx.")]
OUT = "The file (gguf) or folder to write. Default: the artifact's name, here."
OutOption = Annotated[Path | None, optional("--out", "PATH", OUT)]
ForceOption = Annotated[bool, optional("--force", None, "Replace what is there, in one step.")]


def command(
    artifact: ArtifactArgument,
    to: FormatOption,
    out: OutOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Write an artifact in another engine's format.

    The weights keep their values; where a format has to round one, it is said by how much. What a format
    cannot carry is refused with the reason, before anything is written.
    """
    from hasten.export import export

    with Ticker() as ticker:
        written = export(
            artifact,
            to,
            out,
            force=force,
            progress=lambda done, total: ticker.count("writing tensors", done, total),
            said=ticker.say,
        )
    if json:
        emit(_document(artifact, written))
    else:
        sys.stdout.write(_text(written))


def _document(artifact: str, written: Exported) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "artifact": artifact,
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
        lines.append(
            f"rounded   {len(rounded)} tensors to {worst.stored_as}, relative error at most "
            f"{worst.relative_error:.1e} ({worst.tensor}); all others are exact"
        )
    else:
        lines.append("rounded   nothing: every value is the artifact's")
    lines += [f"note      {text}" for text in written.notes]
    return "\n".join(lines) + "\n"
