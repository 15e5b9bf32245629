"""Control groups for servers that a benchmark starts, and how the peers' server is started.

A control group shows what a process does with little memory or little processor time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hasten.bench.load import Address
from hasten.bench.peers import EngineSpec
from hasten.errors import MachineError
from hasten.machine.cgroup import group_folders

_PERIOD_US = 100_000


@dataclass(frozen=True)
class ControlGroup:
    """Folders of one group, one a controller where the version has several trees."""

    parts: tuple[Path, ...]

    def join(self) -> None:
        """Move the calling process into the group: for `preexec_fn`."""
        for part in self.parts:
            (part / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def memory_peak(self) -> int | None:
        """Most bytes that were in use at once, file pages included; None where the kernel does not say."""
        return self._number("memory.peak", "memory.max_usage_in_bytes")

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel ended because the group was out of memory."""
        return self._stat("memory.events", "memory.oom_control").get("oom_kill", 0)

    @property
    def throttled(self) -> int:
        """Periods in which the group had used up its processor time and was stopped."""
        return self._stat("cpu.stat").get("nr_throttled", 0)

    @property
    def anonymous_bytes(self) -> int:
        """Memory in use that is no file's."""
        stat = self._stat("memory.stat")
        return stat.get("total_rss", stat.get("anon", 0))

    def _number(self, *names: str) -> int | None:
        return next((int(text) for text in self._texts(*names) if text.strip().isdecimal()), None)

    def _stat(self, *names: str) -> dict[str, int]:
        lines = [line.split() for text in self._texts(*names) for line in text.splitlines()]
        return {fields[0]: int(fields[1]) for fields in lines if len(fields) == 2 and fields[1].isdecimal()}

    def _texts(self, *names: str) -> Iterator[str]:
        for path in (part / name for part in self.parts for name in names):
            with suppress(OSError):
                yield path.read_text()


@contextmanager
def control_group(*, memory_bytes: int | None = None, cpus: float | None = None) -> Iterator[ControlGroup]:
    """A new group with limits, below this process's own where that is possible; removed at the end.

    Args:
        memory_bytes: most memory its processes may use, file pages included.
        cpus: processors' worth of time they get.

    Raises:
        MachineError: this user cannot make one here: that takes root, or a delegated group.
    """
    with ExitStack() as stack:
        parts: list[Path] = []
        if memory_bytes is not None:
            parts.append(stack.enter_context(_part("memory", lambda at: _limit_memory(at, memory_bytes))))
        if cpus is not None:
            parts.append(stack.enter_context(_part("cpu", lambda at: _limit_time(at, cpus))))
        yield ControlGroup(tuple(parts))


@contextmanager
def _part(controller: str, limit: Callable[[Path], None]) -> Iterator[Path]:
    made = next(filter(None, (_made(parent, limit) for parent in group_folders(controller))), None)
    if made is None:
        raise MachineError(
            f"no control group for {controller} can be made here",
            hint="run as root on Linux, outside containers",
        )
    try:
        yield made
    finally:
        _remove(made)


def _made(parent: Path, limit: Callable[[Path], None]) -> Path | None:
    group = parent / f"hasten-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        limit(group)
    except OSError:
        with suppress(OSError):
            group.rmdir()
        return None
    return group


def _limit_memory(group: Path, size: int) -> None:
    old = group / "memory.limit_in_bytes"
    (old if old.exists() else group / "memory.max").write_text(str(size))


def _limit_time(group: Path, cpus: float) -> None:
    quota = int(cpus * _PERIOD_US)
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        (group / "cpu.max").write_text(f"{quota} {_PERIOD_US}")


def _remove(group: Path) -> None:
    """A group goes once its last process is gone, which takes the kernel a moment."""
    for _ in range(100):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.05)


def server_command(
    python: str, spec: EngineSpec, prepared: str, address: Address, decode_threads: int
) -> list[str]:
    """The command line that serves a prepared GGUF with llama_cpp.server, an OpenAI-compatible server.

    It answers one request at a time behind a lock; the others wait. `interrupt_requests` is turned off, or
    each new request would end the one that is being answered. The server keeps the keys and values of the
    last request, and a request that begins the same computes the rest alone. `logits_all` is off: it is on by
    default and would compute and keep the logits of every prompt token. Everything else is the server's
    default, but for threads and context; batch sizes as llama.cpp's own defaults. It is installed by
    `pip install "llama-cpp-python[server]==0.3.36"`.

    Args:
        decode_threads: threads for answer tokens; prompts take all of `spec.threads`. More are not always
            faster here: on a 2-core AMX machine one thread decodes 42 tokens a second and two decode 24.
    """
    options = {
        "model": prepared,
        "host": address.host,
        "port": address.port,
        "n_ctx": spec.context,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_threads": decode_threads,
        "n_threads_batch": spec.threads,
        "logits_all": False,
        "interrupt_requests": False,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value).lower())]
    flags[1] = prepared  # a path keeps its capitals
    return [python, "-m", "llama_cpp.server", *flags]
