"""`in_order`: a function of many items, on the cores of this machine, with results in the order of the items."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_MOST = 16  # threads: more of them wait for memory, and each has its own results in it
_A = TypeVar("_A")
_R = TypeVar("_R")


def in_order(function: Callable[[_A], _R], items: Iterable[_A], threads: int | None = None) -> Iterator[_R]:
    """Yield `function(item)` of each item, computed by `threads` threads (None: one for each core).

    NumPy's linear algebra uses one thread in each of them meanwhile, so that results do not depend on how many there
    are. After an error, Ctrl-C or `close` nothing is begun any more, and what is running is waited for.
    """
    from threadpoolctl import threadpool_limits

    threads = threads or min(_MOST, _cores())
    waiting: deque[Future[_R]] = deque()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads, thread_name_prefix="in-order") as executor:
        try:
            for item in items:
                waiting.append(executor.submit(function, item))
                if len(waiting) > threads:  # one is at hand for whoever is the first to be done
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
