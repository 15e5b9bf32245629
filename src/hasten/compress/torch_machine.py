"""What torch computes with, and state in its files: written whole or not at all, read only as it was written.

torch.load does not compare the checksums that torch.save writes: a bit that the disk turned would end up in
the weights. They are compared here, at some 1 GB/s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hasten.cache import write_atomic
from hasten.cache.reading import open_file
from hasten.errors import MachineError, UsageError
from hasten.machine.cores import usable_cores
from hasten.weights.work_store import state_damage


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """`count` threads inside the block, as many as before afterwards; None: no more than `usable_cores`.

    torch itself counts the processors of the affinity mask, whatever time a control group gives.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_cores()) if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(name: str | torch.device | None) -> torch.device:
    """The device of a name; None takes a GPU where there is one.

    Raises:
        UsageError: torch knows no such kind.
        MachineError: this machine has none.
    """
    there = torch.cuda.is_available()
    if name is None:
        return torch.device("cuda" if there else "cpu")
    found: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        found = torch.device(name)
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", hint="use cpu or cuda")
    if found.type == "cuda" and not there:
        raise MachineError("torch sees no GPU here", hint="use --device cpu, or install torch for CUDA")
    return found


_KIND = "kind"


def write_state(path: Path, kind: str, state: Mapping[str, Any]) -> Path:
    """Keep tensors and plain values.

    Args:
        kind: what they are and by which version of it, such as "statistics 1".

    Raises:
        DiskError: full, read-only or forbidden disk; the file before is untouched.
    """
    return write_atomic(path, lambda file: torch.save({**state, _KIND: kind}, file))


def read_state(path: Path, kind: str) -> dict[str, Any] | None:
    """What a file holds, on the CPU; None where it is missing, damaged or of another kind."""
    try:
        return whole_state(path, kind)
    except Exception:  # noqa: BLE001  torch.load raises whatever a strange file makes it
        return None


def whole_state(path: Path, kind: str) -> dict[str, Any]:
    """What a file holds, on the CPU.

    Raises:
        ValueError: its checksums differ, or it is of another kind; torch.load raises what it likes.
    """
    if (wrong := state_damage(path)) is not None:
        raise ValueError(wrong)
    with open_file(path) as file:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    if (other := found.pop(_KIND, None)) != kind:
        raise ValueError(f"it is {other!r}, this program reads {kind!r}")
    return found
