"""The thread pool hands out every index once."""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest

from hasten import _native

split = _native.kernels.split
squares = _native.kernels.squares


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


@pytest.mark.parametrize("fails", [0, 1, 500, 999])
def test_what_a_piece_throws_reaches_the_caller(fails: int) -> None:
    """On whatever thread it was thrown; the pool goes on working."""
    for _ in range(20):
        with pytest.raises(ValueError, match="a piece failed"):
            split(4, 1000, 1, fails)
        assert (split(4, 1000)[0] == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_piece_is_committed_once(threads: int) -> None:
    for pieces in [0, 1, 2, 16, 97, 256]:
        for _ in range(30):
            np.testing.assert_array_equal(squares(threads, pieces), np.arange(pieces) ** 2)


@pytest.mark.parametrize("threads", [65, 70])
def test_more_threads_than_shares_of_pieces(threads: int) -> None:
    """64 shares at most: the threads above help with those of others."""
    for pieces in [1, 63, 64, 65, 256]:
        np.testing.assert_array_equal(squares(threads, pieces), np.arange(pieces) ** 2)


def test_a_late_workers_piece_is_taken_over() -> None:
    """Workers sleep in every piece; the caller computes what they hold and throws away what they bring."""
    for _ in range(10):
        np.testing.assert_array_equal(squares(4, 16, slow=0), np.arange(16) ** 2)
        assert (split(4, 100)[0] == 1).all()


def test_a_worker_that_fails_harms_no_later_work() -> None:
    """Its piece is computed by the caller; the failure is not the next job's."""
    for fails in range(16):
        for _ in range(20):
            np.testing.assert_array_equal(squares(4, 16, fails=fails), np.arange(16) ** 2)
            assert (split(4, 100)[0] == 1).all()


def test_more_threads_than_before_and_fewer() -> None:
    """Workers that belong to no job of this size stay out of it."""
    for threads in [2, 7, 3, 5, 2, 6]:
        for _ in range(50):
            seen, used = split(threads, 100)
            assert (seen == 1).all()
            assert used <= threads


def test_a_child_of_fork_has_a_pool_of_its_own() -> None:
    split(3, 100)
    child = multiprocessing.get_context("fork").Process(target=_check_split)
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0
    assert (split(3, 100)[0] == 1).all()


def _check_split() -> None:
    assert (split(3, 1000)[0] == 1).all()
