"""Which recipes are worth a trial, from the number of rows, the memory allowed and the measured intrinsic dimension."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import copies
from isimed_index.index.protocol import NO_ROW
from isimed_index.index.recall import AT, RecallTest
from isimed_index.index.recipe import ASKED, Recipe
from isimed_index.index.spectrum import Axes, Depths, measure_depths
from isimed_index.index.strata import Filter

FEW_ROWS = 10_000  # below, and where rows x dimensions are below
FEW_FLOATS = 1 << 21  # this, a query compares all vectors in less time than anything else takes
TRAIN_PER_LIST = 64  # rows sampled for each list; FAISS wants 39 or more
_DEPTHS = (2, 4, 16)  # rows ranked again for each that is asked for, by codes that are fine, plain and coarse
_QUERIES = 200
_DEPTH_FLOATS = 1 << 23  # of the sample in which the depth of true neighbours is measured
_TELLING = 0.1  # share of rows: smaller filters are ranked again as a whole, or searched exactly
_WORTH_CUTTING = 0.75  # of the dimensions: where more are needed, no axes are cut off


def is_small(n: int, dim: int) -> bool:
    """Whether comparing a query with all vectors is quick enough to try nothing else."""
    return n < FEW_ROWS or n * dim < FEW_FLOATS


def lists_for(n: int) -> int:
    """How many inverted lists suit n rows: a power of two near 2 √n, and no more than can be trained."""
    return 1 << round(float(np.log2(2 * np.sqrt(n))))


def intrinsic(
    exact: ExactIndex, axes: Axes, test: RecallTest, filters: Iterable[Filter], min_recall: float
) -> dict[int, int]:
    """For each depth (times the rows asked for), how many axes keep the true neighbours so near.

    Half of the error that `min_recall` allows is left to lists and codes. Under filters, which may leave nothing near
    the query, more rows can be ranked again (the largest depth), but neighbours are told apart by less.
    """
    target = (1 + min_recall) / 2
    plain = _depths(exact, axes, test)
    dims = {depth: plain.least(depth * ASKED, target) for depth in _DEPTHS}
    told = (one.test for one in filters if one.shape != "random" and one.share >= _TELLING)
    least = max((_depths(exact, axes, one).least(_DEPTHS[-1] * ASKED, target) for one in told), default=0)
    return {depth: max(found, least) for depth, found in dims.items()}


def _depths(exact: ExactIndex, axes: Axes, test: RecallTest) -> Depths:
    """How deep the neighbours of a test fall along few axes, among a sample of the rows that may be found."""
    among = np.concatenate([ids for ids, _ in exact.blocks]) if test.among is None else test.among
    drawn = np.random.default_rng(0).choice(among, min(among.size, _DEPTH_FLOATS // (exact.dim or 1)), replace=False)
    rows = copies(exact.vectors(np.sort(drawn)), exact.metric)
    known = np.flatnonzero((test.near != NO_ROW).sum(axis=1) >= AT)[:_QUERIES]
    near = (
        np.stack([row[row != NO_ROW][:AT] for row in test.near[known]]) if known.size else np.empty((0, AT), np.int64)
    )
    each, back = np.unique(near, return_inverse=True)
    vectors = copies(exact.vectors(each), exact.metric)[back.reshape(near.shape)]
    depths = np.array([depth * ASKED for depth in _DEPTHS])
    return measure_depths(axes, rows, among.size, copies(test.queries[known], exact.metric), vectors, depths)


def candidates(n: int, dim: int, dims: dict[int, int]) -> list[list[Recipe]]:
    """Recipes for n vectors in groups, quick ones first: a later group is for where none of the earlier will do."""
    lists = lists_for(n)
    quick = [_recipe(lists, dim, dims[depth], "SQ8") for depth in (4, 2)]
    quick.append(_recipe(lists, dim, dims[4], "SQ4"))
    quick.append(_recipe(lists, dim, dims[4], "RaBitQfs", rotated=True))
    quick.append(_recipe(lists, dim, dims[16], "PQ", rotated=True))
    whole = [_recipe(lists, dim, dim, code) for code in ("SQ8", "Flat")]
    quick = list(dict.fromkeys(quick))
    return [quick, [recipe for recipe in whole if recipe not in quick]]


def _recipe(lists: int, dim: int, kept: int, code: str, rotated: bool = False) -> Recipe:
    """A recipe with lists; a projection where it pays, or where the code needs dimensions that vary alike."""
    inner = kept if kept < _WORTH_CUTTING * dim else dim
    if code == "PQ":
        inner -= inner % 2
        code = f"PQ{max(1, inner // 2)}x4fs"
    before = f"PCA{'R' if rotated else ''}{inner}," if inner < dim or rotated else ""
    return Recipe(f"{before}IVF{lists},{code}", lists, 1)
