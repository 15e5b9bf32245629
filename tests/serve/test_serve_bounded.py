"""Memory that is small: a server keeps within it, and says what it decided. Needs control groups, so root."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hasten.errors import MachineError
from server_process import control_group

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

DECODE = """
import json, sys, time, hasten
model = hasten.load(sys.argv[1], "w8", context=1024, store=False)
list(model.stream([1, 2, 3], 8))
def count(name):
    return int(next(line.split()[1] for line in open(sys.argv[2]) if line.startswith(name)))
def window():
    before, end = count("nr_throttled"), time.monotonic() + 1.5
    while time.monotonic() < end:
        list(model.stream([1, 2, 3], 200))
    return count("nr_throttled") - before
stopped = [window()]
while stopped[-1] > 1 and len(stopped) < 6:  # other load moves a thread between cores, which counts too
    stopped.append(window())
print(json.dumps({"threads": model.threads, "stopped": stopped}))
"""
THREADS = """
import json, sys, hasten
model = hasten.load(sys.argv[1], "w8", context=1024, store=False)
print(json.dumps({"threads": model.threads, "tokens": len(list(model.stream([1, 2, 3], 8)))}))
"""


@pytest.fixture(scope="module")
def bounded() -> ModuleType:
    """benchmarks/bounded_memory.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import bounded_memory

        return bounded_memory


def within(cpus: float, script: str, model: Path) -> dict[str, Any]:
    """What a script that runs a model prints, in a control group with a quota."""
    try:
        with control_group(cpus=cpus) as group:
            command = [sys.executable, "-c", script, str(model), str(group.parts[0] / "cpu.stat")]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, preexec_fn=group.join, check=False
            )
    except MachineError as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("cpus", [1.0, 0.5])
def test_a_quota_of_one_processor_runs_one_thread(tiny_folder: Callable[..., Path], cpus: float) -> None:
    assert within(cpus, THREADS, tiny_folder("llama")) == {"threads": 1, "tokens": 8}


@pytest.mark.slow
def test_one_thread_is_not_stopped_by_its_quota(tiny_folder: Callable[..., Path]) -> None:
    """Of two threads with a quota of one processor each stops the other, in each of 15 periods."""
    found = within(1.0, DECODE, tiny_folder("llama"))
    assert found["threads"] == 1 and found["stopped"][-1] <= 1, found


@pytest.mark.slow
def test_a_server_keeps_within_a_small_memory(bounded: ModuleType, tmp_path: Path) -> None:
    """What it computes would fill it; then a neighbour takes a quarter."""
    plan = bounded.Plan(seconds=8.0, group_bytes=700_000_000, clients=2, threads=1)
    try:
        found = bounded.run(plan, bounded.make_model(tmp_path / "wide-cache"))
    except MachineError as error:
        pytest.skip(str(error))
    assert found.kills == 0 and not found.failed and found.exit_code == 0
    assert found.neighbour is not None and found.computed > plan.group_bytes
    assert len(set(found.repeated)) == 1
    assert max(found.bytes) < plan.group_bytes
