"""`add` with surrogates in place of names, and with and without paths: names go no further, and tables still join."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cohorts import tiny_scan, write_nifti
from dicoms import noise, write_series

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.phi.identifiers import Identifiers
from isimed_index.phi.leaks import leaks

NAMES = Identifiers.of(["Erika", "20240229", "Mustermann"])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    return isi.create(tmp_path / "store")


def rows(store: Store) -> list[dict]:
    return sorted(store.scans().to_pylist(), key=lambda row: row["nx"])


def bids(root: Path) -> Path:
    """Two people, one of them twice, called after themselves; a label map beside one image."""
    folder = root / "Mustermann"
    for number, stem in enumerate(
        ("sub-Erika_ses-20240229_T1w", "sub-Erika_ses-20240310_T1w", "sub-Max_ses-20240229_T1w")
    ):
        subject, session = stem.split("_")[:2]
        tiny_scan(folder / subject / session / "anat" / f"{stem}.nii.gz", number, (12 + number, 10, 9))
    return folder


def test_ids_are_surrogates_and_tables_still_join(store: Store, tmp_path: Path):
    (tmp_path / "people.tsv").write_text("participant_id\tdiagnosis\nsub-Erika\tcase\nsub-Max\tcontrol\n")
    report = store.add(bids(tmp_path), surrogate_ids=True, metadata=tmp_path / "people.tsv")
    assert report.refused == []
    first, second, other = rows(store)
    assert all(row["scan"].startswith("scan-") for row in (first, second, other))
    assert first["subject"] == second["subject"] != other["subject"]
    assert len({first["session"], second["session"], other["session"]}) == 3  # the same date of two people
    assert [row["diagnosis"] for row in (first, second, other)] == ["case", "case", "control"]
    assert leaks(store._repository.storage, NAMES) == []
    assert "Erika" not in repr(report)
    again = store.add(bids(tmp_path), surrogate_ids=True, metadata=tmp_path / "people.tsv")
    assert (again.added, sorted(again.unchanged), again.refused) == ([], sorted(report.added), [])


def test_a_table_by_stem_joins_and_its_own_ids_are_hidden_too(store: Store, tmp_path: Path):
    tiny_scan(tmp_path / "in" / "Erika.nii.gz")
    tiny_scan(tmp_path / "in" / "Max.nii.gz", 1, (13, 10, 9))
    (tmp_path / "t.csv").write_text(
        "scan,subject,session,score\nErika,Mustermann,20240229,3\nMax,Mustermann,20240229,4\n"
    )
    store.add(tmp_path / "in", surrogate_ids=True, metadata=tmp_path / "t.csv")
    one, other = rows(store)
    assert (one["score"], other["score"]) == (3, 4)
    assert one["subject"] == other["subject"]
    assert one["session"] == other["session"]
    assert one["subject"].startswith("subject-")
    assert one["session"].startswith("session-")
    assert leaks(store._repository.storage, NAMES) == []


def test_labels_are_found_by_the_old_names(store: Store, tmp_path: Path):
    path = tiny_scan(tmp_path / "in" / "Erika.nii.gz")
    image = nib.load(path)
    write_nifti(tmp_path / "in" / "Erika_seg.nii.gz", np.ones(image.shape, np.uint8), image.affine)
    report = store.add(tmp_path / "in", labels="{stem}_seg.nii.gz", surrogate_ids=True)
    assert (len(report.added), report.refused) == (1, [])
    assert store.sql("select voxels from labels").to_pylist() == [{"voxels": 12 * 10 * 9}]
    assert leaks(store._repository.storage, NAMES) == []


def test_the_key_decides_and_other_content_gets_a_number(store: Store, tmp_path: Path):
    for number in range(2):
        tiny_scan(tmp_path / str(number) / "Erika.nii.gz", number)
    first = store.add(tmp_path / "0", surrogate_ids=True).added[0]
    second = store.add(tmp_path / "1", surrogate_ids=True).added[0]
    assert second == f"{first}-2"
    same = isi.create(tmp_path / "same").add(tmp_path / "1", surrogate_ids=True).added[0]
    other = (
        isi.create(tmp_path / "other").add(tmp_path / "0", surrogate_ids=True, surrogate_key=tmp_path / "k").added[0]
    )
    assert same == first != other


def test_names_that_a_regex_takes_from_dicom_are_hidden(store: Store, tmp_path: Path):
    write_series(tmp_path / "in" / "Erika" / "x", noise(), StudyDate="20240229")
    (tmp_path / "t.csv").write_text("subject,diagnosis\nErika,case\n")
    store.add(tmp_path / "in", subject_from="(Erika)", surrogate_ids=True, metadata=tmp_path / "t.csv")
    (row,) = rows(store)
    assert row["scan"].startswith("series-")
    assert row["subject"].startswith("subject-")
    assert row["diagnosis"] == "case"
    assert leaks(store._repository.storage, NAMES) == []


def test_paths_are_kept_only_when_told(store: Store, tmp_path: Path):
    path = tiny_scan(tmp_path / "a" / "x.nii.gz")
    write_series(tmp_path / "a" / "dicom" / "deep", noise())
    store.add(tmp_path / "a")
    assert "source" not in rows(store)[0]
    needle = Identifiers.of([str(tmp_path)])
    assert [finding for finding in leaks(store._repository.storage, needle) if finding.severity == "leak"] == []
    kept = isi.create(tmp_path / "kept")
    kept.add(tmp_path / "a", keep_source=True)
    assert {row["source"] for row in rows(kept)} == {str(path), str(tmp_path / "a" / "dicom" / "deep")}


def test_days_of_one_subject_keep_their_distance(store: Store, tmp_path: Path):
    for number, day in enumerate(("20240301", "20231225", "20240229")):
        write_series(tmp_path / str(number), noise((7 + number, 9, 6)), StudyDate=day, PatientID="one")
        store.add(tmp_path / str(number))  # the earlier study comes later
    days = [row["study_day"] for row in rows(store)]
    assert (days[0] - days[1], days[0] - days[2]) == (67, 1)
    elsewhere = isi.create(tmp_path / "elsewhere")
    elsewhere.add(tmp_path / "1")
    assert rows(elsewhere)[0]["study_day"] == days[1]


def test_patients_that_a_table_makes_one_subject_share_their_days(store: Store, tmp_path: Path):
    for number, day in enumerate(("20240229", "20240301")):
        write_series(tmp_path / "in" / f"P{number}", noise((7 + number, 9, 6)), StudyDate=day, PatientID=f"id{number}")
    store.add(tmp_path / "in", subject_from="(in)")
    days = [row["study_day"] for row in rows(store)]
    assert days[1] - days[0] == 1
