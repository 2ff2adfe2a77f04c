"""`add` of folders with DICOM: series become scans under surrogates, the rest is refused by name, nothing leaks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pydicom
import pytest
from cohorts import tiny_scan
from dicoms import CT, PHI, ROOT, noise, write_enhanced, write_series
from typer.testing import CliRunner

import isimed_index as isi
from isimed_cli.main import app
from isimed_index.api import Store
from isimed_index.errors import UsageError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    return isi.create(tmp_path / "store")


def a_pacs_export(folder: Path) -> None:
    """Two patients in nested folders, with a localizer, a report, a text file, a NIfTI file and a series with a gap."""
    study = f"{ROOT}1"
    write_series(folder / "DICOM" / "A1", noise(seed=1), series=f"{ROOT}11", study=study, EchoTime=4.5)
    write_series(folder / "DICOM" / "A1", noise(seed=2), series=f"{ROOT}12", study=study, sop_class=CT, KVP=120)
    write_series(folder / "DICOM" / "B", noise(seed=3), series=f"{ROOT}13", PatientID="another")
    write_series(folder / "DICOM" / "B", noise((7, 9, 8), seed=4), series=f"{ROOT}14")[4].unlink()
    localizer = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_series(folder / "DICOM" / "B", noise((7, 9, 1)), series=f"{ROOT}15", ImageType=localizer)
    write_enhanced(folder / "DICOM" / "B" / "enhanced", noise(seed=5), series=f"{ROOT}16")
    (folder / "DICOM" / "notes.txt").write_text("not an image")
    tiny_scan(folder / "T1.nii.gz")


def test_an_export_becomes_scans_and_the_rest_is_named(store: Store, tmp_path: Path):
    a_pacs_export(tmp_path / "in")
    report = store.add(tmp_path / "in", workers=2)
    assert report.added[0] == "T1"
    assert len(report.added) == 5
    assert all(scan.startswith("series-") for scan in report.added[1:])
    reasons = {item.reason.split(": ", 1)[-1] for item in report.refused}
    assert reasons == {
        "localizer (scout), not a slice of a volume",
        "1 slice is missing: expected 2.5 mm between slices, found 5 mm between slices 4 and 5 of 7",
    }
    rows = {row["scan"]: row for row in store.scans().to_pylist()}
    dicom = [rows[scan] for scan in report.added[1:]]
    assert sorted(row["modality"] for row in dicom) == ["CT", "MR", "MR", "MR"]
    assert {row["format"] for row in dicom} == {"DICOM"}
    assert sorted(row["kvp"] or 0 for row in dicom) == [0, 0, 0, 120]
    assert len({row["subject"] for row in dicom}) == 2
    assert all(row["subject"].startswith("subject-") and row["session"].startswith("study-") for row in dicom)
    assert rows["T1"]["modality"] is None


def test_is_idempotent_by_content_whatever_names_and_order(store: Store, tmp_path: Path):
    write_series(tmp_path / "a", noise(), series=f"{ROOT}1", study=f"{ROOT}2")
    first = store.add(tmp_path / "a")
    generation = store.generation
    assert store.add(tmp_path / "a").unchanged == first.added
    write_series(tmp_path / "b", noise(), series=f"{ROOT}1", study=f"{ROOT}2", shuffle=7, syntax="rle")
    assert store.add(tmp_path / "b").unchanged == first.added
    other_key = store.add(tmp_path / "b", surrogate_key=tmp_path / "other.key")
    assert other_key.unchanged == first.added
    assert store.generation == generation
    write_series(tmp_path / "c", noise(seed=9), series=f"{ROOT}1", study=f"{ROOT}2")
    assert store.add(tmp_path / "c").added == [f"{first.added[0]}-2"]


def test_single_files_given_by_name_are_sorted_into_series_too(store: Store, tmp_path: Path):
    paths = write_series(tmp_path / "in", noise())
    assert len(store.add(paths).added) == 1
    alone = write_enhanced(tmp_path / "enhanced.dcm", noise(seed=2))
    assert len(store.add(alone).added) == 1


def test_nothing_of_the_patient_is_in_the_store_or_in_what_is_said(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    a_pacs_export(tmp_path / "Mustermann_Erika")
    (tmp_path / "Mustermann_Erika" / "Mustermann.dcm").write_bytes(b"rubbish" * 99)
    runner = CliRunner()
    args = ["add", str(tmp_path / "Mustermann_Erika"), "--store", str(store.path), "--json", "--verbose"]
    done = runner.invoke(app, [*args, "--report", str(tmp_path / "report.json")])
    assert done.exit_code == 3
    assert len(json.loads((tmp_path / "report.json").read_text())["added"]) == 5
    texts = {name: text for name, text in PHI.items() if name != "BodyPartExamined"} | {"root": ROOT, "id": "another"}
    words = {word for text in texts.values() for word in text.replace("^", " ").split() if len(word) > 4}
    assert {"Mustermann", "MRN-4711-0815", "19640812", ROOT} <= words
    said = (done.output + (tmp_path / "report.json").read_text()).encode()
    files = [path for path in store.path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in [*files, None]:
        content = said if path is None else path.read_bytes()
        where = "what was said" if path is None else path.name
        assert not [word for word in words if word.encode() in content], where
        assert not [word for word in words if word.lower().encode() in content.lower()], where
    key = (tmp_path / "surrogate.key").read_bytes().strip()
    assert not any(key in path.read_bytes() for path in files)


def test_burned_in_text_keeps_a_series_out(store: Store, tmp_path: Path):
    path = write_series(tmp_path / "in", noise())[2]
    dataset = pydicom.dcmread(path)
    dataset.BurnedInAnnotation = "YES"
    dataset.save_as(path)
    report = store.add(tmp_path / "in")
    assert report.added == []
    assert "BurnedInAnnotation" in report.refused[0].reason


def test_metadata_and_subjects_by_name(store: Store, tmp_path: Path):
    write_series(tmp_path / "in" / "P012" / "x", noise(), series=f"{ROOT}1")
    (tmp_path / "table.csv").write_text("subject,diagnosis\nP012,healthy\n")
    store.add(tmp_path / "in", subject_from=r"(P\d+)", metadata=tmp_path / "table.csv")
    row = store.scans().to_pylist()[0]
    assert (row["subject"], row["diagnosis"]) == ("P012", "healthy")


def test_what_goes_with_files_only(store: Store, tmp_path: Path):
    write_series(tmp_path / "in", noise())
    report = store.add(tmp_path / "in", labels="{stem}_seg.nii.gz")
    assert "label maps of DICOM series are not read" in report.refused[0].reason
    with pytest.raises(UsageError, match="inside the store"):
        store.add(tmp_path / "in", surrogate_key=store.path / "key")
    assert store.add(tmp_path / "in", spacing_mm=2.0).added
    shutil.rmtree(tmp_path / "in")
    tiny_scan(tmp_path / "in" / "a.nii")
    (tmp_path / "surrogate.key").unlink()
    store.add(tmp_path / "in")
    assert not (tmp_path / "surrogate.key").exists()  # no DICOM, no key
