"""Reading ahead: order, how far, errors, and that an interruption does not wait."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from alphaq_gguf.prefetch import prefetch


@pytest.mark.parametrize("n_items", [0, 1, 2, 7])
def test_prefetching_keeps_the_order(n_items):
    items = (lambda i=i: np.array([i]) for i in range(n_items))
    assert [int(piece[0]) for piece in prefetch(items)] == list(range(n_items))


def test_prefetching_reads_one_step_ahead_and_no_further():
    calls: list[None] = []

    def read() -> np.ndarray:
        calls.append(None)
        return np.zeros(1)

    for i, _ in enumerate(prefetch(read for _ in range(5))):
        assert i + 1 <= len(calls) <= i + 2
    assert len(calls) == 5


def test_an_error_while_prefetching_reaches_the_reader():
    def fail() -> np.ndarray:
        raise OSError("gone")

    pieces = prefetch([lambda: np.zeros(1), fail])
    next(pieces)
    with pytest.raises(OSError, match="gone"):
        next(pieces)


def test_several_reads_run_at_once_and_still_come_in_order():
    together = threading.Barrier(4)

    def read(i: int) -> int:
        together.wait(timeout=10)
        return i

    assert list(prefetch((lambda i=i: read(i) for i in range(8)), ahead=4)) == list(range(8))


def test_an_interruption_does_not_wait_for_a_read_under_way():
    release = threading.Event()
    pieces = prefetch([lambda: 1, lambda: release.wait(timeout=30), lambda: 3])
    assert next(pieces) == 1
    start = time.monotonic()
    pieces.close()
    assert time.monotonic() - start < 10
    release.set()
