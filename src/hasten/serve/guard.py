"""The outermost layer: who may come in, how the client is watched while it waits, the log line at the end.

Plain ASGI: a layer costs a function call a message, and no task or queue of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
import secrets
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hasten.serve.call import App, Call, Deadline, Message, Problem, Receive, Scope, Send, problem_of
from hasten.serve.metrics import new_tracer

if TYPE_CHECKING:
    from hasten.serve.metrics import Log, Metrics
    from hasten.serve.options import ServeOptions

_EVERYBODY = ("/health", "/ready")  # load balancers ask by names of their own; the answers tell nothing


class Hosts:
    """The names by which this server may be asked.

    A web page whose own name is made to point at this machine (DNS rebinding) may send any request that a
    browser can make: without the user's will, and with the page's name as the Host.

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

    def check(self, path: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
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


_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:/+=-]{1,128}")
CLOSED = ("/v1/", "/tokenize", "/detokenize", "/infill", "/metrics", "/stats", "/openapi.json")
"""Paths that need a key where keys are set. The page is only files; liveness and readiness tell nothing."""

_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,2000}")
_ALLOWED = (
    (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
    (b"access-control-max-age", b"600"),
)

_DRAINED = 1_000_000  # bytes of a refused body that are taken at least
_SILENT_S = 2.0  # a client that sends no more of it for so long waits for the answer
_STOPPING = Problem(503, "the server is stopping", code="stopping", headers={"retry-after": "1"})


_SHORT = ("/chat/completions", "/completions", "/embeddings", "/models", "/responses", "/messages")


_PREFIXED = re.compile(rf"(?:/[\w.~-]+){{1,4}}?(/v1(?:{'|'.join(map(re.escape, _SHORT))}).*)", re.DOTALL)
_WITHOUT_V1 = re.compile(r"(?:/[\w.~-]+){1,4}?(/chat/completions|/completions|/embeddings)")


def plain_path(path: str) -> str:
    """A path as the routes have it: base URLs come with and without `/v1`, with and without a slash, and with
    what a proxy or a service (Azure's deployments) has before it."""
    path = re.sub("/{2,}", "/", path)
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path[3:]
    if path.startswith(_SHORT):
        return f"/v1{path}"
    if path.startswith("/v1/"):
        return path
    prefixed, bare = _PREFIXED.fullmatch(path), _WITHOUT_V1.fullmatch(path)
    if prefixed is not None:
        return prefixed.group(1)
    return path if bare is None else f"/v1{bare.group(1)}"


class Guard:
    """Wraps the application.

    It gives every request an id (or takes the client's), checks keys, answers other origins' questions,
    cancels the work of a client that leaves or stops reading, turns every exception into an answer, and logs.
    """

    def __init__(self, app: App, options: ServeOptions, log: Log, metrics: Metrics) -> None:
        self._app = app
        self._options = options
        self._keys = [key.encode() for key in options.api_keys]
        self._hosts = Hosts(options)
        self._origins = {origin.rstrip("/").encode() for origin in options.cors_origins}
        self._log = log
        self._tracer = new_tracer()
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = plain_path(scope["path"])
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given.decode() if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        call = scope["hasten.call"] = Call(name, _address(scope))
        origin = headers.get(b"origin", b"")
        watch = _Watch(call, receive, send, self._options, self._extra_headers(call, origin))
        watch.expect_body(headers)
        try:
            with self._tracer.span(scope, call) if self._tracer is not None else contextlib.nullcontext():
                await self._serve(scope, headers, watch)
        except asyncio.CancelledError:
            if not (call.left or call.stalled):
                if not call.started:
                    await _answer(_STOPPING, watch.send)
                raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001  a client gets an answer whatever happens
            await self._failed(error, call, watch)
        finally:
            watch.stop()
            if call.stalled and "hasten.abort" in scope:
                scope["hasten.abort"]()  # closing would wait for the client to read
            self._report(scope, call)

    async def _serve(self, scope: Scope, headers: dict[bytes, bytes], watch: _Watch) -> None:
        call = watch.call
        self._hosts.check(scope["path"], scope["headers"])
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            allowed = self._may_call(headers.get(b"origin", b""))
            status = 204 if allowed else 403
            extra = [*_ALLOWED, _allowed_headers(headers)] if allowed else []
            await watch.send({"type": "http.response.start", "status": status, "headers": extra})
            await watch.send({"type": "http.response.body", "body": b""})
            return
        if self._keys and scope["path"].startswith(CLOSED):
            call.client = self._check_key(headers)
        await self._app(scope, watch.receive, watch.send)

    def _check_key(self, headers: dict[bytes, bytes]) -> str:
        """Which key was given. All keys are compared, each in constant time.

        Raises:
            Problem: 401 without a key or with a wrong one.
        """
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        for name in (b"x-api-key", b"api-key"):  # as Anthropic's and Azure's clients send it
            if not key and name in headers:
                scheme, key = b"bearer", headers[name]
        found = -1
        for number, mine in enumerate(self._keys):
            if hmac.compare_digest(mine, key.strip()):
                found = number
        if found < 0 or scheme.lower() != b"bearer":
            said = "the API key is wrong" if key else "an API key is needed: Authorization: Bearer KEY"
            raise Problem(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return f"key-{found}"

    def _may_call(self, origin: bytes) -> bool:
        return origin in self._origins or b"*" in self._origins

    def _extra_headers(self, call: Call, origin: bytes) -> list[tuple[bytes, bytes]]:
        extra = [(b"x-request-id", call.request_id.encode())]
        if origin and self._may_call(origin):
            extra += [
                (b"access-control-allow-origin", origin),
                (
                    b"access-control-expose-headers",
                    b"x-request-id, retry-after, x-hasten-ignored, x-hasten-schema",
                ),
                (b"vary", b"origin"),
            ]
        return extra

    async def _failed(self, error: BaseException, call: Call, watch: _Watch) -> None:
        problem = problem_of(error)
        call.fields.setdefault("error", problem.message)
        if problem.status == 500:
            self._fault(error, call)
        if call.left or call.stalled:
            return
        if not call.started:
            with contextlib.suppress(asyncio.CancelledError):  # the client left meanwhile
                await _answer(problem, watch.send)

    def _fault(self, error: BaseException, call: Call) -> None:
        import traceback

        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._log.event("fault", "error", request_id=call.request_id, traceback=text)

    def _report(self, scope: Scope, call: Call) -> None:
        status = 499 if (call.left or call.stalled) and not call.complete else call.status or 500
        path = scope["path"] if scope["path"] in self._metrics.paths else "other"
        self._metrics.http(scope["method"], path, status)
        fields: dict[str, Any] = {"client": call.client, **call.fields}
        if call.stalled:
            fields["error"] = "the client did not read its answer in time"
        self._log.request(
            request_id=call.request_id,
            method=scope["method"],
            path=scope["path"][:200],
            status=status,
            duration_ms=round(1000 * (time.monotonic() - call.began), 2),
            **fields,
        )


class _Watch:
    """The client's end of a call: cancels the task that serves it when the client leaves or stops reading."""

    def __init__(
        self,
        call: Call,
        receive: Receive,
        send: Send,
        options: ServeOptions,
        extra: list[tuple[bytes, bytes]],
    ) -> None:
        self.call = call
        self._receive = receive
        self._send = send
        self._options = options
        self._patience_s = options.send_timeout_s
        self._extra = extra
        self._unread = False  # the client sends a body that nobody has read to its end
        self._waits = False  # with sending it, until it is asked for (Expect: 100-continue)
        self._announced = 0  # bytes of it
        self._taken = 0
        self._serving = asyncio.current_task()
        self._listener: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    async def receive(self) -> Message:
        """The application's `receive`; once the body is in, somebody listens whether the client leaves."""
        if self._listener is not None:
            return await _never()
        message = await self._receive()
        if message["type"] == "http.request":
            self._taken += len(message.get("body", b""))
            if not message.get("more_body", False):
                self._unread = False
                self._listener = self._loop.create_task(self._listen())
        return message

    def expect_body(self, headers: dict[bytes, bytes]) -> None:
        """Note whether the client sends a body, and whether it waits to be told to."""
        length = headers.get(b"content-length", b"0")
        self._announced = int(length) if length.isdigit() else 0
        self._unread = self._announced > 0 or b"transfer-encoding" in headers
        self._waits = b"expect" in headers

    async def send(self, message: Message) -> None:
        """The application's `send`, timed."""
        call = self.call
        if message["type"] == "http.response.start":
            if self._unread and (self._taken or not self._waits) and message["status"] != 408:
                await self._drain()
            call.started, call.status = True, message["status"]
            own = [
                (name.encode(), value.encode("latin-1", "replace")) for name, value in call.headers.items()
            ]
            message["headers"] = [*message.get("headers", ()), *self._extra, *own]
        call.sending_since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._patience_s, self._check)
        await self._send(message)
        call.sending_since = None
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            call.complete = True

    async def _drain(self) -> None:
        """Take the rest of a body that is refused, within bounds.

        A client that still sends when the connection is closed sees a reset in place of the answer.
        """
        most = max(_DRAINED, 4 * self._options.max_body_bytes)
        self._unread = False
        ends = self.call.began + self._options.body_timeout_s
        while self._announced <= most and self._taken < most and time.monotonic() < ends:
            message: Message | None = None
            with Deadline(_SILENT_S):
                message = await self._receive()
            if message is None:  # it waits for the answer
                return
            if message["type"] == "http.disconnect":
                self.call.left = True
                raise asyncio.CancelledError
            self._taken += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    def stop(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        """Runs once a patience, not once a message."""
        since = self.call.sending_since
        waited = 0.0 if since is None else self._loop.time() - since
        if waited < self._patience_s:
            self._timer = self._loop.call_later(self._patience_s - waited, self._check)
            return
        self.call.stalled = True
        self._cancel()

    async def _listen(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while (await self._receive())["type"] != "http.disconnect":
                continue
            if not self.call.complete:
                self.call.left = True
                self._cancel()

    def _cancel(self) -> None:
        if self._serving is not None:
            self._serving.cancel()


async def _never() -> Message:
    """The body is read and the listener owns the rest: whoever asks again waits until it is cancelled."""
    await asyncio.get_running_loop().create_future()
    return {"type": "http.disconnect"}


async def _answer(problem: Problem, send: Send) -> None:
    body = problem.body()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in problem.headers.items()),
    ]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _allowed_headers(headers: dict[bytes, bytes]) -> tuple[bytes, bytes]:
    """What the browser asks for: clients name themselves in a dozen headers (x-stainless-...)."""
    asked = headers.get(b"access-control-request-headers", b"")
    named = asked if _HEADER_NAMES.fullmatch(asked) else b"authorization, content-type, x-request-id"
    return b"access-control-allow-headers", named


def _address(scope: Scope) -> str:
    return str((scope.get("client") or ("unknown",))[0])
