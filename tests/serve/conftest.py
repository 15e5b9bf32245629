"""One server for the tests that need nothing special of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def shared_server() -> Iterator[object]:
    from running_server import serving

    with serving() as running:
        yield running


@pytest.fixture
def server(shared_server: object) -> object:
    """A server that echoes; what the last test changed of its engine is undone."""
    engine = shared_server.engine  # type: ignore[attr-defined]
    engine.__init__()
    return shared_server


@pytest.fixture(scope="session")
def shared_strict_server() -> Iterator[object]:
    from running_server import serving

    from hasten.serve.options import ServeOptions

    with serving(ServeOptions(port=0, log=False, strict=True)) as running:
        yield running


@pytest.fixture
def strict_server(shared_strict_server: object) -> object:
    """One that refuses what it does not know."""
    engine = shared_strict_server.engine  # type: ignore[attr-defined]
    engine.__init__()
    return shared_strict_server
