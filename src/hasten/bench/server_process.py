"""A server in a process of its own: start, wait until it answers, pause, end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from hasten.bench.control_group import ControlGroup
from hasten.bench.http_stream import Address, send_now
from hasten.bench.worker import die_with_parent
from hasten.errors import PeerError

POLL_S = 0.005
SETTLED_S = 0.4
TAIL_LINES = 12


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """Use as a context manager: whatever happens, the process and all it started are killed at the end.

    Between rounds it is stopped (SIGSTOP), so that no thread of it takes the cores of the one measured.
    """

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
        self.name = name
        self.address = address
        self._ready = ready

        def prepare() -> None:
            die_with_parent()  # a benchmark that is killed leaves no server behind
            if group is not None:
                group.join()

        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in end()
        self.started_s = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
                preexec_fn=prepare,
            )
        except OSError as error:
            self._output.close()
            raise PeerError(f"{name}: cannot start {command[0]}: {error.strerror}") from None

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process.poll() is None

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

    def pause(self) -> None:
        """Stop the process until it is resumed."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

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

    def kill(self) -> None:
        """End the process and all it started. Safe to call twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    def last_words(self) -> str:
        """The end of what it printed, for messages."""
        if self._output.closed:
            return ""
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").strip().splitlines()[-TAIL_LINES:]
        return "; its last words:\n  " + "\n  ".join(lines) if lines else ""

    def _signal(self, number: signal.Signals) -> None:
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
