"""Nearest patches of given vectors: what brute force over the streamed embeddings finds, with their places."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cohorts import COPIES, Cohort, add_random_encoder, tiny_scan
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import NotFound, SqlRefused, UsageError
from isimed_index.filters import Remembered
from isimed_index.neighbours import Neighbours

PLACE = ["x_mm", "y_mm", "z_mm"]


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


def everything(store: Store, where: str | None = None) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    pieces = list(store.embeddings(where))
    if not pieces:
        return np.empty(0, np.int64), np.empty((0, 1))
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate([v for _, v in pieces]).astype(np.float64)


def nearest(store: Store, queries: NDArray[np.floating], k: int, where: str | None) -> NDArray[np.float64]:
    """Distances (m, up to k) by brute force, by the card's metric."""
    _, vectors = everything(store, where)
    if not len(vectors):
        return np.empty((len(queries), 0))
    queries = np.asarray(queries, np.float64)
    if store.encoder().metric == "cosine":
        unit = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (queries, vectors)]
        away = 1 - unit[0] @ unit[1].T
    else:
        away = np.linalg.norm(queries[:, None] - vectors[None], axis=2)
    return np.sort(away, axis=1)[:, :k]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 100),
    k=st.integers(1, 40),
    where=st.sampled_from([None, "x_mm > 0 AND z_mm < 20", f"scan = '{COPIES[1].stem}'", "x_mm > 1e6"]),
    exact=st.booleans(),
)
def test_equals_brute_force_and_every_row_satisfies_the_filter(
    store: Store, seed: int, k: int, where: str | None, exact: bool
) -> None:
    rng = np.random.default_rng(seed)
    ids, vectors = everything(store)
    queries = vectors[rng.choice(len(ids), 3, replace=False)] + rng.normal(scale=0.05, size=(3, vectors.shape[1]))
    found = store.search(queries, k, where, exact=exact)
    expected = nearest(store, queries, k, where)
    assert found.num_rows == expected.size
    distances = found.column("distance").to_numpy().reshape(expected.shape)
    np.testing.assert_allclose(distances, expected, atol=2e-6)
    assert set(found.column("patch").to_pylist()) <= set(everything(store, where)[0].tolist())
    assert found.column("query").to_pylist() == np.repeat(np.arange(3), expected.shape[1]).tolist()


def test_places_scans_and_subjects_are_those_of_the_views(store: Store) -> None:
    _, vectors = everything(store)
    found = store.search(vectors[::500], 5).to_pylist()
    assert len({row["scan"] for row in found}) > 1
    rows = store.sql("SELECT patch, scan, subject, x_mm, y_mm, z_mm FROM patches JOIN scans USING (scan)").to_pylist()
    view = {row.pop("patch"): row for row in rows}
    for row in found:
        shown = view[row["patch"]]
        assert (row["scan"], row["subject"]) == (shown["scan"], shown["subject"])
        assert [row[name] for name in PLACE] == pytest.approx([shown[name] for name in PLACE])


def test_the_common_frame_is_the_canonical_one_where_there_is_a_chart(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = store.sql(
        "SELECT patch, scan, x_mm, y_mm, z_mm, cx_mm, cy_mm, cz_mm FROM patches ORDER BY patch"
    ).to_pandas()
    neighbours = Neighbours(store.snapshot)
    canonical = rows[[f"c{name}" for name in PLACE]].to_numpy()
    np.testing.assert_allclose(neighbours.common_mm(), canonical, atol=1e-3)
    monkeypatch.setattr("isimed_index.neighbours.charts_that_hold", lambda *_: None)
    own = rows[PLACE] - rows.groupby("scan")[PLACE].transform("mean")
    np.testing.assert_allclose(neighbours.common_mm(), own.to_numpy(), atol=1e-3)


def test_one_vector_is_one_query_and_finds_itself_first(store: Store) -> None:
    ids, vectors = everything(store)
    found = store.search(vectors[7], k=3)
    assert found.column("patch")[0].as_py() in ids[np.isclose(vectors @ vectors[7], vectors[7] @ vectors[7])]
    assert found.column("distance")[0].as_py() == pytest.approx(0, abs=1e-6)
    assert found.column("query").to_pylist() == [0, 0, 0]


def test_patches_of_another_encoder_count_for_nothing(cohort: Cohort, tmp_path: Path) -> None:
    shutil.copytree(cohort.store, tmp_path / "copy.isimed")
    store = isi.open(tmp_path / "copy.isimed", mode="a")
    ids, vectors = everything(store)
    first = store.encoder().id
    store.index(add_random_encoder(store.path, "other", seed=1), where=f"scan = '{COPIES[1].stem}'")
    asked: list[int] = []
    neighbours = store._lookup(first).neighbours
    search = neighbours.index.search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours.index, "search", lambda q, k, among, **o: asked.extend(among) or search(q, k, among))
        found = store.search(vectors[:3], 5, where="true", encoder=first)
    assert asked == ids.tolist()
    assert found.num_rows == 15


def test_what_is_deleted_is_not_found_any_more(cohort: Cohort, tmp_path: Path) -> None:
    shutil.copytree(cohort.store, tmp_path / "copy.isimed")
    store = isi.open(tmp_path / "copy.isimed", mode="a")
    _, vectors = everything(store, f"scan = '{COPIES[1].stem}'")
    assert COPIES[1].stem in store.search(vectors[:20], 5).column("scan").to_pylist()
    store.delete(where=f"scan = '{COPIES[1].stem}'")
    found = store.search(vectors[:20], 5)
    assert found.num_rows == 100
    assert COPIES[1].stem not in found.column("scan").to_pylist()


def test_packing_and_deletion_change_places_of_nothing_else(cohort: Cohort, tmp_path: Path) -> None:
    shutil.copytree(cohort.store, tmp_path / "copy.isimed")
    store = isi.open(tmp_path / "copy.isimed", mode="a")
    _, vectors = everything(store)
    before = store.search(vectors[::400], 5, exact=True)
    store.compact()
    assert len(store._lookup(None).neighbours.index.exact.blocks) == 1
    assert store.search(vectors[::400], 5, exact=True) == before
    store.delete("patch % 7 = 3", what="patches")
    rows = store.search(vectors[::400], 40).to_pylist()
    view = {row["patch"]: row for row in store.sql("SELECT * FROM patches").to_pylist()}
    assert rows
    assert all(row["patch"] % 7 != 3 for row in rows)
    for row in rows:
        assert [row[name] for name in PLACE] == pytest.approx([view[row["patch"]][name] for name in PLACE])
        assert row["scan"] == view[row["patch"]]["scan"]


def test_a_filter_is_evaluated_once_for_a_pinned_generation(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = store._lookup(None).neighbours.filters
    asked: list[str] = []
    matching = filters._matching
    monkeypatch.setattr(filters, "_matching", lambda where: asked.append(where) or matching(where))
    _, vectors = everything(store)
    for where in ("x_mm < 3", "x_mm < 4", "x_mm < 3"):
        found = store.search(vectors[:2], 5, where)
        assert (found.column("x_mm").to_numpy() < 4).all()
    assert asked == ["x_mm < 3", "x_mm < 4"]


def test_what_is_remembered_is_bounded_and_may_be_asked_for_by_many_threads() -> None:
    kept = Remembered(40)
    made: list[int] = []

    def ask(number: int) -> int:
        return len(kept.get(number, lambda: made.append(number) or np.zeros(number, np.uint8)))

    assert [ask(number) for number in (20, 20, 15, 20, 10)] == [20, 20, 15, 20, 10]
    assert made == [20, 15, 10]
    assert [ask(number) for number in (20, 10, 15)] == [20, 10, 15]
    assert made == [20, 15, 10, 15]  # the one that had not been asked for the longest time had given way
    assert [ask(100), ask(100), ask(10)] == [100, 100, 10]
    assert made == [20, 15, 10, 15, 100, 10]
    numbers = np.random.default_rng(0).integers(1, 40, 4_000).tolist()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, numbers)) == numbers


@pytest.mark.parametrize(
    ("vectors", "k", "said"),
    [
        (np.zeros((1, 16)), 0, "k of at least 1"),
        (np.zeros((1, 3)), 1, "16 dimensions"),
        (np.full(16, np.nan), 1, "NaN"),
        (np.zeros((1, 1, 16)), 1, "shape"),
    ],
)
def test_wrong_questions_are_refused(store: Store, vectors: NDArray[np.float64], k: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        store.search(vectors, k)


def test_a_condition_that_is_no_condition_is_refused(store: Store) -> None:
    with pytest.raises(SqlRefused):
        store.search(everything(store)[1][:1], where="x_mm > 0); DROP TABLE scans; --")


def test_before_anything_is_encoded(tmp_path: Path) -> None:
    store = isi.create(tmp_path / "new.isimed")
    store.add(tiny_scan(tmp_path / "a.nii"))
    with pytest.raises(NotFound):
        store.search(np.zeros(16))
    add_random_encoder(store.path)
    store.refresh()
    with pytest.raises(NotFound, match="has encoded no scan"):
        store.search(np.zeros(16))
