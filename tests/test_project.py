"""Projections keep what they promise: variance, neighbours, repeatability."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


# Interpreted: compiling UMAP takes half a minute, 32 points a few seconds. `make demo` runs it compiled.
UMAP_TWICE = """
import sys
from functools import partial
import numpy as np
import umap as package
from isimed_index.project import umap
package.UMAP = partial(package.UMAP, n_epochs=100)
vectors = np.load(sys.argv[1])
np.save(sys.argv[2], [umap(vectors, seed=3), umap(vectors, seed=3)])
"""


def test_umap_separates_two_clusters(tmp_path: Path) -> None:
    centres = np.repeat([0.0, 8.0], 16)[:, None]
    np.save(tmp_path / "vectors.npy", (centres + RNG.normal(size=(32, 64))).astype(np.float32))
    done = subprocess.run(
        [sys.executable, "-c", UMAP_TWICE, str(tmp_path / "vectors.npy"), str(tmp_path / "seen.npy")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen, again = np.load(tmp_path / "seen.npy")
    first, second = seen[:16], seen[16:]
    spread = max(np.linalg.norm(part - part.mean(axis=0), axis=1).max() for part in (first, second))
    assert np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)) > 2 * spread
    np.testing.assert_array_equal(seen, again)
