"""The OpenAPI document: made from the routes and the request models, so that it cannot say otherwise."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

import hasten
from hasten.serve.routes import ROUTES, Route

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


def document() -> dict[str, Any]:
    """All of it."""
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
    for status in sorted(refuses):
        answers[str(status)] = {"description": _SAID[status], "content": error}
    if route.path in ("/health", "/ready"):
        answers["503"] = {"description": "Loading (/ready: or draining)", "content": {"application/json": {}}}
    operation: dict[str, Any] = {"summary": route.summary, "responses": answers}
    if route.body is not None:
        schema = {"$ref": f"#/components/schemas/{route.body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if "{" in route.path:
        name = route.path.split("{")[1].rstrip("}")
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation
