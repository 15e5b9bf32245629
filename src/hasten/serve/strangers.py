"""Web pages of strangers: what a browser could be made to send here without its user's will is not served.

A page may send some requests to any address without asking first (the Fetch standard's CORS-safelisted ones):
they cannot declare JSON. A page whose name is made to point at this machine afterwards (DNS rebinding) may
send any: they have the page's own name as their Host.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hasten.serve.problem import Problem

if TYPE_CHECKING:
    from hasten.serve.options import ServeOptions

Headers = Sequence[tuple[bytes, bytes]]

_FROM_BROWSERS = (b"origin", b"sec-fetch-site", b"sec-fetch-mode")
_EVERYBODY = ("/health", "/ready")  # load balancers ask by names of their own; the answers tell nothing


def check_kind(headers: Headers) -> None:
    """Let no body through that a page may send without being asked: a form, plain text, or none of a type.

    Whoever is no browser may leave the type out.

    Raises:
        Problem: 415.
    """
    kinds = [value for name, value in headers if name == b"content-type"]
    if not kinds:
        if not any(name in _FROM_BROWSERS for name, _ in headers):
            return
        said = "the body comes from a web page and has no content-type"
    elif len(kinds) > 1:
        said = "there is more than one content-type"
    elif kinds[0].split(b";")[0].strip().lower() == b"application/json":
        return
    else:
        said = f"the body is declared as {kinds[0].decode('latin-1')[:100]!r}"
    raise Problem(
        415,
        f"{said}; send content-type: application/json (curl: -H 'content-type: application/json')",
        code="unsupported_media_type",
    )


class Hosts:
    """The names by which this server may be asked.

    They are checked where nothing else keeps pages out: on an address of this machine alone without keys; and
    wherever names are given. A server that others reach has a key, or lets everybody in anyway, and proxies
    ask it by names that only they know.

    Addresses pass, and names without a dot: no page of a stranger has such a name.
    """

    def __init__(self, options: ServeOptions) -> None:
        given = {name.lower().rstrip(".") for name in options.allowed_hosts}
        own = socket.gethostname().lower()
        self._names = {*given, options.host.lower(), own, f"{own}.local"}
        self._suffixes = (".localhost", *(name[1:] for name in given if name.startswith("*.")))
        alone = _is_loopback(options.host) and not options.api_keys
        self._checked = "*" not in given and (alone or bool(given))

    def check(self, path: str, headers: Headers) -> None:
        """Refuse what is asked by a strange name.

        Raises:
            Problem: 400, more than one Host; 403, a name that is not this server's.
        """
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) > 1:
            raise Problem(400, "there is more than one Host header", code="invalid_http")
        if not self._checked or not hosts or path in _EVERYBODY:
            return
        name = _without_port(hosts[0].decode("latin-1").lower())
        if "." not in name or _is_address(name) or name in self._names or name.endswith(self._suffixes):
            return
        shown = name[:100]
        said = f"this server is not known as {shown!r}; if it is: hasten serve --allowed-host {shown}"
        raise Problem(403, said, code="host_not_allowed")


def _without_port(host: str) -> str:
    host = host.strip()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if not _is_address(host):
        return host.lower() == "localhost"
    return ipaddress.ip_address(host).is_loopback
