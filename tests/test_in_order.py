"""Results come in the order of the items from however many threads, and an end is an end."""

from __future__ import annotations

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from isimed_index.in_order import in_order


def blas_threads() -> set[int]:
    return {each["num_threads"] for each in threadpool_info() if "numpy" in each["filepath"]}


@pytest.mark.parametrize("threads", [1, 3, None])
def test_results_come_in_the_order_of_the_items(threads: int | None):
    def later_items_end_first(n: int) -> int:
        time.sleep(0.002 * (7 - n % 7))
        return n * n

    assert list(in_order(later_items_end_first, range(20), threads)) == [n * n for n in range(20)]
    assert list(in_order(later_items_end_first, [], threads)) == []


def test_blas_has_one_thread_within_and_its_own_after():
    before = blas_threads()
    assert list(in_order(lambda _: blas_threads(), range(3), 2)) == [{1}] * 3
    assert blas_threads() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_is_begun(error: type[BaseException]):
    begun = []

    def fails_at_two(n: int) -> None:
        begun.append(n)
        if n == 2:
            raise error

    with pytest.raises(error):
        list(in_order(fails_at_two, range(1000), 2))
    assert len(begun) < 10
    assert not any(thread.name.startswith("in-order") for thread in threading.enumerate())


def test_items_are_taken_when_they_are_wanted():
    taken = []
    results = in_order(lambda n: n, (taken.append(n) or n for n in range(100)), 2)
    assert next(results) == 0
    assert len(taken) < 6
    results.close()
    assert len(taken) < 6
