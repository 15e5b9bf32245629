"""Processes that a benchmark starts: the one an engine lives in, from both sides. All end with the driver.

JSON lines in on the worker's stdin, JSON lines out on what was its stdout:

    {"op": "load", "spec": {...}, ...}
    {"ok": true, "result": {...}}  or  {"ok": false, "error": "...", "hint": "...", "code": 1}

The worker starts as `python -m hasten.bench.process`, or in a Python without hasten through `BOOTSTRAP`; so
nothing is imported here but the standard library, `hasten.core`, `hasten.errors` and this package's light
files. Whatever an engine prints to stdout goes to stderr: the channel is ours alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
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
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

from hasten.bench.peers import EngineSpec
from hasten.core import Workload, as_json
from hasten.errors import HastenError, PeerError, UsageError
from hasten.machine.cgroup import kernel_text
from hasten.machine.memory import peak_rss_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

    from hasten.bench.load import Address

PACKAGE = Path(__file__).resolve().parent.parent
"""Folder of the `hasten` package."""

BOOTSTRAP = """\
import sys, types
sys.path[:] = [p for p in sys.path if p]
package = types.ModuleType("hasten")
package.__path__ = [sys.argv[1]]
sys.modules["hasten"] = package
from hasten.bench.process import main
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
    """One engine's process, which answers requests (`Worker`)."""

    def __init__(self, name: str, python: str | None = None, crash_hint: str | None = None) -> None:
        """Start it.

        Args:
            name: how messages call the engine.
            python: another Python to run it in; None is this one, with hasten as installed here.
            crash_hint: what to do if the process dies by itself.
        Raises:
            PeerError: that Python does not start.
        """
        command = [sys.executable, "-m", "hasten.bench.process"]
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


POLL_S = 0.005
SETTLED_S = 0.4


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess(Child):
    """A server that answers HTTP; it ends with this process, even if that is killed."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        address: Address,
        *,
        ready: str = "/v1/models",
        environment: Mapping[str, str] | None = None,
        join: Callable[[], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            name: how messages call the server.
            ready: path that is answered with 200 once the server is ready.
            environment: variables beside this process's own.
            join: called in the new process before the command, such as to enter a control group.

        Raises:
            PeerError: the command cannot be started.
        """
        self.address = address
        self._ready = ready

        def prepare() -> None:
            die_with_parent()  # a benchmark that is killed leaves no server behind
            if join is not None:
                join()

        self.started_s = time.perf_counter()
        super().__init__(name, command, pipes=False, environment=environment, prepare=prepare)

    def wait_ready(self, limit_s: float = 120.0) -> float:
        """Seconds from start until it answered its readiness path with 200.

        Raises:
            PeerError: it died, or was not ready within the limit; with its last words.
        """
        from hasten.bench.load import send_now

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
        text = kernel_text(Path(f"/proc/{self.pid}/stat"))
        if not text:
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


PR_SET_PDEATHSIG = 1


class Worker:
    def __init__(self) -> None:
        self._engine: Any = None

    def handle(self, request: dict[str, Any]) -> Any:
        handlers: dict[str, Callable[..., Any]] = {
            "check": self.check,
            "prepare": self.prepare,
            "load": self.load,
            "run": self.run,
            "chats": self.chats,
            "cost": self.cost,
            "encode": lambda text: self._engine.encode(text),
            "decode": lambda ids: self._engine.decode(ids),
            "peak_rss": peak_rss_bytes,
        }
        arguments = {key: value for key, value in request.items() if key != "op"}
        return handlers[request["op"]](**arguments)

    def check(self, requires: list[str]) -> list[str]:
        """Those of the modules that cannot be found here."""
        return [name for name in requires if not _exists(name)]

    def prepare(self, spec: dict[str, Any]) -> str:
        return str(importlib.import_module(spec["module"]).prepare(EngineSpec(**spec)))

    def load(self, spec: dict[str, Any], prepared: str) -> dict[str, Any]:
        """Load the engine; what it says of itself."""
        engine = importlib.import_module(spec["module"]).load(EngineSpec(**spec), prepared)
        self._engine = engine
        about = engine.about() if hasattr(engine, "about") else {}
        return {
            "version": engine.version,
            "format": engine.format,
            "weight_bytes": engine.weight_bytes,
            "notes": engine.notes,
            **about,
        }

    def run(self, prompts: list[list[int]], output: int) -> Any:
        return as_json(self._engine.generate(prompts, output))

    def chats(self, prompts: list[list[int]], output: int) -> Any:
        """Many requests at once, each timed for itself (engines that batch continuously)."""
        return as_json(self._engine.chats(prompts, output))

    def cost(self, workload: dict[str, Any]) -> Any:
        """The workload's cost (our engine only)."""
        return as_json(self._engine.cost(Workload(**workload)))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing or broken
        return False


def serve(requests: TextIO, replies: TextIO) -> None:
    worker = Worker()
    for line in requests:
        reply = _answer(worker, json.loads(line))
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, "result": worker.handle(request)}
    except HastenError as error:
        return {"ok": False, "error": error.message, "hint": error.hint, "code": error.exit_code}
    except Exception as error:  # noqa: BLE001  a foreign engine may raise anything
        traceback.print_exc()
        text = " ".join(str(error).split())[:500]
        code = PeerError.exit_code
        return {"ok": False, "error": f"{type(error).__name__}: {text}", "hint": None, "code": code}


def die_with_parent() -> None:
    """Linux: be killed when the driver is gone, even if it was killed itself, even while stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Entry point: keep stdout for the replies and give everybody else stderr."""
    die_with_parent()
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, channel)
    channel.flush()
    os._exit(0)  # engines' own clean-up at exit is not worth a crash after the last figure


if __name__ == "__main__":
    main()
