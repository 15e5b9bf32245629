"""What the formats that hold a graph (OpenVINO, ONNX) share: the plan, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hasten.compress import export_decoder
from hasten.compress.export_folder import size_of
from hasten.compress.export_hf_config import config_values
from hasten.compress.export_integers import widened
from hasten.compress.export_result import Exported
from hasten.errors import MachineError
from hasten.models.artifact import Artifact


@dataclass(frozen=True)
class GraphPlan:
    """Everything about the folder but the graph and its weights."""

    artifact: Artifact
    values: dict[str, Any]  # config.json
    stored: Mapping[str, str]  # matrix -> stored type
    notes: tuple[str, ...]


def plan(artifact: Artifact, name: str, package: str, kind: Callable[[str], str]) -> GraphPlan:
    """Decide what the folder will hold; reads no weights.

    Args:
        artifact: the model.
        name: the format.
        package: that writes it.
        kind: matrix -> stored type.

    Raises:
        UsageError: a graph or config.json has no word for something of the model.
        MachineError: the package is not installed.
    """
    packed = artifact.packed
    export_decoder.refuse(packed.config, name)
    values = config_values(packed.config)
    values["dtype"] = values["torch_dtype"] = "float32"
    if find_spec(package) is None:
        raise MachineError(f"--to {name} needs the package {package}", hint=f"pip install {package}")
    stored = {matrix: kind(matrix) for matrix in packed.linears}
    notes = [*export_decoder.notes(packed.config)]
    wide, more = widened(packed.linears, stored)
    if wide:
        notes.append(f"{wide} matrices of 4 to 6 bits lie in 8: {more / 1e6:,.1f} MB more, the same values")
    return GraphPlan(artifact, values, stored, tuple(notes))


def exported(made: GraphPlan, name: str, path: Path, *notes: str) -> Exported:
    """What was written: nothing is rounded."""
    kinds = [
        f"{kind}-g{made.artifact.packed.linears[matrix].layout.group}" if kind != "bf16" else kind
        for matrix, kind in made.stored.items()
    ]
    carried = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    return Exported(name, path, size_of(path), carried, (), (*made.notes, *notes))
