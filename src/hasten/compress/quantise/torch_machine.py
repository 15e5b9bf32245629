"""What torch computes with: threads for a while, and whether a device is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hasten.errors import MachineError, UsageError
from hasten.machine.cores import usable_cores


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


def refuse_device(name: str | None) -> None:
    """Say it where a device is not there; None is any.

    Raises:
        UsageError: torch knows no such kind.
        MachineError: this machine has none.
    """
    if name is None:
        return
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {name!r}", hint="use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MachineError("torch sees no GPU here", hint="use --device cpu, or install torch for CUDA")
