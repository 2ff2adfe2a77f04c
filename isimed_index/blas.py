"""`one_blas_thread`: NumPy's products on one thread each, for as long as anybody in this process wants that.

BLAS has one number of threads for a whole process. Two that each set it and put back what they had found would leave
it at 1 for good where they overlap, because the second one had found 1; so here the first one sets it, and the last.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Limit:
    """Who wants one thread, and how many threads each library had before the first of them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._wanted: set[object] = set()
        self._former: dict[str, tuple[Any, int]] = {}  # by the library's file

    def take(self, who: object) -> None:
        """One more wants it."""
        from threadpoolctl import ThreadpoolController

        with self._guard:
            self._wanted.add(who)
            for library in ThreadpoolController().select(user_api="blas").lib_controllers:
                if getattr(library, "threading_layer", None) == "openmp":
                    continue  # it has a number for each thread that calls it: nobody could give back another's
                # One that was loaded since the first came is not there yet.
                self._former.setdefault(library.filepath, (library, library.num_threads))
                _set(library, 1)

    def drop(self, who: object) -> None:
        """One less, however far its `take` came; after the last one all is as it was."""
        with self._guard:
            self._wanted.discard(who)
            if not self._wanted:
                for library, threads in self._former.values():
                    _set(library, threads)
                self._former.clear()


_limit = _Limit()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it, each of NumPy's products in this process has one thread; the last one out gives back what was."""
    who = object()
    try:
        _limit.take(who)
        yield
    finally:
        _limit.drop(who)


def _set(library: Any, threads: int) -> None:
    """Set a library's number of threads, whichever thread asks and whoever asked before.

    From 3.8 on, threadpoolctl does nothing, without a word, for any other thread than the first one that set it.
    """
    let_go = getattr(library, "clear_controlling_thread", None)
    if let_go is not None:
        let_go(force=True)
    library.set_num_threads(threads)
    if let_go is not None:
        let_go(force=True)
