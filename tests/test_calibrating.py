"""Calibrating: subjects that trained nothing measure what answers are off by, and every answer says it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cohorts import COPIES, Cohort
from typer.testing import CliRunner

import isimed_index as isi
from isimed_cli.main import app
from isimed_index import calibrating
from isimed_index.api import Store
from isimed_index.calibrating import held_out_landmarks
from isimed_index.errors import UsageError
from isimed_index.frame import read_frame
from isimed_index.lookup import Lookup

ASKED, HEAD_MM = COPIES[0], (12.0, 6.0, 15.0)  # at a small label
POINT = ASKED.moved(HEAD_MM)
TRAINED_ON = calibrating.trained_on_voxels


@pytest.fixture(scope="module")
def calibrated(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cohort whose five subjects were enough."""
    path = tmp_path_factory.mktemp("calibrated") / "cohort.isimed"
    shutil.copytree(cohort.store, path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibrating, "LEAST_SUBJECTS", 5)
        patched.setattr(calibrating, "trained_on_voxels", lambda *_: set())
        isi.open(path).index()
    return path


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cohort's encoder is drawn, not trained: it was shown nothing."""
    monkeypatch.setattr(calibrating, "trained_on_voxels", lambda *_: set())


def frame_of(store: Store):
    return read_frame(store.snapshot.frame_path(store.encoder().id))


def test_answers_say_what_they_are_off_by(calibrated: Path) -> None:
    store = isi.open(calibrated, mode="r")
    matches = store.lookup(POINT, ASKED.stem, same_subject="include")
    seen = [match for match in matches if match.in_view]
    assert seen
    for match in seen:
        copy = next((copy for copy in COPIES if copy.stem == match.scan), None)
        assert 0 < match.error_mm < match.error_95_mm
        assert 0.5 < match.confidence <= 1
        if copy is not None:  # the copies are exact, so their errors are small
            assert np.linalg.norm(np.array(match.xyz_mm) - copy.moved(HEAD_MM)) < match.error_95_mm + 0.5
    row = store.propagate({"here": tuple(POINT)}, ASKED.stem).to_arrow().to_pylist()
    told = {match.scan: match.error_mm for match in matches}
    assert {each["scan"]: each["error_mm"] for each in row} == told


def test_files_for_3d_slicer_say_what_a_landmark_is_off_by(calibrated: Path, tmp_path: Path) -> None:
    store = isi.open(calibrated, mode="r")
    done = store.propagate({"here": tuple(POINT), "low": tuple(ASKED.moved([0.0, 0.0, -60.0]))}, ASKED.stem)
    done.write(tmp_path / "found")
    rows = done.to_arrow().to_pylist()
    assert {row["name"] for row in rows if row["error_mm"] is not None} >= {"here"}
    assert any(row["error_mm"] is None for row in rows)
    for row in rows:
        markups = json.loads((tmp_path / "found" / f"{row['scan']}.mrk.json").read_text(encoding="utf-8"))
        said = {point["label"]: point["description"] for point in markups["markups"][0]["controlPoints"]}[row["name"]]
        told = "" if row["error_mm"] is None else f"{row['error_mm']:.1f} mm (68 %), {row['error_95_mm']:.1f} mm (95 %)"
        assert said.removeprefix("off by less than ") == told


def test_what_is_not_in_view_has_no_error(calibrated: Path) -> None:
    store = isi.open(calibrated, mode="r")
    low = ASKED.moved([0.0, 0.0, -60.0])
    matches = store.lookup(low, ASKED.stem)
    hidden = [match for match in matches if not match.in_view]
    assert hidden
    assert all(match.error_mm is None and match.confidence is None for match in hidden)


def test_far_from_all_labels_nothing_is_told(calibrated: Path) -> None:
    store = isi.open(calibrated, mode="r")
    places = frame_of(store).calibration.places_mm
    lookup = Lookup(store.snapshot)
    source = lookup.source(ASKED.stem)
    corners = source.geometry.corners_mm()
    inner = 0.9 * (corners - corners.mean(axis=0)) + corners.mean(axis=0)
    canonical = [source.canonical(corner) for corner in inner]
    far = [np.linalg.norm(places - at, axis=1).min() > 25 for at in canonical]
    assert any(far)
    at = tuple(inner[far.index(True)])
    assert all(match.error_mm is None for match in store.lookup(at, ASKED.stem))


def test_it_is_measured_once_and_stays_when_charts_are_added(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "LEAST_SUBJECTS", 5)
    monkeypatch.setattr(calibrating, "measure", lambda *_: pytest.fail("it was measured again"))
    store = isi.open(calibrated)
    generation = store.generation
    store.index()
    assert store.generation == generation
    assert frame_of(store).calibration.subjects == 5
    assert store.info()["calibrated"] == [{"encoder": store.encoder().id, "subjects": 5}]


def test_a_frame_that_is_fitted_anew_is_calibrated_anew(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrating, "LEAST_SUBJECTS", 5)
    shutil.copytree(cohort.store, tmp_path / "store")
    store = isi.open(tmp_path / "store")
    store.index()
    first = frame_of(store).calibration
    store.index(refit=True)
    again = frame_of(store).calibration
    assert again is not first
    assert again.questions == first.questions


def test_too_few_subjects_give_no_error_rather_than_a_guess(cohort: Cohort) -> None:
    store = isi.open(cohort.store, mode="r")
    assert frame_of(store).calibration is None
    assert store.info()["calibrated"] == []
    assert set(store.lookup(POINT, ASKED.stem).columns["error_mm"]) == {None}
    with pytest.raises(UsageError, match="not calibrated"):
        store.lookup(POINT, ASKED.stem, min_confidence=0.5)


def test_subjects_that_were_trained_on_measure_nothing(cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    store = isi.open(cohort.store, mode="r")
    lookup = Lookup(store.snapshot)
    everyone = {store.snapshot.scan_row(scan)["subject"] for scan in held_out_landmarks(lookup)}
    assert "sub-01" in everyone
    second = store.snapshot.voxels_of[COPIES[1].stem]  # the other session of the same subject
    monkeypatch.setattr(calibrating, "trained_on_voxels", lambda *_: {second})
    held_out = {store.snapshot.scan_row(scan)["subject"] for scan in held_out_landmarks(lookup)}
    assert held_out == everyone - {"sub-01"}


def test_subjects_of_the_split_train_measure_nothing(
    cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "split.csv"
    table.write_text("subject,split\nsub-02,train\nsub-03,test\n", encoding="utf-8")
    store = isi.create(tmp_path / "store")
    store.add(cohort.images, labels="{stem}_seg.nii.gz", metadata=table)
    from cohorts import add_random_encoder

    add_random_encoder(store.path)
    store.index()
    lookup = Lookup(store.snapshot)
    subjects = {store.snapshot.scan_row(scan)["subject"] for scan in held_out_landmarks(lookup)}
    assert "sub-02" not in subjects
    assert {"sub-01", "sub-03"} <= subjects
    monkeypatch.setattr(calibrating, "trained_on_voxels", TRAINED_ON)  # of a foreign encoder nothing is known
    subjects = {store.snapshot.scan_row(scan)["subject"] for scan in held_out_landmarks(lookup)}
    assert subjects == {"sub-03"}


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_min_confidence_on_the_command_line(calibrated: Path) -> None:
    asked = ("query", "-s", calibrated, "--point", ",".join(f"{v:.2f}" for v in POINT), "--scan", ASKED.stem, "--json")
    code, out, _ = run(*asked, "--min-confidence", "0.5")
    assert code == 0
    rows = json.loads(out)
    assert rows
    assert all(row["confidence"] >= 0.5 and row["error_mm"] <= row["error_95_mm"] for row in rows)
    code, _, err = run(*asked, "--min-confidence", "0.5", "--patches")
    assert code == 2
    assert "--min-confidence" in err
    assert run(*asked, "--min-confidence", "1.5")[0] == 2
