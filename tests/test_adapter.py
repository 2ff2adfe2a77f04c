"""The adapter gives what scikit-learn's own estimator gives on the same vectors, by row id."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cohorts import COPIES, Cohort
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import neighbors

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import UsageError


@pytest.fixture(scope="module")
def store(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store whose row ids have gaps, so that no position passes for one."""
    folder = tmp_path_factory.mktemp("gaps") / "copy.isimed"
    shutil.copytree(cohort.store, folder)
    store = isi.open(folder)
    store.delete("patch < 500 OR patch % 5 = 2", what="patches")
    return store


def kept(store: Store, where: str | None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    pieces = list(store.embeddings(where))
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate([v for _, v in pieces]).astype(np.float64)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 100),
    k=st.integers(1, 20),
    where=st.sampled_from([None, "x_mm > 0", f"scan = '{COPIES[3].stem}'"]),
    exact=st.booleans(),
)
def test_as_scikit_learn(store: Store, seed: int, k: int, where: str | None, exact: bool) -> None:
    rng = np.random.default_rng(seed)
    ids, vectors = kept(store, where)
    X = vectors[rng.choice(len(ids), 4, replace=False)] + rng.normal(scale=0.02, size=(4, vectors.shape[1]))
    theirs = neighbors.NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors)
    ours = isi.NearestNeighbors(store, n_neighbors=k, where=where, exact=exact).fit()
    assert ours.row_ids_.tolist() == ids.tolist()
    assert (ours.n_samples_fit_, ours.n_features_in_) == (theirs.n_samples_fit_, theirs.n_features_in_)
    distances, row_ids = ours.kneighbors(X)
    np.testing.assert_allclose(distances, theirs.kneighbors(X)[0], atol=2e-6)
    at = np.searchsorted(ids, row_ids)
    assert (ids[at] == row_ids).all()
    np.testing.assert_allclose(np.linalg.norm(vectors[at] - X[:, None], axis=2), distances, atol=2e-6)
    assert (ours.kneighbors(X, return_distance=False) == row_ids).all()
    graph = ours.kneighbors_graph(X, mode="distance")
    assert (graph.shape, graph.nnz) == ((4, len(ids)), 4 * k)
    np.testing.assert_allclose(np.sort(graph.data.reshape(4, k)), distances, atol=1e-12)
    assert (ours.row_ids_[graph.indices.reshape(4, k)] == row_ids).all()
    connected = ours.kneighbors_graph(X)
    assert (connected.data == 1).all()
    assert (connected.indices == graph.indices).all()


def test_within_and_numbers_of_a_call(store: Store) -> None:
    ours = isi.NearestNeighbors(store, within=isi.Label("brain"))
    X = kept(store, None)[1][:2]
    row_ids = ours.kneighbors(X, 7, return_distance=False)
    assert row_ids.shape == (2, 7)
    assert (
        row_ids.tolist()
        == store.search(X, 7, within=isi.Label("brain")).column("patch").to_numpy().reshape(2, 7).tolist()
    )
    assert set(row_ids.ravel()) <= set(ours.row_ids_)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda ours, X: ours.fit(X), "expected no X"),
        (lambda ours, X: ours.kneighbors(None), "search_like|expected vectors"),
        (lambda ours, X: ours.kneighbors(X[0]), "shape"),
        (lambda ours, X: ours.kneighbors(X, 0), "k of at least 1"),
        (lambda ours, X: ours.kneighbors(X, 10**5), "at most 5850"),
        (lambda ours, X: ours.kneighbors_graph(X, mode="radius"), "mode"),
        (lambda ours, X: ours.kneighbors(X[:, :3]), "16 dimensions"),
    ],
)
def test_wrong_calls_are_refused(store: Store, ask, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ask(isi.NearestNeighbors(store), kept(store, None)[1][:2])


def test_scikit_learn_is_not_imported(store: Store) -> None:
    code = (
        "import sys, numpy as np, isimed_index as isi; s = isi.open(sys.argv[1], mode='r');"
        "isi.NearestNeighbors(s).kneighbors_graph(np.zeros((1, 16))); assert 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(store.path))], check=True)
