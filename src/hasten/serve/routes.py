"""What is served where: the table of routes, and the OpenAPI document made from it and the request models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

import hasten
from hasten.serve.body import Strict
from hasten.serve.endpoints import chat, completions, embeddings, responses, status, tokens
from hasten.serve.endpoints.chat import ChatRequest
from hasten.serve.endpoints.completions import CompletionRequest
from hasten.serve.endpoints.embeddings import EmbeddingRequest
from hasten.serve.endpoints.responses import ResponseRequest
from hasten.serve.endpoints.tokens import DetokenizeRequest, TokenizeRequest
from hasten.serve.service import Endpoint


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
    Route("POST", "/v1/chat/completions", chat.chat, "Answer a conversation", ChatRequest, streams=True),
    Route(
        "POST", "/v1/completions", completions.completions, "Continue texts", CompletionRequest, streams=True
    ),
    Route("POST", "/v1/responses", responses.create, "Answer, the newer way", ResponseRequest, streams=True),
    Route("GET", "/v1/responses/{response_id}", responses.retrieve, "A stored answer", refuses=(404,)),
    Route(
        "DELETE", "/v1/responses/{response_id}", responses.delete, "Forget a stored answer", refuses=(404,)
    ),
    Route("POST", "/v1/embeddings", embeddings.embeddings, "Texts as vectors", EmbeddingRequest),
    Route("GET", "/v1/models", status.models, "The models"),
    Route("GET", "/v1/models/{name}", status.model, "One model", refuses=(404,)),
    Route("POST", "/tokenize", tokens.tokenize, "Token ids of a text or chat", TokenizeRequest),
    Route("POST", "/detokenize", tokens.detokenize, "The text of token ids", DetokenizeRequest),
    Route("GET", "/health", status.health, "Liveness", refuses=(503,)),
    Route("GET", "/ready", status.ready, "Readiness", refuses=(503,)),
    Route("GET", "/metrics", status.metrics, "Prometheus's page", kind="text/plain"),
    Route("GET", "/stats", status.stats, "The engines' numbers"),
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
    for code in sorted(refuses):
        answers[str(code)] = {"description": _SAID[code], "content": error}
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
