"""Machines that are not here, by figures their makers published: `hasten estimate --machine h200`.

Peaks of a data sheet, and no measurement: kernels reach a share of them (`Efficiency`). So an interval goes
from half of that share to the peaks themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from hasten.cache.reading import read_text
from hasten.core import Recipe
from hasten.errors import UsageError
from hasten.speed.pace import Ceilings, Link

_FILE = Path(__file__).with_name("machines.json")


@dataclass(frozen=True)
class Published:
    """One machine. None is unknown."""

    name: str
    source: str  # who published the figures, and how they were reckoned where nobody did
    read_gb_per_s: float
    bf16_tflops: float  # dense
    title: str = ""
    kind: str = "gpu"  # or cpu
    int8_tops: float | None = None  # of a CPU: integer weights are multiplied so
    fp8_tflops: float | None = None  # of a GPU
    memory_gb: float | None = None
    link_gb_per_s: float | None = None  # to others of its host, one way

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gb is None else round(self.memory_gb * 1e9)

    def pace(self, recipe: Recipe, devices: int = 1) -> Ceilings:
        """Its ceilings. A GPU multiplies narrow weights as bf16, or as fp8 where all of them are."""
        narrow = self.int8_tops
        if self.kind == "gpu":
            narrow = self.fp8_tflops if recipe.name.startswith("fp8") else self.bf16_tflops
            narrow = narrow or self.bf16_tflops
        return Ceilings(
            self.read_gb_per_s,
            narrow,
            self.bf16_tflops,
            devices=devices,
            link=None if self.link_gb_per_s is None else Link(self.link_gb_per_s),
            source=f"published peaks of {self.title or self.name}, not measured",
        )


@cache
def known() -> dict[str, Published]:
    """Machines of the data file, by name."""
    return {record["name"]: Published(**record) for record in json.loads(read_text(_FILE))}


def published(name: str) -> Published:
    """A machine by its name, or of a JSON file with the same fields.

    Raises:
        UsageError: no such name or file, or one that is not as it must be.
    """
    if name.lower() in known():
        return known()[name.lower()]
    if not Path(name).exists():
        raise UsageError(
            f"there is no machine {name!r}, and no file of that name",
            hint=f"use one of {', '.join(known())}, or a JSON file (docs/estimate.md)",
        )
    try:
        record = json.loads(read_text(name))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name} is no JSON file: {error}", hint="see docs/estimate.md for its fields"
        ) from error
    return _checked(record, name)


def _checked(record: Any, name: str) -> Published:
    """A machine of a user's file."""
    hint = 'for example {"name": "mine", "source": "its data sheet", "read_gb_per_s": 300, "bf16_tflops": 20}'
    if not isinstance(record, dict):
        raise UsageError(f"{name} must hold one object, got {type(record).__name__}", hint=hint)
    needed = [one.name for one in fields(Published)][:4]
    if strange := sorted(set(record) - {one.name for one in fields(Published)}):
        raise UsageError(f"{name}: unknown field {strange[0]!r}", hint=hint)
    if missing := [one for one in needed if one not in record]:
        raise UsageError(f"{name}: {missing[0]} is missing", hint=hint)
    texts = ("name", "source", "title", "kind")
    for field, value in record.items():
        if field in texts and not isinstance(value, str):
            raise UsageError(f"{name}: {field} must be text, got {value!r}", hint=hint)
        is_number = (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
        )
        if field not in texts and not is_number and not (value is None and field not in needed):
            raise UsageError(f"{name}: {field} must be a number above 0, got {value!r}", hint=hint)
    if record.get("kind", "gpu") not in ("gpu", "cpu"):
        raise UsageError(f"{name}: kind is gpu or cpu, got {record['kind']!r}", hint=hint)
    return Published(**record)
