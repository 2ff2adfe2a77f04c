"""NumPy's products have one thread while anybody wants that, and afterwards as many as before the first who did."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

from isimed_index.blas import one_blas_thread
from isimed_index.encode import workers
from isimed_index.in_order import in_order

BLAS = [each for each in ThreadpoolController().lib_controllers if "numpy" in each.filepath]


def blas_threads() -> set[int]:
    return {library.num_threads for library in BLAS}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    assert np.ones(2) @ np.ones(2) == 2
    with threadpool_limits(2, user_api="blas"):
        assert blas_threads() == {2}
        yield


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_the_last_one_out_gives_back_what_the_first_one_found():
    first, second = one_blas_thread(), one_blas_thread()
    first.__enter__()
    second.__enter__()
    assert blas_threads() == {1}
    first.__exit__(None, None, None)
    assert blas_threads() == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == {2}
    with one_blas_thread():  # and so the next time
        assert blas_threads() == {1}
    assert blas_threads() == {2}


@pytest.mark.parametrize("first_out", [0, 1])
def test_threads_that_overlap_in_whatever_order_they_end(first_out: int):
    """Each of the two stays alive: threadpoolctl does nothing for another thread than the one that it heeds."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        threads, contexts = [one, other], [one_blas_thread(), one_blas_thread()]

        def run(which: int, do: Callable[..., object], *arguments: object) -> set[int]:
            threads[which].submit(do, *arguments).result()
            return blas_threads()

        assert run(0, contexts[0].__enter__) == run(1, contexts[1].__enter__) == {1}
        assert run(first_out, contexts[first_out].__exit__, None, None, None) == {1}
        assert run(1 - first_out, contexts[1 - first_out].__exit__, None, None, None) == {2}
        with threadpool_limits(1, user_api="blas"):  # and another one is heeded as before
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_encoding_and_charting_that_overlap_leave_no_limit():
    charting = in_order(lambda _: blas_threads(), range(100), 1)
    assert next(charting) == {1}
    with workers("threads") as where:
        charting.close()
        assert where.submit(lambda _: blas_threads(), None, "asked").result() == {1}
        later = in_order(lambda n: n, range(100), 1)
        assert next(later) == 0
    assert blas_threads() == {1}
    later.close()
    assert blas_threads() == {2}


def test_an_error_gives_it_back_too():
    with pytest.raises(KeyboardInterrupt), one_blas_thread(), one_blas_thread():
        raise KeyboardInterrupt
    assert blas_threads() == {2}


@pytest.mark.parametrize("where", ["threadpoolctl.ThreadpoolController", "isimed_index.blas._set"])
def test_an_interruption_on_the_way_in_gives_it_back_too(where: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, InterruptedOnce(pkgutil.resolve_name(where)))
        with pytest.raises(KeyboardInterrupt), one_blas_thread():
            pass
    assert blas_threads() == {2}
    with one_blas_thread():
        assert blas_threads() == {1}
    assert blas_threads() == {2}


class InterruptedOnce:
    """Ctrl-C as soon as the first call is done."""

    def __init__(self, plain: Callable[..., object]) -> None:
        self.plain = plain
        self.calls = 0

    def __call__(self, *arguments: object) -> object:
        result = self.plain(*arguments)
        self.calls += 1
        if self.calls == 1:
            raise KeyboardInterrupt
        return result


def test_many_threads_at_once(pool: ThreadPoolExecutor):
    begin = Barrier(4)

    def some(_: int) -> set[int]:
        begin.wait()
        with one_blas_thread():
            return blas_threads()

    assert set.union(*pool.map(some, range(4))) == {1}
    assert blas_threads() == {2}


def test_a_number_that_was_set_meanwhile_is_one_for_who_comes_then():
    with one_blas_thread():
        with threadpool_limits(2, user_api="blas"), one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == {2}
