"""The recall contract: recall@10 without filter and under filters of four sizes and several shapes.

    random                     any rows               the easy case: kept rows lie around every query
    left, posterior, inferior  one end of an axis     one half of the body, one end of a scale
    side                       the same without centres, along the main axis of the vectors
    ball                       nearest to one row     one organ; most queries ask from far away

Embeddings follow position, so that a filter on position cuts a region out of them: an index that looks near the query
alone finds next to nothing there. Sides and balls are those of the patches' centres, which people filter by; where
centres are not given, of the vectors, whose main axis is what an index keeps best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from isimed_index.index.costs import best_ms
from isimed_index.index.exact import ExactIndex, unit_length
from isimed_index.index.halves import single
from isimed_index.index.protocol import Index, RowIds
from isimed_index.index.recall import AT, SURE, RecallTest, at_least, at_most

Shape = Literal["all", "random", "left", "posterior", "inferior", "side", "ball"]
Centres: TypeAlias = NDArray[np.float32]  # (n, 3) mm of all rows, block by block, in a frame that the scans share

SHARES = (0.001, 0.01, 0.1, 0.5)
_TIMED = 9  # queries asked one at a time, for the median


@dataclass(frozen=True, slots=True)
class Stratum:
    """Recall@10 under one kind of filter."""

    shape: Shape
    share: float  # of the rows that the filter keeps
    recall: float  # mean over the queries
    at_least: float  # one-sided bound of the mean, 95 %
    at_most: float
    queries: int
    ms: float  # median of single queries

    @property
    def name(self) -> str:
        """Such as `all`, or `left 0.1`."""
        return self.shape if self.shape == "all" else f"{self.shape} {self.share:.3g}"


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter of one shape and size, and the queries that it is tried with."""

    shape: Shape
    share: float
    test: RecallTest

    def measure(self, index: Index, confidence: float = SURE) -> Stratum:
        """Recall, with bounds of this confidence, and time of an index with true distances under this filter."""
        shares = self.test.of_each(index)
        recall = float(shares.mean()) if shares.size else 1.0
        asked = self.test.queries[: min(_TIMED, len(self.test.queries))]
        times = [best_ms(index.search, query[None], AT, self.test.among, repeats=2) for query in asked]
        bounds = (max(0.0, at_least(shares, confidence)), min(1.0, at_most(shares, confidence)))
        return Stratum(self.shape, self.share, recall, *bounds, shares.size, float(np.median(times)))


class Filters:
    """Filters of every shape and size, each with the truth for the rows `held_out`.

    They are made one at a time, whenever they are gone through: one keeps up to half of all rows. What stays is the
    truth, and a byte a row for each shape.
    """

    def __init__(self, exact: ExactIndex, held_out: RowIds, seed: int, centres: Centres | None = None) -> None:
        self._exact = exact
        self._held_out = held_out
        self._least = dict(_least_filters(exact, held_out, np.random.default_rng(seed), centres))
        self._truths: dict[tuple[Shape, float], RecallTest] = {}  # without the rows that are kept

    def __len__(self) -> int:
        return len(self._least) * len(SHARES)

    def __iter__(self) -> Iterator[Filter]:
        ends = np.cumsum([ids.size for ids, _ in self._exact.blocks])[:-1]
        for shape, least in self._least.items():
            for number, share in enumerate(SHARES):
                masks = np.split(least <= number, ends)
                rows = np.concatenate([ids[mask] for (ids, _), mask in zip(self._exact.blocks, masks, strict=True)])
                yield Filter(shape, share, self._test(shape, share, rows))

    def _test(self, shape: Shape, share: float, rows: RowIds) -> RecallTest:
        if (shape, share) not in self._truths:
            found = RecallTest.prepare(self._exact, self._held_out, rows)
            self._truths[shape, share] = replace(found, among=None)
        return replace(self._truths[shape, share], among=rows)


def _least_filters(
    exact: ExactIndex, held_out: RowIds, rng: np.random.Generator, centres: Centres | None
) -> Iterator[tuple[Shape, NDArray[np.uint8]]]:
    """By shape, the number (n,) of the smallest filter that keeps a row; that of no filter where none does."""
    row_ids = np.concatenate([ids for ids, _ in exact.blocks])
    orders: dict[Shape, NDArray[np.float32]] = {"random": rng.random(row_ids.size, dtype=np.float32)}
    middle = int(rng.integers(row_ids.size))
    if centres is None:
        orders["side"], orders["ball"] = _heights(exact, held_out, int(row_ids[middle]))
    else:
        orders |= zip(("left", "posterior", "inferior"), centres.T, strict=True)
        orders["ball"] = np.linalg.norm(centres - centres[middle], axis=1)
    for shape, order in orders.items():
        ranked = np.argsort(order, kind="stable")
        least = np.full(row_ids.size, len(SHARES), np.uint8)
        for number in reversed(range(len(SHARES))):
            least[ranked[: max(1, int(SHARES[number] * row_ids.size))]] = number
        yield shape, least


def _heights(exact: ExactIndex, held_out: RowIds, centre: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of every row, its place along the main axis of the held-out rows, and its distance from the row `centre`."""
    sample = exact.vectors(held_out)
    axis: NDArray[np.float32] = np.linalg.svd(sample - sample.mean(axis=0), full_matrices=False)[2][0]
    middle = exact.vectors([centre])
    height, away = [], []
    for _, vectors in exact.pieces(None):
        plain = single(vectors)
        # Not by BLAS, which may tell of invalid values where there are none: in what lies behind a short row.
        height.append(np.einsum("nd,d->n", plain, axis))
        if exact.metric == "cosine":
            away.append(1 - np.einsum("nd,d->n", unit_length(plain), unit_length(middle)[0]))
        else:
            apart = plain - middle
            away.append(np.einsum("nd,nd->n", apart, apart))
    return np.concatenate(height), np.concatenate(away)
