"""From recall, memory and latency to an index: candidates, trials, the quickest built, tuned, judged, written.

    held-out rows ─┬─ tune: lists, rows ranked again, reach under filters    the bound of recall must reach the target
                   └─ judge: other rows, which the tuning never saw          the mean must, and that is written down

Few rows need no approximation: a flat index is exact. Where there are very many rows the trials are held on a sample,
and the recipes are then built over all rows in the order of their latency there, until one passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from isimed_index.errors import UsageError
from isimed_index.index.candidates import is_small
from isimed_index.index.card import IndexCard, row_ranges
from isimed_index.index.costs import Costs
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FILE, FaissIndex
from isimed_index.index.goal import Goal, Samples
from isimed_index.index.protocol import Block, Metric, RowIds
from isimed_index.index.recall import AT, SURE, RecallTest
from isimed_index.index.recipe import ram_bytes
from isimed_index.index.search import LiveIndex
from isimed_index.index.strata import Centres, Filter, Filters, Stratum
from isimed_index.index.trials import choose
from isimed_index.index.tune import live, reach_filters

_FILTER_QUERIES = 120  # that tune, and others that judge, under each filter
_FEW_QUERIES = 40  # the same for a flat index, which finds all in any case
_NO_INDEX = 1e9  # ms: under filters the index is never asked


def build_index(
    directory: Path,
    blocks: Sequence[Block],
    metric: Metric,
    min_recall: float = 0.98,
    max_ram_bytes: int | None = None,
    seed: int = 0,
    max_latency_ms: float | None = None,
    centres: Centres | None = None,
) -> IndexCard:
    """Build an index over `blocks` that reaches its goal, and write `index.faiss` and `index.json`.

    `max_ram_bytes` is of what stays in memory, `max_latency_ms` of a single query without filter, on this machine.
    Recall under filters is measured with regions of the patches' `centres` (n, 3), mm, without them of the vectors.
    Raises `RecallBelowTarget` when no recipe within the limits reaches `min_recall`; then nothing is written.
    """
    goal = Goal(min_recall, max_ram_bytes, max_latency_ms)
    exact = ExactIndex(blocks, metric)
    if exact.dim is None:
        raise UsageError("there are no rows to index", next_step="encode a scan first")
    if centres is not None and centres.shape != (len(exact), 3):
        raise UsageError(f"expected centres of shape {(len(exact), 3)}, found {centres.shape}")
    samples = Samples.draw(exact, seed, is_small(len(exact), exact.dim))
    judge = RecallTest.prepare(exact, samples.judges)
    tuners = samples.tuners[:_FILTER_QUERIES]
    tuning: Iterable[Filter] = Filters(exact, tuners, seed, centres) if tuners.size else ()
    tried, chosen = choose(exact, goal, samples, judge, tuning)
    index = reach_filters(chosen.index, tuning, goal.min_recall)
    costs = _costs(exact, index, samples.judges, seed)
    few = samples.judges[: _FILTER_QUERIES if index.recipe.lists else _FEW_QUERIES]
    asked = Filters(exact, few, seed + 1, centres)
    index, costs, strata = _contract(exact, index, costs, Filter("all", 1.0, judge), asked, goal.min_recall)
    directory.mkdir(parents=True, exist_ok=True)
    sha256 = index.save(directory)
    card = IndexCard(
        metric=metric,
        dim=exact.dim,
        rows=len(exact),
        row_ranges=row_ranges([row_ids for row_ids, _ in exact.blocks]),
        recipe=index.recipe,
        min_recall=min_recall,
        recall_at_10=strata[0].recall,
        recall_at_10_filtered=min(one.recall for one in strata[1:]),
        recall_queries=samples.judges.size,
        bytes=(directory / FILE).stat().st_size,
        sha256=sha256,
        resident_bytes=ram_bytes(index.recipe, len(exact), exact.dim),
        ms=chosen.ms,
        strata=strata,
        costs=costs,
        tried=tried,
        max_ram_bytes=max_ram_bytes,
        max_latency_ms=max_latency_ms,
    )
    card.write(directory)
    return card


def measure_again(live: LiveIndex, seed: int = 2, centres: Centres | None = None) -> tuple[Stratum, ...]:
    """The recall contract of an index as it is now, over live rows, asked by other rows than when it was built.

    The bounds hold with a confidence of 95 % for all of it together: by Bonferroni's correction, as the same rows ask
    under every filter. Each at 95 % by itself, one of 21 would be wrong in up to 66 % of checks of sound indexes.
    """
    exact = live.exact
    lists = live.index is not None and live.index.recipe.lists > 0
    asking = Samples.draw(exact, seed, small=not lists).judges
    judge = Filter("all", 1.0, RecallTest.prepare(exact, asking))
    few = asking[: _FILTER_QUERIES if lists else _FEW_QUERIES]
    filters = Filters(exact, few, seed, centres)
    confidence = 1 - (1 - SURE) / (1 + len(filters))
    return tuple(one.measure(live, confidence) for one in chain([judge], filters))


def _costs(exact: ExactIndex, index: FaissIndex, asking: RowIds, seed: int) -> Costs:
    queries = exact.vectors(asking)
    row_ids = np.random.default_rng(seed).permutation(np.concatenate([ids for ids, _ in exact.blocks]))
    kept = {rows: np.sort(row_ids[:rows]) for rows in Costs.sizes(len(exact))}
    by_index = live(exact, index)
    repeated = np.resize(np.arange(len(queries)), Costs.BATCH)
    return Costs.measure(
        len(exact),
        lambda rows, m: exact.search(queries[repeated[:m]], AT, kept[rows]),
        lambda rows, m: by_index.search(queries[repeated[:m]], AT, kept[rows]),
    )


def _contract(
    exact: ExactIndex, index: FaissIndex, costs: Costs, unfiltered: Filter, filters: Filters, target: float
) -> tuple[FaissIndex, Costs, tuple[Stratum, ...]]:
    """What is promised, as users will get it; where a filter is below the target the index reaches farther.

    Tuning had a margin, so that this is rare; what is written is measured on rows that did not tune.
    """
    ranges = row_ranges([row_ids for row_ids, _ in exact.blocks])
    while True:
        joined = LiveIndex(exact.blocks, exact.metric, index, ranges, costs)
        strata = tuple(one.measure(joined) for one in chain([unfiltered], filters))
        if all(one.recall >= target for one in strata[1:]):
            return index, costs, strata
        if index.recipe.reach:
            farther = 4 * index.recipe.reach
            index = index.with_recipe(reach=farther if farther < len(index) else 0)
        elif costs.index_call < _NO_INDEX:
            costs = replace(costs, index_call=_NO_INDEX)
        else:
            return index, costs, strata  # exact search is what it is
