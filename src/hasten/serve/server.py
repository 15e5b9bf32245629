"""The process: a socket, the first model and the application made side by side, signals and the end."""

from __future__ import annotations

import gc
import math
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

from hasten.core import EngineOptions, ServingOptions
from hasten.errors import MachineError, UsageError
from hasten.serve.options import ServeOptions
from hasten.stopping import INTERRUPTED, exit_code, stop_of

if TYPE_CHECKING:
    from hasten.engine.async_engine import AsyncEngine
    from hasten.engine.model import LanguageModel
    from hasten.serve.pool import Loader, Served

BACKLOG = 4096
_EXTRA = "pip install 'hasten[serve]'"


@dataclass(frozen=True)
class ServeSetup:
    """All that `hasten serve` was told."""

    refs: dict[str, str]  # name -> model
    options: ServeOptions = field(default_factory=ServeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    serving: ServingOptions = field(default_factory=ServingOptions)
    recipe: str | None = None

    def load(self, ref: str) -> tuple[LanguageModel, AsyncEngine]:
        from hasten.engine.async_engine import AsyncEngine
        from hasten.engine.model import load

        model = load(ref, recipe=self.recipe, options=self.engine)
        return model, AsyncEngine(model, self.serving)


def serve(setup: ServeSetup, say: Callable[[str], None], loader: Loader | None = None) -> None:
    """Run until SIGTERM or Ctrl-C; what runs then gets `drain_s` to finish.

    The first model loads in a thread of its own while the web framework is imported and the application
    is built. From then on HTTP is answered: /health and /ready with 503, the rest when the model is there.

    Args:
        setup: what to serve and how.
        say: writes the line with the address, once requests would be answered.
        loader: how models are loaded, for tests.

    Raises:
        MachineError: the extra `serve` is not installed.
        UsageError: the address cannot be listened on.
        HastenError: the first model cannot be loaded.
    """
    server = None
    try:
        server, listener = made(setup, say, loader)
        server.run(sockets=[listener])
    except BaseException as error:
        stop = stop_of(error)
        if stop is None:
            raise
        if server is None or not server.loaded:
            _leave_loading(exit_code(stop))
        return  # it had stopped, and was told to once more
    if server.failure is not None:
        raise server.failure
    if not server.loaded:
        _leave_loading(INTERRUPTED if server.stopped_by == signal.SIGINT else 0)


def _leave_loading(code: int) -> NoReturn:
    """End the process while a thread loads a model. It cannot be stopped, and the interpreter cannot end
    beside it: native code that comes back then aborts the process."""
    sys.stderr.write("\nstopped before the model was loaded.\n")
    sys.stderr.flush()
    os._exit(code)


def made(
    setup: ServeSetup, say: Callable[[str], None], loader: Loader | None = None
) -> tuple[Any, socket.socket]:
    """uvicorn's server, its first model on its way, and the socket to run it on; see `serve`."""
    options = replace(setup.options, max_connections=allow_files(setup.options.max_connections))
    setup = replace(setup, options=options)
    listener = listen(setup.options)
    load = loader or setup.load
    first = _in_thread(lambda: load(next(iter(setup.refs.values()))))
    try:
        return _server(setup, load, first, listener, say), listener
    except BaseException:
        listener.close()
        raise


def _in_thread(task: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()

    future.set_running_or_notify_cancel()  # from here on it cannot be cancelled: the thread goes on

    def run() -> None:
        try:
            future.set_result(task())
        except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="hasten-load", daemon=True).start()
    return future


def _server(
    setup: ServeSetup, load: Loader, first: Future[Any], listener: socket.socket, say: Callable[[str], None]
) -> Any:
    try:
        import uvicorn

        from hasten.serve.app import build
        from hasten.serve.http_server import Server, limited
    except ImportError as error:
        raise MachineError(f"hasten serve needs {error.name}, which is not installed", hint=_EXTRA) from None
    from hasten.serve.app import ROUTES
    from hasten.serve.metrics import Log, Metrics
    from hasten.serve.pool import ModelPool
    from hasten.serve.service import Service

    options = setup.options
    log = Log(requests=options.log)
    most = options.max_loaded or len(setup.refs)
    pool = ModelPool(setup.refs, load, most, log, options.any_model)
    metrics = Metrics(route.path for route in ROUTES)
    metrics.watch(pool.loaded)
    service = Service(options, pool, metrics, log)
    config = uvicorn.Config(
        build(service),
        http=limited(options),
        ws="none",
        loop="uvloop",
        lifespan="on",
        access_log=False,
        log_config=None,
        log_level="critical",
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=math.ceil(options.keep_alive_s),
        timeout_graceful_shutdown=math.ceil(options.drain_s),
    )

    def announce(served: Served) -> None:
        say(url_of(listener))
        # a tokenizer takes 0.25 s and holds the interpreter meanwhile: not before the address is known
        _in_thread(lambda: served.model.tokenizer.encode("ready"))
        if threading.current_thread() is threading.main_thread():  # the process is the server's alone
            gc.collect()
            gc.freeze()  # what was built stays: the collector need not walk it while tokens are on their way

    return Server(config, service, first, announce)


_SEND_BUFFER = 256 << 10  # bytes the kernel may hold for a client that does not read; Linux doubles it
_USUAL_CONNECTIONS = 4096
_OWN_FILES = 256  # beside connections: weights, caches, sockets that are being refused


def listen(options: ServeOptions) -> socket.socket:
    """The socket, which takes connections from now on; they are answered when the server runs.

    Raises:
        UsageError: the address is taken, forbidden or none of this machine's.
    """
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {options.host}: {error.strerror}",
            hint="use --host 127.0.0.1, or 0.0.0.0 for all",
        ) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)  # connections inherit it
        listener.bind(address)
        listener.listen(BACKLOG)  # two servers that start at once can both bind, one can listen
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {options.host} port {options.port}: {error.strerror}",
            hint="choose another: --port 8001, or --port 0 for any free one",
        ) from None
    return listener


def allow_files(connections: int | None) -> int:
    """Let the process open so many connections, as far as the system allows it.

    Args:
        connections: None is the usual number, or as many as there may be.

    Returns:
        How many there may be.

    Raises:
        UsageError: fewer than were asked for.
    """
    wanted = (connections or _USUAL_CONNECTIONS) + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted - _OWN_FILES
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < wanted and connections is not None:
        raise UsageError(
            f"--max-connections {connections} needs {wanted} files, {hard} are allowed",
            hint=f"use --max-connections {max(1, hard - _OWN_FILES)}, or raise it: ulimit -Hn {wanted}",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(most - _OWN_FILES, most // 2)  # beside few files of others, too


def url_of(listener: socket.socket) -> str:
    """Where the server is, as a link."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
