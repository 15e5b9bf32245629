"""Processes that a benchmark starts: the worker of an engine. All end with the driver."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from typing_extensions import Self

from hasten.errors import HastenError, PeerError, UsageError

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


class Child:
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


class WorkerProcess(Child):
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
