"""The thread pool hands out every index once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hasten import _native

split = _native.kernels.split


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("grain", [1, 2, 4, 7, 100])
def test_every_index_once(threads: int, grain: int) -> None:
    for count in [*range(20), 31, 64, 100, 1000, 4097]:
        seen, used = split(threads, count, grain)
        np.testing.assert_array_equal(seen, np.ones(count), err_msg=f"{count}")
        assert used <= min(threads, max(1, -(-count // grain)))


def test_many_small_jobs() -> None:
    """Forks and joins follow one another without a lost wake-up."""
    for i in range(3000):
        seen, _ = split(2 + i % 2, 2 + i % 7)
        assert (seen == 1).all()


def test_callers_take_turns() -> None:
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(200) if (split(3, 10 + i)[0] != 1).any())

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=30)
    assert not wrong and not any(caller.is_alive() for caller in callers)
