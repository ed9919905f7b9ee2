"""Ordered work in threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from aatjax.errors import UsageError

T = TypeVar("T")


def map_threads(function: Callable[[int], T], count: int, *, workers: int) -> Iterator[T]:
    """Yield `function(0)` to `function(count - 1)` in order, computed a few calls ahead.

    An error of a call is raised in its turn; calls that have not begun are then cancelled.

    Raises:
        UsageError: fewer than one worker.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}; at least one is needed")
    pool = ThreadPoolExecutor(workers, "aatjax-map")
    waiting: deque[Future[T]] = deque()
    try:
        for i in range(count):
            waiting.append(pool.submit(function, i))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
