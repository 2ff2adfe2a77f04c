"""One built index, tuned: how many lists a query visits, how many rows are ranked again, how far a filter reaches.

Recall for every number of rows ranked again is read from one search: a true neighbour is found if the index ranks it
that high, because what is ranked again is ranked by true distances.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from isimed_index.index.costs import NEVER_EXACT, best_ms
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.lists import Kept
from isimed_index.index.protocol import Block
from isimed_index.index.recall import AT, RecallTest, at_least
from isimed_index.index.recipe import ASKED
from isimed_index.index.search import LiveIndex
from isimed_index.index.strata import Filter

_FETCH = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
_FETCH_COARSE = 32.0
_DEEP = (2.0, 4.0, 8.0, 16.0, 32.0)  # under filters
_TIMED = 24  # queries, one at a time
_PATIENCE = 3  # more lists that did not let fewer rows be ranked again


@dataclass(frozen=True, slots=True)
class Tuned:
    """An index at its quickest setting that reaches the target, or, where `ms` is None, at its best recall."""

    index: FaissIndex
    recall: float
    at_least: float
    ms: float | None


def tune(index: FaissIndex, exact: ExactIndex, test: RecallTest, target: float) -> Tuned:
    """The quickest setting whose recall on `test` is, with a confidence of 95 %, at least `target`."""
    found: list[tuple[int, float, float, float]] = []  # probes, fetch, recall, its bound
    best, idle = (0, _FETCH[0], 0.0, -1.0), 0
    fetches = (*_FETCH, _FETCH_COARSE) if index.recipe.lists else _FETCH[1:2]
    for probes in _probes(index.recipe.lists):
        setting, best = _least_fetch(index, test, probes, fetches, target, best)
        if setting is None:
            idle += bool(found)
        elif not found or setting[1] < found[-1][1]:
            found, idle = [*found, setting], 0
        else:
            idle += 1
        if idle >= _PATIENCE or (found and found[-1][1] == fetches[0]):
            break
    if not found:
        probes, fetch, recall, bound = best
        return Tuned(index.with_recipe(probes=probes, fetch=fetch), recall, bound, None)
    timed = [_timed(index, exact, test, *setting) for setting in found]
    return min(timed, key=lambda one: one.ms or 0.0)


def stronger(tuned: Tuned, exact: ExactIndex, test: RecallTest) -> Tuned:
    """The same index at the next larger setting, measured: half as many lists again, and as many rows ranked again."""
    recipe = tuned.index.recipe
    probes = min(recipe.lists, recipe.probes + max(1, recipe.probes // 2))
    fetch = min(recipe.fetch * 1.5, 2 * _FETCH_COARSE)
    shares = test.of_each(live(exact, tuned.index.with_recipe(probes=probes, fetch=fetch)))
    recall = float(shares.mean()) if shares.size else 1.0
    return _timed(tuned.index, exact, test, probes, fetch, recall, at_least(shares))


def reach_filters(index: FaissIndex, filters: Iterable[Filter], target: float) -> FaissIndex:
    """The index with the fewest rows ranked again, and then the least reach, that meet `target` under every filter.

    Small filters, all of whose rows are ranked again anyway, tell nothing. Where a filter is out of reach of the codes
    as they are, the index visits every list, and the contract tells. The filters are gone through twice.
    """
    if not index.recipe.lists:
        return index
    depths = [math.ceil(deep * ASKED) for deep in _DEEP]
    everywhere = index.with_recipe(reach=0, deep=_DEEP[-1])
    deep = index.recipe.fetch
    for test, rows in _telling(index, filters):
        shares = test.by_depth(everywhere.search(test.queries, depths[-1], rows).row_ids, depths)
        enough = [d for d, share in zip(_DEEP, shares, strict=True) if at_least(share) >= (1 + target) / 2]
        deep = max(deep, enough[0] if enough else _DEEP[-1])
    fetched = index.with_recipe(deep=deep).recipe.rows_fetched(ASKED, filtered=True)
    reach = max(fetched, index.recipe.probes * len(index) // index.recipe.lists)
    for test, rows in _telling(index, filters):
        while reach < rows.rows.size:
            hits = index.with_recipe(reach=reach, deep=deep).search(test.queries, fetched, rows)
            if at_least(test.by_depth(hits.row_ids, [fetched])[0]) >= target:
                break
            reach += reach // 2
    return index.with_recipe(reach=0 if reach >= len(index) else reach, deep=deep)


def _telling(index: FaissIndex, filters: Iterable[Filter]) -> Iterator[tuple[RecallTest, Kept]]:
    for one in filters:
        if one.test.among is not None and one.test.among.size > _DEEP[-1] * ASKED:
            yield one.test, index.keep(one.test.among)


def live(exact: ExactIndex, index: FaissIndex) -> LiveIndex:
    """What a store asks: the index over all rows, and never exact search at once."""
    blocks: Sequence[Block] = exact.blocks
    ends = [(int(ids[0]), int(ids[-1]) + 1) for ids, _ in blocks]
    return LiveIndex(blocks, exact.metric, index, ends, NEVER_EXACT)


def _least_fetch(
    index: FaissIndex,
    test: RecallTest,
    probes: int,
    fetches: Sequence[float],
    target: float,
    best: tuple[int, float, float, float],
) -> tuple[tuple[int, float, float, float] | None, tuple[int, float, float, float]]:
    """The fewest rows ranked again that reach the target at so many probes, if any do; and the best setting so far."""
    depths = [math.ceil(fetch * ASKED) for fetch in fetches]
    # As many lists as are tuned, whatever is fetched: the deepest search must not visit more than the shallow one.
    hits = index.with_recipe(probes=probes, fetch=fetches[-1]).search(
        test.queries, min(depths[-1], len(index)), enough=0
    )
    for fetch, shares in zip(fetches, test.by_depth(hits.row_ids, depths), strict=True):
        setting = (probes, fetch, float(shares.mean()) if shares.size else 1.0, at_least(shares))
        best = max(best, setting, key=lambda one: one[2])
        if setting[3] >= target:
            return setting, best
    return None, best


def _timed(
    index: FaissIndex, exact: ExactIndex, test: RecallTest, probes: int, fetch: float, recall: float, bound: float
) -> Tuned:
    """A setting with its time: single queries, ranked again by the stored vectors."""
    chosen = index.with_recipe(probes=probes, fetch=fetch)
    asked = live(exact, chosen)
    queries = test.queries[:_TIMED]
    each = [best_ms(asked.search, query[None], AT) for query in queries]
    return Tuned(chosen, recall, bound, float(np.median(each)))


def _probes(lists: int) -> Iterator[int]:
    probes = 1
    while probes < lists:
        yield probes
        probes += max(1, probes // 2)
    yield lists
