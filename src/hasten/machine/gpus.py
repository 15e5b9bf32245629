"""Graphics processors, by asking their drivers' own programs; torch is never imported for it."""

from __future__ import annotations

import csv
import shutil
import subprocess

_TIMEOUT_S = 5.0


def gpus() -> tuple[str, ...]:
    """One line a GPU, its name and memory; empty where no driver answers."""
    nvidia = _lines("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    amd = _lines("rocm-smi", "--showproductname", "--csv")
    return tuple(nvidia_names(nvidia) + amd_names(amd))


def nvidia_names(lines: list[str]) -> list[str]:
    """From `NVIDIA H200, 143771 MiB` to `NVIDIA H200 (143771 MiB)`."""
    rows = [[field.strip() for field in row] for row in csv.reader(lines)]
    return [f"{row[0]} ({row[1]})" for row in rows if len(row) == 2]


def amd_names(lines: list[str]) -> list[str]:
    """The column `Card Series` (or `Card series`) of rocm-smi's table."""
    rows = list(csv.reader(line for line in lines if "," in line))
    if not rows:
        return []
    column = next((i for i, name in enumerate(rows[0]) if name.strip().lower() == "card series"), None)
    return [] if column is None else [row[column].strip() for row in rows[1:] if len(row) > column]


def _lines(program: str, *arguments: str) -> list[str]:
    found = shutil.which(program)
    if found is None:
        return []
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
