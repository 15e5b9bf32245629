"""`/v1/responses`: create, retrieve, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hasten.serve.exchange import Exchange


async def create(exchange: Exchange) -> None:
    """Answer."""


async def retrieve(exchange: Exchange) -> None:
    """A stored answer."""


async def delete(exchange: Exchange) -> None:
    """Forget a stored answer."""
