"""Work that threads do ahead of the caller."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def prefetch_map(function: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """`map(function, items)`, computed by `threads` threads, up to 4 items per thread ahead; as `map` with 0 threads.

    Results come in the items' order, an exception in its item's place. `items` is read by the caller's thread.
    """
    if threads == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
