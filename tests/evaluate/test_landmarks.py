"""Landmark errors: exact for copies, honest beside guesses, and drawn the same way every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cohorts import COPIES, CROPPED, Cohort, add_random_encoder

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import UsageError
from isimed_index.evaluate.landmarks import PREDICTORS

WHOLE = f"scan <> '{CROPPED.stem}'"


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


def rows(store: Store, **options) -> dict[str, dict]:
    evaluation = store.evaluate(**options)
    assert evaluation.columns["predictor"] == list(PREDICTORS)
    return {row["predictor"]: row for row in evaluation.to_arrow().to_pylist()}


def test_copies_are_found_exactly_and_guesses_are_measured(store: Store):
    found = rows(store, where=WHOLE)
    assert found["lookup"]["median_mm"] < 0.1
    assert found["lookup"]["p95_mm"] < 1.0
    assert found["chart"]["mean_mm"] < 5.0
    assert found["lookup"]["hit_at_1"] > found["same world point"]["hit_at_1"]
    heads = {copy.stem: copy for copy in COPIES}
    labels = store.sql(f"SELECT * FROM labels WHERE {WHOLE}").to_pylist()
    centre = {(row["scan"], row["label"]): np.array([row["x_mm"], row["y_mm"], row["z_mm"]]) for row in labels}
    still = [
        np.linalg.norm(centre[a, label] - centre[b, label]) for a, label in centre for b in heads if a[:6] != b[:6]
    ]
    assert found["same world point"]["landmarks"] == len(still) == found["same world point"]["pairs"] * 12
    assert found["same world point"]["pairs"] == 18  # ordered pairs of five scans, less the two of one subject
    assert found["same world point"]["mean_mm"] == pytest.approx(np.mean(still), rel=1e-6)
    assert found["same world point"]["median_mm"] == pytest.approx(np.median(still), rel=1e-6)
    assert found["same world point"]["p95_mm"] == pytest.approx(np.percentile(still, 95), rel=1e-6)


def test_every_landmark_has_its_own_row_that_the_summary_is_made_of(store: Store):
    evaluation = store.evaluate(where=WHOLE, pairs=4)
    summary = {row["predictor"]: row for row in evaluation.to_arrow().to_pylist()}
    table = evaluation.landmarks_to_arrow()
    assert table.column_names[:4] == ["source", "target", "label", "name"]
    assert table.num_rows == summary["lookup"]["landmarks"] == 4 * 12
    for name in PREDICTORS:
        column = f"{name.replace(' ', '_')}_mm"
        assert np.mean(table.column(column)) == pytest.approx(summary[name]["mean_mm"])
    labels = store.sql("SELECT * FROM labels").to_pylist()
    known = {(row["scan"], row["label"]): row for row in labels}
    for row in table.to_pylist():
        one, other = known[row["source"], row["label"]], known[row["target"], row["label"]]
        assert row["name"] == one["name"]
        apart = np.linalg.norm([one[f"{axis}_mm"] - other[f"{axis}_mm"] for axis in "xyz"])
        assert row["same_world_point_mm"] == pytest.approx(apart)


def test_a_shifted_copy_is_found_by_its_centroid_alone(store: Store):
    found = rows(store, where="scan IN ('sub-01_ses-1_T1w', 'sub-02_T1w')")
    assert found["foreground centroid"]["mean_mm"] < 0.1
    assert found["same world point"]["mean_mm"] == pytest.approx(np.linalg.norm([37, -12, 5]), abs=0.01)


def test_pairs_are_drawn_by_seed(store: Store):
    first, again, other = (rows(store, pairs=5, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["lookup"]["pairs"] == 5
    assert first["same world point"]["mean_mm"] != other["same world point"]["mean_mm"]


def test_label_where(store: Store):
    assert rows(store, where=WHOLE, label_where="name = 'brain'")["lookup"]["landmarks"] == 18


def test_what_cannot_be_measured(store: Store, cohort: Cohort, tmp_path: Path):
    with pytest.raises(UsageError, match="at least two indexed scans"):
        store.evaluate(where="scan = 'sub-02_T1w'")
    with pytest.raises(UsageError, match="no label in common"):
        store.evaluate(where="subject = 'sub-01'")
    bare = isi.create(tmp_path / "bare")
    bare.add([cohort.file(copy) for copy in COPIES[:2]])
    add_random_encoder(bare.path)
    bare.index()
    with pytest.raises(UsageError, match="found 0"):
        bare.evaluate()
