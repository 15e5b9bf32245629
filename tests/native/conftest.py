"""The instruction set is a process-wide choice: every test leaves it as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hasten import _native


@pytest.fixture(params=_native.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, in use while the test runs."""
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)
