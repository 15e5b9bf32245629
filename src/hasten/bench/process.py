"""Processes that a benchmark starts: the worker of an engine, or a server. All end with the driver.

A control group of its own shows what a process does with little memory or little processor time.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from typing_extensions import Self

from hasten.bench.load import Address, send_now
from hasten.bench.worker import die_with_parent
from hasten.errors import HastenError, MachineError, PeerError, UsageError
from hasten.machine.cgroup import folders

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
    made = next(filter(None, (_made(parent, limit) for parent in folders(controller))), None)
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


PACKAGE = Path(__file__).resolve().parent.parent
"""Folder of the `hasten` package."""

BOOTSTRAP = """\
import sys, types
sys.path[:] = [p for p in sys.path if p]
package = types.ModuleType("hasten")
package.__path__ = [sys.argv[1]]
sys.modules["hasten"] = package
from hasten.bench.worker import main
main()
"""
"""Runs the worker in a Python without hasten: its files alone, not the site-packages beside them."""

TAIL_LINES = 12
POLL_S = 0.005
SETTLED_S = 0.4


class _Child:
    """A process with a session of its own. Use it as a context manager: it is killed at the end in any case.

    Ctrl-C reaches the driver alone, which then kills the process and all it started. While another engine is
    measured, the process is stopped (SIGSTOP), so that no spinning thread of it takes the other's cores.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        pipes: bool,
        hint: str | None = None,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in kill()
        self._tail = ""
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else self._output,
                stderr=self._output,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
                preexec_fn=prepare,
            )
        except OSError as error:
            self._output.close()
            raise PeerError(f"{name}: cannot start {command[0]}: {error.strerror}", hint=hint) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        self._signal("SIGSTOP")

    def resume(self) -> None:
        self._signal("SIGCONT")

    def kill(self) -> None:
        """End the process and all it started. Safe to call twice."""
        if self._output.closed:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._tail = self.last_words()
        for pipe in (self._process.stdin, self._output):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()

    def last_words(self) -> str:
        """The end of what the process printed, for messages."""
        if self._output.closed:
            return self._tail
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines()[-TAIL_LINES:]
        return "; its last words:\n  " + "\n  ".join(lines) if lines else ""

    def _signal(self, name: str) -> None:
        number = getattr(signal, name, None)
        if number is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class WorkerProcess(_Child):
    """One engine's process, which answers requests (`hasten.bench.worker`)."""

    def __init__(self, name: str, python: str | None = None, crash_hint: str | None = None) -> None:
        """Start it.

        Args:
            name: how messages call the engine.
            python: another Python to run it in; None is this one, with hasten as installed here.
            crash_hint: what to do if the process dies by itself.
        Raises:
            PeerError: that Python does not start.
        """
        command = [sys.executable, "-m", "hasten.bench.worker"]
        if python is not None:
            command = [python, "-c", BOOTSTRAP, str(PACKAGE)]
        hint = "set HASTEN_PEER_PYTHON or --peer-python to a Python that has the engine"
        super().__init__(name, command, pipes=True, hint=hint)
        self._crash_hint = crash_hint
        self._replies: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self, op: str, limit_s: float, **arguments: Any) -> Any:
        """Send one request and wait for its result.

        Raises:
            UsageError, PeerError: what the worker said.
            PeerError: it died, or did not answer within the limit (it is killed then); with its last words.
        """
        if self._output.closed:
            raise PeerError(f"{self.name} has ended already{self._tail}")
        self.resume()
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            stdin.flush()
            line = self._replies.get(timeout=limit_s)
        except queue.Empty:
            self.kill()
            raise PeerError(
                f"{self.name} gave no answer to {op!r} within {limit_s:.0f} s{self._tail}"
            ) from None
        except BrokenPipeError:
            line = b""
        if not line:
            raise self._death(op)
        return self._result(json.loads(line))

    def _listen(self) -> None:
        """Put every reply line in the queue, and an empty one at the end of the stream."""
        stdout = self._process.stdout
        assert stdout is not None
        with stdout:
            for line in stdout:
                self._replies.put(line)
        self._replies.put(b"")

    def _result(self, reply: dict[str, Any]) -> Any:
        if reply["ok"]:
            return reply["result"]
        kind: type[HastenError] = UsageError if reply["code"] == UsageError.exit_code else PeerError
        raise kind(f"{self.name}: {reply['error']}", hint=reply["hint"])

    def _death(self, op: str) -> PeerError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self.kill()
        return PeerError(f"{self.name} {how} during {op!r}{self._tail}", hint=self._crash_hint)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess(_Child):
    def __init__(
        self,
        name: str,
        command: Sequence[str],
        address: Address,
        *,
        ready: str = "/v1/models",
        environment: Mapping[str, str] | None = None,
        group: ControlGroup | None = None,
    ) -> None:
        """Start it.

        Args:
            name: how messages call the server.
            ready: path that is answered with 200 once the server is ready.
            environment: variables beside this process's own.
            group: the control group that the server runs in.
        Raises:
            PeerError: the command cannot be started.
        """
        self.address = address
        self._ready = ready

        def prepare() -> None:
            die_with_parent()  # a benchmark that is killed leaves no server behind
            if group is not None:
                group.join()

        self.started_s = time.perf_counter()
        super().__init__(name, command, pipes=False, environment=environment, prepare=prepare)

    def wait_ready(self, limit_s: float = 120.0) -> float:
        """Seconds from start until it answered its readiness path with 200.

        Raises:
            PeerError: it died, or was not ready within the limit; with its last words.
        """
        while time.perf_counter() - self.started_s < limit_s:
            if not self.running:
                raise PeerError(f"{self.name} ended with code {self._process.returncode}{self.last_words()}")
            with contextlib.suppress(PeerError):
                if send_now(self.address, "GET", self._ready, limit_s=10.0).status == 200:
                    return time.perf_counter() - self.started_s
            time.sleep(POLL_S)
        raise PeerError(f"{self.name} was not ready within {limit_s:.0f} s{self.last_words()}")

    def settle(self, limit_s: float = 10.0) -> None:
        """Wait until it has used next to no processor time for a while: ours tidies up when it is idle."""
        until = time.perf_counter() + limit_s
        used = self._cpu_s()
        while time.perf_counter() < until:
            time.sleep(SETTLED_S)
            before, used = used, self._cpu_s()
            if used - before < 0.1 * SETTLED_S:
                return

    def _cpu_s(self) -> float:
        """Processor time of all its threads so far, seconds; 0 once it is gone."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return 0.0
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def terminate(self, limit_s: float = 60.0) -> int:
        """Ask it to end (SIGTERM) and wait; its exit code.

        Raises:
            PeerError: it did not end in time (it is killed then).
        """
        self.resume()
        self._process.terminate()
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            words = self.last_words()
            self.kill()
            raise PeerError(f"{self.name} did not end within {limit_s:.0f} s of SIGTERM{words}") from None
