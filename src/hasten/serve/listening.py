"""The socket that a server listens on, and its address."""

from __future__ import annotations

import resource
import socket
from typing import TYPE_CHECKING

from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.serve.options import ServeOptions

_SEND_BUFFER = 256 << 10  # bytes the kernel may hold for a client that does not read; Linux doubles it
_OWN_FILES = 256  # beside connections: weights, caches, sockets that are being refused


def listen(options: ServeOptions) -> socket.socket:
    """The bound socket.

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
    except OSError as error:
        listener.close()
        raise cannot_listen(options.host, options.port, error) from None
    return listener


def cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    """What is told where an address cannot be had."""
    return UsageError(
        f"cannot listen on {host} port {port}: {error.strerror}",
        hint="choose another: --port 8001, or --port 0 for any free one",
    )


def allow_files(connections: int) -> None:
    """Let the process open so many connections, as far as the system allows it.

    Raises:
        UsageError: it does not.
    """
    wanted = connections + _OWN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UsageError(
            f"--max-connections {connections} needs {wanted} files, {hard} are allowed",
            hint=f"use --max-connections {max(1, hard - _OWN_FILES)}, or raise it: ulimit -Hn {wanted}",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def url_of(listener: socket.socket) -> str:
    """Where the server is, as a link."""
    host, port = listener.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"
