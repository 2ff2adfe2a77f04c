"""Projections keep what they promise: variance, neighbours, repeatability."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from isimed_index.errors import MissingExtra, UsageError
from isimed_index.project import pca, umap

RNG = np.random.default_rng(2)


def test_pca_of_a_plane_keeps_distances() -> None:
    flat = RNG.normal(size=(80, 2)) * [9, 2]
    basis = np.linalg.qr(RNG.normal(size=(7, 2)))[0]
    seen = pca((flat @ basis.T + 40).astype(np.float32))
    wanted = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(seen[:, None] - seen[None], axis=-1), wanted, atol=1e-3)
    assert (seen.dtype, seen.shape) == (np.dtype(np.float32), (80, 2))
    assert seen[:, 0].std() > 3 * seen[:, 1].std()


def test_pca_takes_half_precision() -> None:
    vectors = RNG.normal(size=(30, 5)).astype(np.float16)
    np.testing.assert_array_equal(pca(vectors, 3), pca(vectors.astype(np.float32), 3))


@pytest.mark.parametrize("vectors", [np.zeros(5), np.zeros((1, 5)), np.zeros((9, 1)), np.full((9, 3), np.nan)])
def test_refuses_what_has_no_projection(vectors: np.ndarray) -> None:
    for project in (pca, umap):
        with pytest.raises(UsageError):
            project(vectors)


def test_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package, project in (("sklearn.decomposition", pca), ("umap", umap)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtra) as caught:
            project(np.eye(9))
        assert "isimed-index[plot]" in caught.value.next_step


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ImportWarning")
def test_umap_separates_two_clusters() -> None:
    centres = np.repeat([0.0, 8.0], 30)[:, None]
    vectors = (centres + RNG.normal(size=(60, 64))).astype(np.float32)
    seen = umap(vectors, seed=3)
    first, second = seen[:30], seen[30:]
    spread = max(np.linalg.norm(part - part.mean(axis=0), axis=1).max() for part in (first, second))
    assert np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)) > 2 * spread
    np.testing.assert_array_equal(seen, umap(vectors, seed=3))
