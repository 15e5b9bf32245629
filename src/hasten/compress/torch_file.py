"""State in files of torch: written whole or not at all, and read only as it was written.

torch.load does not compare the checksums that torch.save writes: a bit that the disk turned would end up in
the weights. They are compared here, at some 1 GB/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.cache import write_atomic
from hasten.cache.reading import open_file
from hasten.weights.work_store import state_damage

_KIND = "kind"


def write_state(path: Path, kind: str, state: Mapping[str, Any]) -> Path:
    """Keep tensors and plain values.

    Args:
        path: the file.
        kind: what they are and by which version of it, such as "statistics 1".
        state: by name.

    Raises:
        DiskError: full, read-only or forbidden disk; the file before is untouched.
    """
    import torch

    return write_atomic(path, lambda file: torch.save({**state, _KIND: kind}, file))


def read_state(path: Path, kind: str) -> dict[str, Any] | None:
    """What a file holds, on the CPU; None where it is missing, damaged or of another kind.

    What is not given is made again.
    """
    import torch

    try:
        if state_damage(path) is not None:
            return None
        with open_file(path) as file:
            found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception:  # noqa: BLE001  torch.load raises whatever a strange file makes it
        return None
    return found if isinstance(found, dict) and found.pop(_KIND, None) == kind else None
