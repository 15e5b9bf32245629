"""The table of routes: what is served where, and what goes in and out."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.serve.endpoints import chat, completion, embedding, responses, status, tokens
from hasten.serve.exchange import Endpoint
from hasten.serve.protocol.chat import ChatRequest
from hasten.serve.protocol.completion import CompletionRequest
from hasten.serve.protocol.embedding import EmbeddingRequest
from hasten.serve.protocol.response import ResponseRequest
from hasten.serve.protocol.strict import Strict
from hasten.serve.protocol.tokens import DetokenizeRequest, TokenizeRequest


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
        "POST", "/v1/completions", completion.completions, "Continue texts", CompletionRequest, streams=True
    ),
    Route("POST", "/v1/responses", responses.create, "Answer, the newer way", ResponseRequest, streams=True),
    Route("GET", "/v1/responses/{response_id}", responses.retrieve, "A stored answer", refuses=(404,)),
    Route(
        "DELETE", "/v1/responses/{response_id}", responses.delete, "Forget a stored answer", refuses=(404,)
    ),
    Route("POST", "/v1/embeddings", embedding.embeddings, "Texts as vectors", EmbeddingRequest),
    Route("GET", "/v1/models", status.models, "The models"),
    Route("GET", "/v1/models/{name}", status.model, "One model", refuses=(404,)),
    Route("POST", "/tokenize", tokens.tokenize, "Token ids of a text or chat", TokenizeRequest),
    Route("POST", "/detokenize", tokens.detokenize, "The text of token ids", DetokenizeRequest),
    Route("GET", "/health", status.health, "Liveness", refuses=(503,)),
    Route("GET", "/ready", status.ready, "Readiness", refuses=(503,)),
    Route("GET", "/metrics", status.metrics, "Prometheus's page", kind="text/plain"),
    Route("GET", "/stats", status.stats, "The engines' numbers"),
)
