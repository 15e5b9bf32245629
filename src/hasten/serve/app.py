"""The web application: routes to endpoints, exceptions to answers, the page at `/`."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from hasten.errors import HastenError
from hasten.serve.call import App, call_of
from hasten.serve.guard import Guard
from hasten.serve.problem import Problem, problem_of
from hasten.serve.routes import ROUTES, document
from hasten.serve.service import Endpoint, Handled, Service
from hasten.serve.web import HEADERS, Asset, assets


def build(service: Service) -> App:
    """The ASGI application of one server."""
    app = FastAPI(
        title="Hasten",
        openapi_url="/openapi.json",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(service),
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


def _lifespan(service: Service) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await service.pool.close()
        service.close()

    return lifespan
