"""What the server says about itself: models, health, readiness, metrics."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hasten.serve.metrics import CONTENT_TYPE
from hasten.serve.problem import Problem

if TYPE_CHECKING:
    from hasten.serve.pool import ModelPool
    from hasten.serve.service import Exchange


async def models(exchange: Exchange) -> None:
    """All models by name, loaded or not."""
    pool = _started(exchange.service.pool)
    await exchange.json({"object": "list", "data": [_model(pool, name) for name in pool.refs]})


async def model(exchange: Exchange) -> None:
    """One of them."""
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
    entry = {"id": name, "object": "model", "created": pool.created, "owned_by": "hasten"}
    return {**entry, "loaded": pool.is_loaded(name), **pool.facts(name)}


async def health(exchange: Exchange) -> None:
    """Liveness: the process answers, and has loaded its first model."""
    started = exchange.service.pool.started
    await exchange.json({"status": "ok" if started else "loading"}, 200 if started else 503)


async def ready(exchange: Exchange) -> None:
    """Readiness: new requests would be served now."""
    service = exchange.service
    status = "ready" if service.ready else "draining" if service.draining else "loading"
    await exchange.json({"status": status}, 200 if service.ready else 503)


async def metrics(exchange: Exchange) -> None:
    """Prometheus's page."""
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
