"""Embeddings seen in few dimensions: principal components and UMAP."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import MissingExtra, UsageError
from isimed_index.index.protocol import Vectors

_PCA_BEFORE_UMAP = 50  # dimensions; on 10,000 × 1024 vectors this cuts UMAP's time to a third
_NEIGHBOURS = 15  # UMAP's own default


def pca(vectors: Vectors, dims: int = 2, seed: int = 0) -> NDArray[np.float32]:
    """The first `dims` principal components (n, dims) of vectors (n, d), in the vectors' own unit.

    Signs are fixed, so the same vectors give the same figure. Raises `UsageError` when there are fewer rows or
    dimensions than `dims`, or values that are not finite.
    """
    _check(vectors, rows=dims, dims=dims)
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise _missing("scikit-learn") from error
    fitted = PCA(n_components=dims, random_state=seed).fit_transform(np.asarray(vectors, dtype=np.float32))
    return np.asarray(fitted, dtype=np.float32)


def umap(vectors: Vectors, seed: int = 0, dims: int = 2) -> NDArray[np.float32]:
    """UMAP (n, dims) of vectors (n, d), after a PCA to 50 dimensions where there are more; repeatable by `seed`.

    It starts from the principal components, which keep the large-scale layout (Kobak and Linderman, Nature
    Biotechnology 2021). Raises `UsageError` for fewer than 5 rows, `MissingExtra` without umap-learn.
    """
    _check(vectors, rows=5, dims=dims)
    try:
        from umap import UMAP
    except ImportError as error:
        raise _missing("umap-learn") from error
    n, d = vectors.shape
    reduced = np.asarray(vectors, dtype=np.float32)
    if d > _PCA_BEFORE_UMAP:
        reduced = pca(reduced, min(_PCA_BEFORE_UMAP, n), seed)
    fitter = UMAP(n_components=dims, n_neighbors=min(_NEIGHBOURS, n - 1), init="pca", random_state=seed, n_jobs=1)
    return np.asarray(fitter.fit_transform(reduced), dtype=np.float32)


def _check(vectors: Vectors, rows: int, dims: int) -> None:
    if vectors.ndim != 2:
        raise UsageError(f"expected vectors of shape (n, d), found {vectors.shape}")
    if vectors.shape[0] < rows or vectors.shape[1] < dims:
        raise UsageError(
            f"expected at least {rows} vectors of {dims} dimensions, found {vectors.shape[0]} of {vectors.shape[1]}"
        )
    if not np.isfinite(vectors).all():
        raise UsageError("the vectors hold NaN or infinite values")


def _missing(package: str) -> MissingExtra:
    return MissingExtra(f"{package} is not installed", next_step="pip install 'isimed-index[plot]'")
