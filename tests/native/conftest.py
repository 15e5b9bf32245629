"""The instruction set is a process-wide choice: every test leaves it as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kernel_twins import ISAS, fewer

from hasten import _native

# Under the sanitizers not those that take all kernels from others (native/kernels.cpp), or all integer ones.
OWN = [name for name in ISAS if name != "avx512vnni"]
OWN_INTEGERS = [name for name in OWN if name != "amx"]


def in_use(name: str) -> Iterator[str]:
    before = _native.isa()
    _native.use_isa(name)
    yield name
    _native.use_isa(before)


@pytest.fixture(params=fewer(ISAS, OWN))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this machine in turn, in use while the test runs."""
    yield from in_use(request.param)


@pytest.fixture(params=fewer(ISAS, OWN_INTEGERS))
def integer_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The same for integer layers alone."""
    yield from in_use(request.param)
