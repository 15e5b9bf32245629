"""Memory that is small: a server keeps within it, and says what it decided. Needs control groups, so root."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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


@pytest.fixture(scope="module")
def bounded() -> ModuleType:
    """benchmarks/bounded_memory.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import bounded_memory

        return bounded_memory


@pytest.mark.parametrize("cpus", [1.0, 0.5])
def test_a_quota_of_one_processor_runs_one_thread(tiny_folder: Callable[..., Path], cpus: float) -> None:
    """With two threads of a quota of one, each stops the other in every period."""
    try:
        with control_group(cpus=cpus) as group:
            command = [
                sys.executable,
                "-c",
                DECODE,
                str(tiny_folder("llama")),
                str(group.parts[0] / "cpu.stat"),
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=300, preexec_fn=group.join, check=False
            )
    except MachineError as error:
        pytest.skip(str(error))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["threads"] == 1
    if cpus == 1.0:
        assert found["stopped"][-1] <= 1, found  # two threads would be stopped in each of 15 periods


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
