"""From a recall and a memory limit to a FAISS layout: plan, build, tune on held-out rows, prove, write.

Few rows need no approximation: a flat index is exact. Above that, inverted lists of 8-bit codes, whose results are
ranked again by the stored vectors; then lists of float32, then flat, until the recall asked for is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import RecallBelowTarget, UsageError
from isimed_index.index.card import IndexCard, row_ranges
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FILE, FaissIndex, Recipe
from isimed_index.index.protocol import Block, Metric, RowIds
from isimed_index.index.recall import RecallTest
from isimed_index.index.search import LiveIndex

FLAT_BELOW = 50_000  # rows
_HELD_OUT = 500  # rows that are asked for their neighbours, and that training does not see
_TRAIN_PER_LIST = 64  # rows sampled for each list; FAISS wants 39 or more
_FILTER_SHARE = 0.1


def choose(n: int, dim: int, max_ram_bytes: int | None = None) -> list[Recipe]:
    """Layouts for n vectors of `dim` dimensions, the most economical first; only such as fit into `max_ram_bytes`."""
    recipes = [Recipe("Flat")]
    if n >= FLAT_BELOW:
        lists = 1 << round(np.log2(2 * np.sqrt(n)))
        recipes = [Recipe(f"IVF{lists},SQ8", lists, 1), Recipe(f"IVF{lists},Flat", lists, 1), *recipes]
    return [recipe for recipe in recipes if max_ram_bytes is None or ram_bytes(recipe, n, dim) <= max_ram_bytes]


def ram_bytes(recipe: Recipe, n: int, dim: int) -> int:
    """Memory that an index of n vectors takes when loaded: codes, row ids and list centres."""
    code = dim if recipe.factory.endswith("SQ8") else 4 * dim
    return n * (code + 8) + recipe.lists * dim * 4


def build_index(
    directory: Path,
    blocks: Sequence[Block],
    metric: Metric,
    min_recall: float = 0.98,
    max_ram_bytes: int | None = None,
    seed: int = 0,
) -> IndexCard:
    """Build an index over `blocks` that reaches `min_recall`, and write `index.faiss` and `index.json`.

    Raises `RecallBelowTarget` when no layout within `max_ram_bytes` reaches it; then nothing is written.
    """
    if not 0 < min_recall <= 1:
        raise UsageError(f"expected min_recall above 0 and up to 1, found {min_recall}")
    exact = ExactIndex(blocks, metric)
    if exact.dim is None:
        raise UsageError("there are no rows to index", next_step="encode a scan first")
    recipes = choose(len(exact), exact.dim, max_ram_bytes)
    held_out, training = _samples(exact, recipes, seed)
    ranges = row_ranges([row_ids for row_ids, _ in exact.blocks])
    test = RecallTest.prepare(exact, held_out)
    best = 0.0
    for index in _candidates(exact, recipes, training):
        live = LiveIndex(exact.blocks, metric, index, ranges)
        recall = test.recall(live)
        best = max(best, recall)
        if recall >= min_recall:
            break
    else:
        raise _below_target(best, min_recall, len(exact), exact.dim, max_ram_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    sha256 = index.save(directory)
    card = IndexCard(
        metric=metric,
        dim=exact.dim,
        rows=len(exact),
        row_ranges=ranges,
        recipe=index.recipe,
        min_recall=min_recall,
        recall_at_10=recall,
        recall_at_10_filtered=RecallTest.prepare(exact, held_out, _one_side(exact, held_out)).recall(live),
        recall_queries=held_out.size,
        bytes=(directory / FILE).stat().st_size,
        sha256=sha256,
    )
    card.write(directory)
    return card


def _candidates(exact: ExactIndex, recipes: Sequence[Recipe], training: RowIds) -> Iterator[FaissIndex]:
    """Every layout in turn, each with ever more of its lists visited."""
    for recipe in recipes:
        sample = exact.vectors(training) if recipe.lists else None
        index = FaissIndex.build(exact.pieces(None), exact.metric, recipe, exact.dim or 0, sample)
        probes = 1
        while probes < recipe.lists:
            yield index.with_probes(probes)
            probes += max(1, probes // 2)
        yield index.with_probes(recipe.lists)


def _samples(exact: ExactIndex, recipes: Sequence[Recipe], seed: int) -> tuple[RowIds, RowIds]:
    """Sorted row ids held out as queries, and others to train on."""
    row_ids = np.concatenate([ids for ids, _ in exact.blocks])
    train = max((recipe.lists for recipe in recipes), default=0) * _TRAIN_PER_LIST
    drawn = np.random.default_rng(seed).choice(row_ids, min(row_ids.size, _HELD_OUT + train), replace=False)
    return np.sort(drawn[:_HELD_OUT]), np.sort(drawn[_HELD_OUT:])


def _one_side(exact: ExactIndex, held_out: RowIds) -> RowIds:
    """The tenth of the rows that lies lowest along the direction in which the held-out vectors vary most."""
    sample = exact.vectors(held_out)
    axis: NDArray[np.float32] = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][0]
    row_ids, height = [], []
    for ids, vectors in exact.pieces(None):
        row_ids.append(ids)
        # Not by BLAS, which may tell of invalid values where there are none: in what lies behind a short row.
        height.append(np.einsum("nd,d->n", np.asarray(vectors, dtype=np.float32), axis))
    keep = max(1, int(_FILTER_SHARE * len(exact)))
    return np.sort(np.concatenate(row_ids)[np.argsort(np.concatenate(height), kind="stable")[:keep]])


def _below_target(best: float, target: float, n: int, dim: int, max_ram_bytes: int | None) -> RecallBelowTarget:
    """What was reached, and which memory limit would do: a flat index is exact."""
    flat = ram_bytes(Recipe("Flat"), n, dim) / 2**20
    if max_ram_bytes is None:
        return RecallBelowTarget(
            f"recall@10 is {best:.4f}, below the target of {target}",
            next_step=f"ask for a min_recall of {best:.4f} or less, or search with exact=True",
        )
    found = f"recall@10 is {best:.4f}" if best else "no index fits"
    lower = f", or ask for a min_recall of {best:.4f} or less" if best else ""
    return RecallBelowTarget(
        f"{found} within {max_ram_bytes / 2**20:.1f} MiB, the target is {target}",
        next_step=f"raise max_ram to {flat:.1f} MiB, which holds an exact index{lower}",
    )
