"""`in_order`: a function of many items, on the cores of this machine, with results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from isimed_index.blas import one_blas_thread
from isimed_index.limits import cores

_MOST = 16  # threads: more of them wait for memory, and each has its own results in it
_A = TypeVar("_A")
_R = TypeVar("_R")


def in_order(
    function: Callable[[_A], _R], items: Iterable[_A], threads: int | None = None
) -> Generator[_R, None, None]:
    """Yield `function(item)` of each item, computed by `threads` threads (None: one for each core).

    NumPy's linear algebra uses one thread in each of them meanwhile, so that results do not depend on how many there
    are. After an error, Ctrl-C or `close` nothing is begun any more, and what is running is waited for; `close` it
    (`contextlib.closing`) where it may not be used up, or that waits for the garbage collector.
    """
    threads = threads or min(_MOST, cores())
    waiting: deque[Future[_R]] = deque()
    with one_blas_thread(), ThreadPoolExecutor(threads, thread_name_prefix="in-order") as executor:
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
