"""Stored patches as questions: what brute force finds in other scans, and never a patch of the own one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from cohorts import COPIES, Cohort
from hypothesis import given, settings
from hypothesis import strategies as st

import isimed_index as isi
from isimed_index import pairs
from isimed_index.api import Store
from isimed_index.errors import NotFound, SqlRefused, UsageError
from isimed_index.matches import SameSubject


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


@pytest.fixture(scope="module")
def patches(store: Store) -> pd.DataFrame:
    rows = store.sql("SELECT patch, scan, subject, x_mm FROM patches JOIN scans USING (scan) ORDER BY patch")
    vectors = np.concatenate([found for _, found in store.embeddings()]).astype(np.float64)
    return rows.to_pandas().assign(vector=list(vectors))


def nearest(patches: pd.DataFrame, patch: int, k: int, same_subject: SameSubject, half: bool) -> np.ndarray:
    """Distances (up to k,) by brute force."""
    asked = patches.set_index("patch").loc[patch]
    same = patches.subject == asked.subject
    kept = {"include": same | ~same, "exclude": ~same, "only": same}[same_subject] & (patches.scan != asked.scan)
    kept &= (patches.x_mm > 0) | (not half)
    vectors = np.stack([*patches.vector[kept], asked.vector])[:-1]
    return np.sort(np.linalg.norm(vectors - asked.vector, axis=1))[:k]


@settings(max_examples=15, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 7000), min_size=1, max_size=4),
    k=st.integers(1, 20),
    same_subject=st.sampled_from(["include", "exclude", "only"]),
    half=st.booleans(),
    exact=st.booleans(),
)
def test_like_equals_brute_force(
    store: Store,
    patches: pd.DataFrame,
    numbers: list[int],
    k: int,
    same_subject: SameSubject,
    half: bool,
    exact: bool,
) -> None:
    where = "x_mm > 0" if half else None
    found = store.search_like(numbers, k, where, same_subject=same_subject, exact=exact).to_pandas()
    expected = [nearest(patches, number, k, same_subject, half) for number in numbers]
    assert found.from_patch.tolist() == np.repeat(numbers, list(map(len, expected))).tolist()
    np.testing.assert_allclose(found.distance, np.concatenate(expected), atol=2e-6)
    known = patches.set_index("patch")
    asked, answers = known.loc[found.from_patch], known.loc[found.patch]
    assert found.from_scan.tolist() == asked.scan.tolist()
    assert (found.scan.tolist(), found.subject.tolist()) == (answers.scan.tolist(), answers.subject.tolist())
    assert not (found.from_scan == found.scan).any()
    same = asked.subject.to_numpy() == answers.subject.to_numpy()
    assert {"include": True, "exclude": not same.any(), "only": same.all()}[same_subject]
    assert not half or (found.x_mm > 0).all()


def test_one_patch_is_one_question_and_its_copies_are_nearest(store: Store) -> None:
    found = store.search_like(700, k=2)
    assert found.column("from_patch").to_pylist() == [700, 700]
    assert found.column("distance").to_numpy() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("same_subject", ["exclude", "only"])
def test_a_stream_is_like_in_pieces(store: Store, same_subject: SameSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "QUERIES_AT_ONCE", 100)
    of = f"scan IN ('{COPIES[0].stem}', '{COPIES[2].stem}') AND z_mm > 10"
    asked = store.sql(f"SELECT patch FROM patches WHERE {of} ORDER BY patch").column("patch").to_pylist()
    tables = list(store.search_pairs(3, of, same_subject=same_subject))
    assert len(tables) > 5
    assert max(len(set(table.column("from_patch").to_pylist())) for table in tables) == 100
    together = pd.concat([table.to_pandas() for table in tables], ignore_index=True)
    pd.testing.assert_frame_equal(together, store.search_like(asked, 3, same_subject=same_subject).to_pandas())
    scans = set(together.from_scan)
    assert scans == ({COPIES[0].stem, COPIES[2].stem} if same_subject == "exclude" else {COPIES[0].stem})


def test_every_patch_is_asked_by_default_and_none_where_none_is_chosen(store: Store, patches: pd.DataFrame) -> None:
    asked = [table.column("from_patch").to_pylist() for table in store.search_pairs(1)]
    assert np.concatenate(asked).tolist() == patches.patch.tolist()
    assert list(store.search_pairs(1, of="false")) == []


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda s: s.search_like(10**6), NotFound, "patch 1000000"),
        (lambda s: s.search_like([0, -1]), NotFound, "patch -1"),
        (lambda s: s.search_like(0.5), UsageError, "whole numbers"),
        (lambda s: s.search_like([[1]]), UsageError, "shape"),
        (lambda s: s.search_like(0, k=0), UsageError, "k of at least 1"),
        (lambda s: s.search_like(0, same_subject="no"), UsageError, "same_subject"),
        (lambda s: s.search_pairs(k=0), UsageError, "k of at least 1"),
        (lambda s: list(s.search_pairs(of="nonsense = 1")), SqlRefused, "nonsense"),
    ],
)
def test_wrong_questions_are_refused(store: Store, ask, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ask(store)


def test_no_patch_asked_is_no_row(store: Store) -> None:
    found = store.search_like([])
    assert found.num_rows == 0
    assert found.column_names[:3] == ["from_patch", "from_scan", "patch"]
