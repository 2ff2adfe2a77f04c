"""Approximate and flat search with FAISS, by row id; the only module that imports faiss.

A FAISS index is derived data: it answers with row ids and distances of its own (rounded, quantised) copies of the
vectors. `isimed_index.index.search` ranks them again with the stored vectors.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import Incompatible, MissingExtra, StoreDamaged
from isimed_index.index.exact import unit_length
from isimed_index.index.lists import Kept, ListTable, nearest_lists
from isimed_index.index.protocol import (
    NO_ROW,
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
from isimed_index.index.recipe import Recipe
from isimed_index.index.spectrum import Axes

FILE = "index.faiss"
MAPPED_FROM = 64 << 20  # bytes; smaller files are read
_QUERIES_AT_ONCE = 256  # under a filter: bounds the table of distances to centres
_NONE = np.empty(0, np.int64)
_AGAIN = "run isimed index again"
_IDS_AT_ONCE = 1 << 20  # of a bitmap, a multiple of 8: each takes a byte while it is made
_BITMAP_BYTES_PER_ROW = 8  # a bitmap filter that would take more than this gives way to a hash set


class FaissIndex:
    """A FAISS index over row ids.

    Cosine is the inner product of unit copies. Behind principal axes it is their L2, which is 2 (1 - cosine): unlike
    the inner product it keeps its order when copies are centred and axes cut off. A vector of zeros, which has cosine 0
    with everything, lies at half of that distance there, until it is ranked again by the stored vectors. A search
    without filter that came back short visits every list.
    """

    def __init__(self, native: Any, metric: Metric, recipe: Recipe, inside: _Lists | None = None) -> None:
        self.metric = metric
        self.recipe = recipe
        self._native = native
        self._inside = inside or _Lists(native, recipe)

    def __len__(self) -> int:
        return int(self._native.ntotal)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors."""
        return int(self._native.d)

    @classmethod
    def build(
        cls,
        blocks: Iterable[Block],
        metric: Metric,
        recipe: Recipe,
        dim: int,
        sample: Vectors | None = None,
        axes: Axes | None = None,
    ) -> FaissIndex:
        """An index over blocks (pieces small enough to be copied), trained on `sample` (n, dim) if it has lists.

        A recipe with principal axes takes them from `axes`, those of the sample by default.
        """
        checked_metric(metric)
        native = _layout(recipe, metric, dim, sample, axes)
        for row_ids, vectors in blocks:
            native.add_with_ids(copies(vectors, metric), np.ascontiguousarray(row_ids, dtype=np.int64))
        return cls(native, metric, recipe)

    def with_recipe(self, **changes: Any) -> FaissIndex:
        """The same index with other probes, fetch or reach."""
        return FaissIndex(self._native, self.metric, replace(self.recipe, **changes), self._inside)

    @property
    def _by_l2(self) -> bool:
        """Whether FAISS measures squared distances, and not inner products."""
        return bool(self._native.metric_type == _faiss().METRIC_L2)

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
        """Open `index.faiss`; raises `StoreDamaged` when it is missing or its bytes are not those of `sha256`.

        Large files are memory-mapped, and not read as a whole: a store has hashed them when it says where they are
        (`Snapshot.index_path`, once a process). `Incompatible` when the FAISS that is installed cannot read it.
        """
        faiss = _faiss()
        path = directory / FILE
        try:
            mapped = path.stat().st_size >= MAPPED_FROM
            whole = mapped or _sha256(path) == sha256
        except FileNotFoundError:
            raise StoreDamaged(f"the index file {FILE} is missing", next_step=_AGAIN) from None
        except OSError as error:
            raise StoreDamaged(f"the index file {FILE} cannot be read: {error.strerror}", next_step=_AGAIN) from None
        if not whole:
            raise StoreDamaged(f"the index file {FILE} does not match its hash: it is damaged", next_step=_AGAIN)
        try:
            native = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except RuntimeError as error:  # an intact file in a format that this FAISS does not know
            raise Incompatible(
                f"the index file {FILE} needs another FAISS than {faiss.__version__}",
                next_step="update FAISS, or run isimed index again",
            ) from error
        return cls(native, checked_metric(metric), recipe)

    def keep(self, rows: RowIds) -> Kept:
        """A filter of rising, unique row ids, made ready for `search`."""
        selector = _selector(rows, len(self))
        return Kept(rows, selector, self._inside.table.counts(rows) if self.recipe.lists else None)

    def search(
        self, queries: ArrayLike, k: int, among: ArrayLike | Kept | None = None, enough: int | None = None
    ) -> Hits:
        """The k nearest rows of each query (m, d) by the index's own codes, only such rows as `among` keeps.

        Where the lists visited hold fewer than `enough` rows (k by default) every list is visited.
        """
        asked = copies(checked_queries(queries, k, self.dim), self.metric)
        kept = among if among is None or isinstance(among, Kept) else self._kept(among)
        if len(self) == 0 or asked.shape[0] == 0 or (kept is not None and kept.rows.size == 0):
            return nothing(asked.shape[0], k)
        if kept is not None:
            return self._ask_kept(asked, k, kept)
        probes = math.ceil(self.recipe.probes * self.recipe.growth(k))
        hits = self._ask(asked, k, probes)
        last = min(k if enough is None else enough, k, len(self)) - 1
        short = np.flatnonzero(hits.row_ids[:, last] == NO_ROW) if last >= 0 else np.empty(0, np.intp)
        if short.size and self.recipe.lists > probes:
            again = self._ask(asked[short], k, self.recipe.lists)
            hits.row_ids[short], hits.distances[short] = again.row_ids, again.distances
        return hits

    def _kept(self, among: ArrayLike) -> Kept | None:
        rows = checked_rows(among)
        assert rows is not None
        return self.keep(rows) if rows.size else Kept(rows, None, None)

    def _ask(self, asked: NDArray[np.float32], k: int, probes: int, selector: Any = None) -> Hits:
        faiss = _faiss()
        params = None
        if self.recipe.lists:
            params = faiss.SearchParametersIVF(nprobe=min(max(1, probes), self.recipe.lists))
            if self.recipe.pca:
                params = faiss.SearchParametersPreTransform(index_params=params)
        elif selector is not None:
            params = faiss.SearchParameters(sel=selector)
        scores, row_ids = self._native.search(asked, k, params=params)
        return self._hits(scores, row_ids)

    def _ask_kept(self, asked: NDArray[np.float32], k: int, kept: Kept) -> Hits:
        if kept.counts is None:
            return self._ask(asked, k, 0, kept.selector)
        faiss, inside = _faiss(), self._inside
        reach = math.ceil(self.recipe.reach * self.recipe.growth(k, filtered=True))
        scores = np.empty((asked.shape[0], k), np.float32)
        row_ids = np.empty((asked.shape[0], k), np.int64)
        for start in range(0, asked.shape[0], _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            turned = inside.turned(asked[some])
            keys, away = nearest_lists(inside.away(turned), kept.counts, reach)
            if not self._by_l2:
                np.negative(away, out=away)
            if not keys.shape[1]:
                scores[some], row_ids[some] = np.inf, NO_ROW
                continue
            part, found = np.empty_like(scores[some]), np.empty_like(row_ids[some])
            params = faiss.SearchParametersIVF(nprobe=keys.shape[1], sel=kept.selector)
            arrays = [faiss.swig_ptr(array) for array in (keys, away, part, found)]
            inside.ivf.search_preassigned_c(
                len(turned), faiss.swig_ptr(turned), k, arrays[0], arrays[1], arrays[2], arrays[3], False, params
            )
            scores[some], row_ids[some] = part, found
        return self._hits(scores, row_ids)

    def _hits(self, scores: NDArray[np.float32], row_ids: RowIds) -> Hits:
        """Distances of the metric, from what FAISS measured."""
        if not self._by_l2:
            distances: Any = 1 - scores
        else:
            distances = np.sqrt(np.maximum(scores, 0)) if self.metric == "l2" else scores / 2
        distances[row_ids < 0] = np.inf
        return Hits(row_ids, np.maximum(distances, 0, dtype=np.float32))


class _Lists:
    """What a filtered search needs of an index with lists: the projection, the centres, the list of each row."""

    def __init__(self, native: Any, recipe: Recipe) -> None:
        self.native, self.recipe = native, recipe

    @cached_property
    def ivf(self) -> Any:
        """The index behind the projection."""
        return _faiss().extract_index_ivf(self.native)

    @cached_property
    def centres(self) -> NDArray[np.float32]:
        """Centres (lists, d) of the lists."""
        centres: NDArray[np.float32] = self.ivf.quantizer.reconstruct_n(0, self.recipe.lists)
        return centres

    @cached_property
    def table(self) -> ListTable:
        """In which list each row is."""
        faiss, lists = _faiss(), self.ivf.invlists
        sizes = [lists.list_size(number) for number in range(self.recipe.lists)]
        views = [faiss.rev_swig_ptr(lists.get_ids(n), size) if size else _NONE for n, size in enumerate(sizes)]
        return ListTable.of([view.copy() for view in views])

    def turned(self, asked: NDArray[np.float32]) -> NDArray[np.float32]:
        """Queries as the lists see them."""
        if not self.recipe.pca:
            return np.ascontiguousarray(asked)
        turned: NDArray[np.float32] = (
            _faiss().downcast_VectorTransform(self.native.chain.at(0)).apply(np.ascontiguousarray(asked))
        )
        return turned

    def away(self, turned: NDArray[np.float32]) -> NDArray[np.float32]:
        """How far (m, lists) the centres are: squared distances, or negative inner products."""
        away: NDArray[np.float32] = turned @ self.centres.T
        if self.ivf.metric_type != _faiss().METRIC_L2:
            return np.negative(away, out=away)
        away *= -2
        away += np.einsum("ld,ld->l", self.centres, self.centres)
        away += np.einsum("md,md->m", turned, turned)[:, None]
        return away


def _layout(recipe: Recipe, metric: Metric, dim: int, sample: Vectors | None, axes: Axes | None) -> Any:
    """An empty, trained FAISS index."""
    faiss = _faiss()
    training = copies(np.empty((0, dim)) if sample is None else sample, metric)
    inner = recipe.pca or dim
    factory = f"IVF{recipe.lists},{recipe.code}" if recipe.lists else recipe.code
    kind = faiss.METRIC_INNER_PRODUCT if metric == "cosine" and not recipe.pca else faiss.METRIC_L2
    native = faiss.index_factory(inner, factory, kind)
    if recipe.pca:
        chosen = axes or Axes.of(training)
        turn = np.ascontiguousarray(chosen.rotation(recipe.pca, recipe.rotated))
        linear = faiss.LinearTransform(dim, inner, True)
        linear.A, linear.b = _vector(turn.ravel()), _vector(-turn @ chosen.mean)
        linear.is_trained = True
        native = faiss.IndexPreTransform(linear, native)
        native.is_trained = not recipe.lists
    if not native.is_trained:
        native.train(training)
    return native if recipe.lists else faiss.IndexIDMap2(native)


def _vector(values: NDArray[np.float32]) -> Any:
    """A std::vector<float> of FAISS: one that is made, for those that it returns may have a class of SimpleITK's.

    SWIG keeps one table of types for all modules of a process, and the last one that was loaded has its way.
    """
    faiss = _faiss()
    vector = faiss.Float32Vector()
    faiss.copy_array_to_vector(values, vector)
    return vector


def _selector(rows: RowIds, total: int) -> Any:
    """A filter for sorted, unique row ids: a range where they have no gaps, else a bitmap, from the id 0.

    Where ids run far past the rows a hash set is smaller.
    """
    faiss = _faiss()
    lowest, highest = int(rows[0]), int(rows[-1])
    if highest - lowest + 1 == rows.size:
        return faiss.IDSelectorRange(lowest, highest + 1)
    if lowest < 0 or highest // 8 > _BITMAP_BYTES_PER_ROW * total:
        return faiss.IDSelectorBatch(rows)
    bitmap = np.zeros(highest // 8 + 1, dtype=np.uint8)
    firsts = list(range(0, highest + 1, _IDS_AT_ONCE))
    for first, some in zip(firsts, np.split(rows, np.searchsorted(rows, firsts[1:])), strict=True):
        bits = np.zeros(min(_IDS_AT_ONCE, highest + 1 - first), dtype=np.bool_)
        bits[some - first] = True
        bitmap[first // 8 : (first + bits.size + 7) // 8] = np.packbits(bits, bitorder="little")
    return faiss.IDSelectorBitmap(bitmap)


def copies(vectors: Vectors, metric: Metric) -> NDArray[np.float32]:
    """Vectors (n, d) as an index holds them: float32, of unit length for the metric cosine."""
    plain = np.ascontiguousarray(vectors, dtype=np.float32)
    return np.ascontiguousarray(unit_length(plain), dtype=np.float32) if metric == "cosine" else plain


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
