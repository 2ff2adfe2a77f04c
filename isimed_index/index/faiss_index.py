"""Approximate and flat search with FAISS, by row id; the only module that imports faiss.

A FAISS index is derived data: it answers with row ids and distances of its own (rounded, quantised) copies of the
vectors. `isimed_index.index.search` ranks them again with the stored vectors.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import Incompatible, MissingExtra, StoreDamaged
from isimed_index.index.exact import unit_length
from isimed_index.index.protocol import (
    Block,
    Hits,
    Metric,
    RowIds,
    Vectors,
    checked_metric,
    checked_queries,
    checked_rows,
    nothing,
)

FILE = "index.faiss"
_BITMAP_BYTES_PER_ROW = 8  # a bitmap filter that would take more than this gives way to a hash set


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a FAISS index is laid out: a factory string, and how many of its inverted lists a query visits."""

    factory: str  # "Flat", or "IVF1024,SQ8" and the like
    lists: int = 0  # inverted lists; 0 for a flat index
    probes: int = 0  # lists visited by a query without filter


class FaissIndex:
    """A FAISS index over row ids.

    Cosine is the inner product of normalised copies. A filtered search, and one that came back short, visits every
    inverted list: anatomy-shaped filters empty the lists near the query, and no fixed number of probes mends that.
    """

    def __init__(self, native: Any, metric: Metric, recipe: Recipe) -> None:
        self.metric = metric
        self.recipe = recipe
        self._native = native

    def __len__(self) -> int:
        return int(self._native.ntotal)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return int(self._native.d)

    @classmethod
    def build(
        cls, blocks: Iterable[Block], metric: Metric, recipe: Recipe, dim: int, sample: Vectors | None = None
    ) -> FaissIndex:
        """An index over blocks (pieces small enough to be copied), trained on `sample` (n, dim) if it has lists."""
        faiss = _faiss()
        kind = faiss.METRIC_L2 if checked_metric(metric) == "l2" else faiss.METRIC_INNER_PRODUCT
        native = faiss.index_factory(dim, recipe.factory, kind)
        if not native.is_trained:
            native.train(_copies(np.empty((0, dim), np.float32) if sample is None else sample, metric))
        if not recipe.lists:
            native = faiss.IndexIDMap2(native)
        for row_ids, vectors in blocks:
            native.add_with_ids(_copies(vectors, metric), np.ascontiguousarray(row_ids, dtype=np.int64))
        return cls(native, metric, recipe)

    def with_probes(self, probes: int) -> FaissIndex:
        """The same index, visiting `probes` lists a query."""
        return FaissIndex(self._native, self.metric, replace(self.recipe, probes=probes))

    def save(self, directory: Path) -> str:
        """Write `index.faiss` into `directory`; returns its sha256. Raises `OSError` where it cannot be written."""
        path = directory / FILE
        try:
            _faiss().write_index(self._native, str(path))
        except RuntimeError as error:  # FAISS tells a full disk by its text alone
            number = next((n for n in errno.errorcode if os.strerror(n) in str(error)), errno.EIO)
            raise OSError(number, os.strerror(number), FILE) from error
        return _sha256(path)

    @classmethod
    def load(cls, directory: Path, metric: Metric, recipe: Recipe, sha256: str) -> FaissIndex:
        """Read `index.faiss`; raises `StoreDamaged` when it is missing or its bytes are not those of `sha256`.

        `Incompatible` when the FAISS that is installed cannot read it.
        """
        faiss = _faiss()
        path = directory / FILE
        if not path.is_file():
            raise StoreDamaged(f"the index file {FILE} is missing", next_step="run isimed index again")
        if _sha256(path) != sha256:
            raise StoreDamaged(
                f"the index file {FILE} does not match its hash: it is damaged", next_step="run isimed index again"
            )
        try:
            native = faiss.read_index(str(path))
        except RuntimeError as error:  # an intact file in a format that this FAISS does not know
            raise Incompatible(
                f"the index file {FILE} needs another FAISS than {faiss.__version__}",
                next_step="update FAISS, or run isimed index again",
            ) from error
        return cls(native, checked_metric(metric), recipe)

    def search(self, queries: ArrayLike, k: int, among: ArrayLike | None = None) -> Hits:
        """The k nearest rows of each query (m, d) by the index's own copies, only such rows as `among` lists."""
        asked = _copies(checked_queries(queries, k, self.dim), self.metric)
        rows = checked_rows(among)
        if len(self) == 0 or asked.shape[0] == 0 or (rows is not None and rows.size == 0):
            return nothing(asked.shape[0], k)
        if rows is not None:
            return self._ask(asked, k, self.recipe.lists, _selector(rows, len(self)))
        hits = self._ask(asked, k, self.recipe.probes, None)
        short = np.flatnonzero(hits.found.sum(axis=1) < min(k, len(self)))
        if short.size:
            again = self._ask(asked[short], k, self.recipe.lists, None)
            hits.row_ids[short], hits.distances[short] = again.row_ids, again.distances
        return hits

    def _ask(self, asked: NDArray[np.float32], k: int, probes: int, selector: Any) -> Hits:
        faiss = _faiss()
        choice: dict[str, Any] = {} if selector is None else {"sel": selector}
        if self.recipe.lists:
            params = faiss.SearchParametersIVF(nprobe=max(1, probes), **choice)
        else:
            params = faiss.SearchParameters(**choice) if choice else None
        scores, row_ids = self._native.search(asked, k, params=params)
        distances = np.sqrt(np.maximum(scores, 0)) if self.metric == "l2" else np.maximum(1 - scores, 0)
        distances[row_ids < 0] = np.inf
        return Hits(row_ids, distances)


def _selector(rows: RowIds, total: int) -> Any:
    """A filter for sorted, unique row ids: a bitmap is quicker, a hash set smaller where ids run far past the rows."""
    faiss = _faiss()
    highest = int(rows[-1])
    if rows[0] < 0 or highest // 8 > _BITMAP_BYTES_PER_ROW * total:
        return faiss.IDSelectorBatch(rows)
    bits = np.zeros(highest // 8 * 8 + 8, dtype=np.uint8)
    bits[rows] = 1
    return faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))


def _copies(vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    copies = np.ascontiguousarray(vectors, dtype=np.float32)
    return np.ascontiguousarray(unit_length(copies), dtype=np.float32) if metric == "cosine" else copies


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtra(
            "FAISS is not installed", next_step="pip install 'isimed-index[cpu]' (searches stay exact without it)"
        ) from error
    return faiss
