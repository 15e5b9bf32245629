"""The web application: the table of routes, exceptions to answers, what the server says about itself.

The OpenAPI document is made from the table and the request models. The page at `/` is plain files, no build
step, nothing fetched from elsewhere. The whole site is a dictionary from URL path to bytes: a path that is no
key does not exist, so there is no file name for a request to escape from.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import hasten
from hasten.errors import HastenError
from hasten.serve import messages, responses, texts
from hasten.serve.body import Strict
from hasten.serve.call import App, Problem, call_of, problem_of
from hasten.serve.chat import ChatRequest, chat, chat_tokens
from hasten.serve.guard import Guard
from hasten.serve.messages import CountRequest, MessagesRequest
from hasten.serve.metrics import CONTENT_TYPE
from hasten.serve.responses import ResponseRequest
from hasten.serve.service import Endpoint, Handled, Service
from hasten.serve.shape import dumped
from hasten.serve.texts import (
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    InfillRequest,
    TokenizeRequest,
)

if TYPE_CHECKING:
    from hasten.serve.pool import ModelPool
    from hasten.serve.service import Exchange

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"  # innerHTML throws: a model's words stay text
)
"""No inline script or style, no other origin, no markup made of strings."""

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked again each time, answered 304 by the entity tag
}
"""Sent with every file of the page."""

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Asset:
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str  # quoted, as the header wants it


@cache
def assets() -> Mapping[str, Asset]:
    """URL path -> file: `/` is index.html, everything else is `/web/NAME`. Read once, 67 KB in all."""
    found: dict[str, Asset] = {}
    for path in sorted(Path(__file__).with_name("web").iterdir()):
        if path.suffix in MEDIA_TYPES:
            body = path.read_bytes()
            url = "/" if path.name == "index.html" else f"/web/{path.name}"
            etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
            found[url] = Asset(body, MEDIA_TYPES[path.suffix], etag)
    return found


async def models(exchange: Exchange) -> None:
    pool = _started(exchange.service.pool)
    await exchange.json({"object": "list", "data": [_model(pool, name) for name in pool.refs]})


async def model(exchange: Exchange) -> None:
    pool, name = _started(exchange.service.pool), exchange.scope["path_params"]["name"]
    if name not in pool.refs:
        raise Problem(404, f"the model {name[:200]!r} does not exist", param="model", code="model_not_found")
    await exchange.json(_model(pool, name))


def _started(pool: ModelPool) -> ModelPool:
    """The pool, once there is something in it: many ask for the models to see whether a server is ready.

    Raises:
        Problem: 503, the first model loads.
    """
    if not pool.started:
        raise Problem(503, "the first model loads", code="loading", headers={"retry-after": "1"})
    return pool


def _model(pool: ModelPool, name: str) -> dict[str, Any]:
    entry = {"id": name, "object": "model", "created": pool.created, "owned_by": "hasten", "root": name}
    return {**entry, "loaded": pool.is_loaded(name), **pool.facts(name)}


async def version(exchange: Exchange) -> None:
    await exchange.json({"version": hasten.__version__})


async def health(exchange: Exchange) -> None:
    """Liveness: the process answers, has loaded its first model and did not lose its GPU."""
    pool = exchange.service.pool
    status = "loading" if not pool.started else "device lost" if pool.is_lost else "ok"
    await exchange.json({"status": status}, 200 if status == "ok" else 503)


async def ready(exchange: Exchange) -> None:
    """Readiness: new requests would be served now."""
    service = exchange.service
    status = "ready" if service.ready else "draining" if service.draining else "loading"
    await exchange.json({"status": status}, 200 if service.ready else 503)


async def metrics(exchange: Exchange) -> None:
    page = await exchange.service.work(exchange.service.metrics.render)
    await exchange.raw([page], CONTENT_TYPE)


async def stats(exchange: Exchange) -> None:
    """The same numbers for the page at `/`: cheap enough to be asked for every second."""
    service = exchange.service
    loaded = dict(service.pool.loaded())
    models: dict[str, Any] = {}
    for name in service.pool.refs:
        if name not in loaded:
            models[name] = {"loaded": False}
            continue
        total, count = service.metrics.first_tokens.get(name, (0.0, 0))
        models[name] = {"loaded": True, **asdict(loaded[name]), "ttft_s_sum": total, "ttft_count": count}
    await exchange.json({"uptime_s": time.monotonic() - service.began, "models": models})


@dataclass(frozen=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: type[Strict] | None = None
    streams: bool = False  # answers with events where the body says stream
    kind: str = "application/json"  # of the answer
    refuses: tuple[int, ...] = ()  # statuses beside those that any request may meet


ROUTES = (
    Route("POST", "/v1/chat/completions", chat, "Answer a conversation", ChatRequest, streams=True),
    Route("POST", "/v1/completions", texts.completions, "Continue texts", CompletionRequest, streams=True),
    Route("POST", "/v1/responses", responses.create, "Answer, the newer way", ResponseRequest, streams=True),
    Route(
        "POST", "/v1/messages", messages.messages, "Answer, Anthropic's way", MessagesRequest, streams=True
    ),
    Route(
        "POST", "/v1/messages/count_tokens", messages.count_tokens, "Tokens of a conversation", CountRequest
    ),
    Route(
        "POST", "/v1/responses/input_tokens", responses.input_tokens, "Tokens of a request", ResponseRequest
    ),
    Route("POST", "/v1/chat/completions/input_tokens", chat_tokens, "Tokens of a conversation", ChatRequest),
    Route("GET", "/v1/responses/{response_id}", responses.retrieve, "A stored answer", refuses=(404,)),
    Route(
        "DELETE", "/v1/responses/{response_id}", responses.delete, "Forget a stored answer", refuses=(404,)
    ),
    Route(
        "POST",
        "/v1/responses/{response_id}/cancel",
        responses.cancel,
        "Stop an answer made in the background",
        refuses=(400, 404),
    ),
    Route("POST", "/v1/embeddings", texts.embeddings, "Texts as vectors", EmbeddingRequest),
    Route("GET", "/v1/models", models, "The models"),
    Route("GET", "/v1/models/{name}", model, "One model", refuses=(404,)),
    Route("POST", "/tokenize", texts.tokenize, "Token ids of a text or chat", TokenizeRequest),
    Route("POST", "/detokenize", texts.detokenize, "The text of token ids", DetokenizeRequest),
    Route("GET", "/tokenizer_info", texts.tokenizer_info, "Special tokens and the chat template"),
    Route("POST", "/infill", texts.infill, "Fill in between two texts", InfillRequest, streams=True),
    Route("GET", "/version", version, "This program's version"),
    Route("GET", "/health", health, "Liveness", refuses=(503,)),
    Route("GET", "/ready", ready, "Readiness", refuses=(503,)),
    Route("GET", "/metrics", metrics, "Prometheus's page", kind="text/plain"),
    Route("GET", "/stats", stats, "The engines' numbers"),
)

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_SAID = {
    400: "The request is wrong; `param` names the field",
    401: "No API key, or a wrong one",
    404: "There is no such model or stored answer",
    408: "The body took too long",
    413: "The body is too long",
    415: "The body is no JSON",
    429: "The queue is full; Retry-After says when to come again",
    500: "The server failed",
    503: "Draining, no room for the model, or the deadline cannot be met",
    504: "The deadline passed",
}


@cache
def document() -> dict[str, Any]:
    bodies = [route.body for route in ROUTES if route.body is not None]
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Hasten",
            "version": hasten.__version__,
            "description": "An OpenAI-compatible server.",
        },
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    good: dict[str, Any] = {route.kind: {}}
    if route.streams:
        good["text/event-stream"] = {}
    refuses = {*route.refuses, 401, 500, 503}
    if route.body is not None:
        refuses |= {400, 404, 408, 413, 415, 429, 504}
    answers: dict[str, Any] = {"200": {"description": "Done", "content": good}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    for code in sorted(refuses):
        answers[str(code)] = {"description": _SAID[code], "content": error}
    if route.path in ("/health", "/ready"):
        answers["503"] = {
            "description": "Loading, or the GPU is lost (/ready: or draining)",
            "content": {"application/json": {}},
        }
    operation: dict[str, Any] = {"summary": route.summary, "responses": answers}
    if route.body is not None:
        schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{" in route.path:
        name = route.path.split("{")[1].split("}")[0]
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def build(service: Service) -> App:
    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await service.pool.close()
        service.close()

    app = FastAPI(
        title="Hasten",
        openapi_url="/openapi.json",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        **_no_telemetry(),
    )
    app.openapi = document  # type: ignore[method-assign]
    for route in ROUTES:
        path = route.path.replace("{name}", "{name:path}")  # hub ids have a slash
        app.add_api_route(
            path, _handler(service, route.endpoint), methods=_methods(route.method), summary=route.summary
        )
    for path, asset in assets().items():
        app.add_api_route(path, _file(asset), methods=_methods("GET"), include_in_schema=False)
    for kind in (Problem, HastenError, HTTPException, Exception):
        app.add_exception_handler(kind, _failed)
    return Guard(app, service.options, service.log, service.metrics)


def _no_telemetry() -> dict[str, Any]:
    """Newer FastAPIs trace requests by themselves; ours know tokens and models too, one span is enough."""
    if "telemetry" not in inspect.signature(FastAPI).parameters:
        return {}
    return {"telemetry": {"tracing": False}}


def _handler(service: Service, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        return Handled(service, endpoint)

    return handle


def _methods(method: str) -> list[str]:
    return ["GET", "HEAD"] if method == "GET" else [method]


def _file(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        headers = {**HEADERS, "ETag": asset.etag}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)

    return handle


async def _failed(request: Request, error: Exception) -> Response:
    problem = _http_problem(request, error) if isinstance(error, HTTPException) else problem_of(error)
    call_of(request.scope).fields["error"] = problem.message
    if request.scope["path"].startswith("/v1/messages"):  # Anthropic's clients look for the type
        said = dumped({"type": "error", **problem.document()})
        return Response(said, problem.status, dict(problem.headers), "application/json")
    return Response(problem.body(), problem.status, dict(problem.headers), "application/json")


def _http_problem(request: Request, error: HTTPException) -> Problem:
    said = {
        404: f"there is nothing at {request.scope['path'][:200]}; /openapi.json lists what there is",
        405: f"{request.method} is not possible at {request.scope['path'][:200]}",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    return Problem(
        error.status_code,
        said.get(error.status_code, str(error.detail)),
        code=codes.get(error.status_code),
        headers=error.headers,
    )
