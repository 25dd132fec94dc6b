"""Reading ahead in background threads, so that disk and network work while the processor does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[Callable[[], T]], ahead: int = 1) -> Iterator[T]:
    """Call the items in order, up to `ahead` of them at once before they are asked for; yield their results.

    An interruption is not held up by calls still under way: they are abandoned.
    """
    pool = ThreadPoolExecutor(ahead)
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
