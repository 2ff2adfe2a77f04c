"""The search of a store behind the names that scikit-learn's users know: `kneighbors`, `kneighbors_graph`.

It is fitted already, to what the store holds; scikit-learn itself is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from isimed_index.errors import UsageError
from isimed_index.within import Within

if TYPE_CHECKING:
    from isimed_index.api import Store

Mode = Literal["connectivity", "distance"]


class NearestNeighbors:
    """`sklearn.neighbors.NearestNeighbors` over the patches of a store, with one difference that matters.

    Neighbours are *row ids*, the column `patch` of every view, and not positions in a training matrix. Row ids
    have gaps after deletion, and a filter keeps a part of them.

    Args:
        store: an open store; its pinned generation is what is searched.
        n_neighbors: how many, where a call does not say.
        where: SQL over `patches` that chooses which may answer.
        within: a `Ball`, `Cuboid` or `Label`, or several, as in `Store.search`.
        exact: leave the approximate index out.
        encoder: id, beginning of one, or name; by default the newest.
    """

    def __init__(
        self,
        store: Store,
        n_neighbors: int = 5,
        where: str | None = None,
        within: Within | None = None,
        exact: bool = False,
        encoder: str | None = None,
    ) -> None:
        self.store = store
        self.n_neighbors = n_neighbors
        self.where = where
        self.within = within
        self.exact = exact
        self.encoder = encoder

    def fit(self, X: ArrayLike | None = None, y: object = None) -> NearestNeighbors:
        """Itself: the store was fitted when it was indexed. `UsageError` for any `X`, which it would not search."""
        if X is not None:
            raise UsageError("expected no X: what is searched is the store", next_step="leave X out, or Store.index")
        return self

    @property
    def n_features_in_(self) -> int:
        """Dimensions of the vectors."""
        return int(self.store.encoder(self.encoder).dim)

    @property
    def n_samples_fit_(self) -> int:
        """How many patches may answer."""
        return len(self.row_ids_)

    @property
    def row_ids_(self) -> NDArray[np.int64]:
        """Row ids (n,), rising, of the patches that may answer: the columns of `kneighbors_graph`."""
        return self.store.row_ids(self.where, self.within, self.encoder)

    def kneighbors(
        self, X: ArrayLike, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]] | NDArray[np.int64]:
        """Distances (m, k) by the card's metric and row ids (m, k) of the nearest patches, or row ids alone.

        `UsageError` where fewer than k patches may answer, as in scikit-learn; and where X is None: for stored patches
        ask `Store.search_like`, which leaves their own scans out.
        """
        distances, row_ids = self._nearest(X, n_neighbors)
        return (distances, row_ids) if return_distance else row_ids

    def kneighbors_graph(self, X: ArrayLike, n_neighbors: int | None = None, mode: Mode = "connectivity") -> Any:
        """A sparse matrix (m, n) in CSR form: 1, or the distance, where a patch is one of the nearest.

        Column j is the patch `row_ids_[j]`. A distance of 0 is stored, as in scikit-learn.
        """
        from scipy.sparse import csr_matrix

        if mode not in get_args(Mode):
            raise UsageError(f"expected the mode connectivity or distance, found {mode!r}")
        distances, row_ids = self._nearest(X, n_neighbors)
        known = self.row_ids_
        m, k = row_ids.shape
        values = np.ones(m * k) if mode == "connectivity" else distances.astype(np.float64).ravel()
        columns = np.searchsorted(known, row_ids.ravel())
        return csr_matrix((values, columns, np.arange(0, m * k + 1, k)), shape=(m, len(known)))

    def _nearest(self, X: ArrayLike | None, n_neighbors: int | None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances and row ids (m, k), the nearest first."""
        if X is None:
            raise UsageError("expected vectors X (m, d)", next_step="Store.search_like for stored patches")
        asked = np.asarray(X)
        if asked.ndim != 2:
            raise UsageError(
                f"expected vectors X (m, d), found shape {asked.shape}", next_step="X[None] for one vector"
            )
        k = self.n_neighbors if n_neighbors is None else n_neighbors
        found = self.store.search(asked, k, self.where, self.within, self.exact, self.encoder)
        if found.num_rows != len(asked) * k:
            may = len(self.row_ids_)
            raise UsageError(f"expected n_neighbors of at most {may}, as many patches may answer, found {k}")
        distances, row_ids = (found.column(name).to_numpy().reshape(len(asked), k) for name in ("distance", "patch"))
        return distances, row_ids
