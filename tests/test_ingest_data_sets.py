"""`add` of data sets in known layouts: rows, label maps and splits in the store, and what must not be there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cohorts import tiny_scan, write_nifti
from data_sets import (
    AFFINE,
    BRATS_2021,
    BRATS_2023,
    PATIENT,
    SECRETS,
    SHAPE,
    STUDIES,
    autopet,
    bids,
    blocks,
    brats,
    msd,
    totalsegmentator,
    write_labels,
    write_text,
)

import isimed_index as isi
from isimed_index.api import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return isi.create(tmp_path / "store")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def rows(store: Store, *columns: str) -> Mapping[str, tuple]:
    found = store.scans().sort_by("scan").to_pylist()
    return {row["scan"]: tuple(row[column] for column in columns) for row in found}


def labels_of(store: Store, scan: str) -> dict[str | None, int]:
    found = store.sql(f"SELECT name, label FROM labels WHERE scan = '{scan}' ORDER BY label").to_pylist()
    return {row["name"]: row["label"] for row in found}


class TestBids:
    def test_rows_labels_and_subjects(self, store: Store, data: Path):
        report = store.add(bids(data))
        assert report.refused == []
        assert rows(store, "subject", "session", "modality", "sequence", "age", "group") == {
            "sub-01_ses-1_T1w": ("sub-01", "ses-1", "MR", "T1w", 34.0, "control"),
            "sub-01_ses-2_T1w": ("sub-01", "ses-2", "MR", "T1w", 34.0, "control"),
            "sub-02_T1w": ("sub-02", None, "MR", "T1w", 89.0, "patient"),
            "sub-02_T2w": ("sub-02", None, "MR", "T2w", 89.0, "patient"),
        }
        assert labels_of(store, "sub-02_T1w") == {"Gray Matter": 1, "White Matter": 2}
        assert labels_of(store, "sub-01_ses-1_T1w") == {"lesion": 1}
        people = store.sql('SELECT subject, sex, age, "group" FROM subjects ORDER BY subject').to_pylist()
        assert [tuple(row.values()) for row in people] == [
            ("sub-01", "F", 34.0, "control"),
            ("sub-02", "M", 89.0, "patient"),
        ]
        assert report.notes[0].startswith("data is laid out as BIDS: 4 images of 2 subjects")

    def test_left_and_right_kidneys_are_two_labels_where_they_were_drawn(self, store: Store, data: Path):
        root = bids(data)
        masks = root / "derivatives" / "seg" / "sub-02" / "anat"
        (masks / "sub-02_space-orig_dseg.nii.gz").unlink()
        write_labels(masks / "sub-02_label-kidney_desc-right_mask.nii.gz", blocks(0, 0, 0, 1))
        write_labels(masks / "sub-02_label-kidney_desc-left_mask.nii.gz", blocks(1))
        assert store.add(root).refused == []
        found = store.sql("SELECT name, voxels, x_mm FROM labels WHERE scan = 'sub-02_T1w' ORDER BY name").to_pylist()
        plane = SHAPE[1] * SHAPE[2]
        assert [tuple(row.values()) for row in found] == [("kidney left", plane, 2.0), ("kidney right", plane, 8.0)]

    def test_again_adds_nothing_and_refuses_nothing(self, store: Store, data: Path):
        store.add(bids(data))
        generation = store.generation
        again = store.add(data)
        assert (again.added, again.refused, len(again.unchanged)) == ([], [], 4)
        assert store.generation == generation

    def test_nothing_that_tells_who_or_when_is_in_any_file_of_the_store(self, store: Store, data: Path):
        store.add(bids(data / "bids"))
        store.add(autopet(data / "pet"))
        report = store.add(data)
        said = json.dumps([report.notes, [refusal.reason for refusal in report.refused]])
        files = [path for path in store.path.rglob("*") if path.is_file()]
        assert files
        for secret in (*SECRETS, *STUDIES, "1.3.6.1.4.1", str(data)):
            assert secret not in said
            for path in files:
                assert secret.encode() not in path.read_bytes()
                assert secret not in str(path.relative_to(store.path))
        # Parquet is compressed: the tables are searched as they are read.
        for table in ("scans", "subjects", "labels"):
            cells = json.dumps(store.sql(f"SELECT * FROM {table}").to_pylist(), default=str)
            assert not [secret for secret in (*SECRETS, *STUDIES) if secret in cells]

    def test_plain_files_are_what_they_were(self, store: Store, data: Path):
        store.add(bids(data), layout="files")
        found = rows(store, "subject", "session", "modality")
        assert found["sub-01_ses-1_T1w"] == ("sub-01", "ses-1", None)
        assert {"raw", "sub-02_space-orig_dseg", "sub-02_task-rest_bold"} <= found.keys()

    def with_a_series(self, data: Path) -> Path:
        """The data set, whose functional image has three volumes."""
        bold = bids(data) / "sub-02" / "func" / "sub-02_task-rest_bold.nii.gz"
        voxels = np.random.default_rng(0).integers(0, 99, (6, 6, 6, 3)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, AFFINE), bold)
        return data

    def test_side_cars_of_a_4d_series_with_one_volume(self, store: Store, data: Path):
        self.with_a_series(data)
        assert "sub-02_task-rest_bold_vol-1" in store.add(data, volume=1).added

    def test_a_number_of_a_volume_is_for_the_files_with_several(self, store: Store, data: Path):
        report = store.add(self.with_a_series(data), volume=1)
        assert report.refused == []
        assert sorted(report.added) == [
            "sub-01_ses-1_T1w",
            "sub-01_ses-2_T1w",
            "sub-02_T1w",
            "sub-02_T2w",
            "sub-02_task-rest_bold_vol-1",
        ]
        assert labels_of(store, "sub-02_T1w") == {"Gray Matter": 1, "White Matter": 2}
        assert store.sql("SELECT scan FROM scans WHERE volume IS NOT NULL").to_pylist() == [
            {"scan": "sub-02_task-rest_bold_vol-1"}
        ]

    def test_a_number_that_no_volume_has_is_refused(self, store: Store, data: Path):
        report = store.add(self.with_a_series(data), volume=99)
        assert len(report.added) == 4
        assert ["there is no volume 99" in refusal.reason for refusal in report.refused] == [True]

    def test_labels_by_a_pattern_go_before_those_of_the_data_set(self, store: Store, data: Path):
        root = bids(data)
        for path in sorted(root.glob("sub-*/**/anat/*.nii.gz")):
            shape = nib.load(path).shape
            write_labels(path.parent / f"{path.name.removesuffix('.nii.gz')}_own.nii.gz", np.full(shape, 7, np.uint8))
        report = store.add(root, labels="{stem}_own.nii.gz")
        assert len(report.added) == 4
        assert store.sql("SELECT DISTINCT label FROM labels").to_pylist() == [{"label": 7}]


class TestMsd:
    def test_splits_labels_and_names(self, store: Store, data: Path):
        report = store.add(msd(data / "Task09_Spleen"))
        assert report.refused == []
        assert rows(store, "subject", "split", "modality") == {
            "spleen_1": ("spleen_1", "test", "CT"),
            "spleen_10": ("spleen_10", "train", "CT"),
            "spleen_2": ("spleen_2", "train", "CT"),
        }
        assert labels_of(store, "spleen_2") == {"spleen": 1}
        assert labels_of(store, "spleen_1") == {}

    def test_4d_images_are_refused_by_name_or_one_volume_is_taken(self, store: Store, data: Path):
        root = msd(data)
        voxels = np.random.default_rng(0).integers(0, 99, (*SHAPE, 4)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, AFFINE), root / "imagesTr" / "spleen_2.nii.gz")
        index = json.loads((root / "dataset.json").read_text())
        index["modality"] = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
        (root / "dataset.json").write_text(json.dumps(index))
        report = store.add(root)
        assert [refusal.name for refusal in report.refused] == ["spleen_2.nii.gz"]
        report = store.add(root, volume=2)
        assert "spleen_2_vol-2" in report.added
        assert rows(store, "sequence", "modality")["spleen_2_vol-2"] == ("t1gd", "MR")
        assert labels_of(store, "spleen_2_vol-2") == {"spleen": 1}

    def test_a_missing_or_misaligned_label_map_refuses_its_image_alone(self, store: Store, data: Path):
        root = msd(data)
        (root / "labelsTr" / "spleen_2.nii.gz").unlink()
        write_labels(root / "labelsTr" / "spleen_10.nii.gz", blocks(1), np.diag([2.0, 2.0, 3.1, 1.0]))
        report = store.add(root)
        assert report.added == ["spleen_1"]
        reasons = {refusal.name: refusal.reason for refusal in report.refused}
        assert reasons["spleen_2.nii.gz"] == "its label map spleen_2.nii.gz does not exist"
        assert "not on the grid" in reasons["spleen_10.nii.gz"]

    def test_names_that_are_given_go_before_those_of_the_data_set(self, store: Store, data: Path, tmp_path: Path):
        store.add(msd(data), label_names=write_text(tmp_path / "n.csv", "label,name", "1,Milz"))
        assert labels_of(store, "spleen_2") == {"Milz": 1}

    def test_with_spacing_there_are_no_labels_and_that_is_said(self, store: Store, data: Path):
        report = store.add(msd(data), spacing_mm=4.0)
        assert len(report.added) == 3
        assert store.sql("SELECT count(*) AS n FROM labels").to_pylist() == [{"n": 0}]
        assert any("with --spacing its images get none" in note for note in report.notes)


class TestChallenges:
    def test_brats_of_two_years(self, store: Store, data: Path):
        brats(data / "TrainingData21", "BraTS2021_00000", BRATS_2021, "_", (1, 2, 4))
        brats(data / "TrainingData23", "BraTS-MET-00002-001", BRATS_2023, "-", (1, 2, 3))
        report = store.add(data)
        assert (report.refused, report.unnamed) == ([], [])
        assert rows(store, "subject", "session", "split")["BraTS-MET-00002-001-t2w"] == (
            "BraTS-MET-00002",
            "001",
            "train",
        )
        assert labels_of(store, "BraTS2021_00000_flair")["enhancing tumor"] == 4
        assert labels_of(store, "BraTS-MET-00002-001-t1c")["enhancing tumor"] == 3

    def test_autopet(self, store: Store, data: Path):
        report = store.add(autopet(data))
        assert report.refused == []
        found = rows(store, "subject", "session", "modality", "diagnosis", "age", "sex")
        assert found[f"{PATIENT}_1_SUV"] == (PATIENT, "1", "PT", "MELANOMA", 60.0, "F")
        assert labels_of(store, f"{PATIENT}_2_SUV") == {}  # the negative control: SEG is empty
        for kind, expected in (("SUV", {"lesion": 1}), ("CTres", {"lesion": 1}), ("CT", {})):
            assert labels_of(store, f"{PATIENT}_1_{kind}") == expected
        assert len(found) == 8
        again = store.add(data)  # an empty label map is not one that came too late
        assert (again.added, again.refused, len(again.unchanged)) == ([], [], 8)

    def test_refusals_of_files_with_one_name_tell_which_they_are_and_no_date(self, store: Store, data: Path):
        root = autopet(data)
        for study in (root / PATIENT).iterdir():
            (study / "PET.nii.gz").write_text("no image")
        report = store.add(root)
        assert [refusal.name for refusal in report.refused] == [f"{PATIENT}_{n}_PET" for n in (1, 2)]
        assert not any(study[:10] in refusal.reason for refusal in report.refused for study in STUDIES)


class TestTotalSegmentator:
    def test_masks_become_one_map_and_the_higher_number_wins(self, store: Store, data: Path):
        rng = np.random.default_rng(3)
        masks = {name: (rng.random(SHAPE) < 0.3).astype(np.uint8) for name in ("liver", "spleen", "aorta")}
        expected = np.zeros(SHAPE, np.uint8)
        for number, name in (
            (1, "spleen"),
            (5, "liver"),
            (52, "aorta"),
        ):  # the oracle: in rising order, over each other
            expected[masks[name] > 0] = number
        overlap = int((sum(masks.values()).astype(int) - (expected > 0)).sum())
        report = store.add(totalsegmentator(data, masks))
        assert report.refused == []
        found = store.sql("SELECT scan, name, label, voxels FROM labels ORDER BY scan, label").to_pylist()
        assert {(row["scan"], row["name"], row["label"]): row["voxels"] for row in found} == {
            (scan, name, number): int((expected == number).sum())
            for scan in ("s0000_ct", "s0004_ct")
            for number, name in ((1, "spleen"), (5, "liver"), (52, "aorta"))
        }
        assert {count for (count,) in rows(store, "label_overlap_voxels").values()} == {overlap}
        assert any(f"{2 * overlap} voxels of 2 scans lie in more than one mask" in note for note in report.notes)

    def test_masks_are_turned_with_their_scan(self, store: Store, data: Path):
        mask = np.zeros(SHAPE, np.uint8)
        mask[:3] = 1  # x grows to the right, so the least x is the left
        totalsegmentator(data, {}, ("s0000",))
        write_nifti(data / "s0000" / "segmentations" / "lung_left.nii.gz", mask, AFFINE, "LPI")
        store.add(data)
        (row,) = store.sql("SELECT name, x_mm, voxels FROM labels").to_pylist()
        centre = nib.affines.apply_affine(AFFINE, np.argwhere(mask).mean(axis=0))
        assert (row["name"], row["voxels"], row["x_mm"]) == ("lung_left", mask.sum(), pytest.approx(centre[0]))

    def test_a_mask_with_several_labels_refuses_its_scan(self, store: Store, data: Path):
        report = store.add(totalsegmentator(data, {"liver": blocks(1, 2)}, ("s0000",)))
        assert [(item.name, item.reason) for item in report.refused] == [
            ("s0000_ct", "liver.nii.gz: expected a mask of one structure, found labels 1 to 2")
        ]

    def test_splits_are_in_the_store(self, store: Store, data: Path):
        store.add(totalsegmentator(data, {"liver": blocks(1)}, ("s0000", "s0001", "s0002")))
        assert [split for (split,) in rows(store, "split").values()] == ["train", "validation", "test"]


class TestSplits:
    def test_a_subject_in_two_splits_is_refused_and_the_rest_lands(self, store: Store, data: Path):
        for split in ("TrainingData", "ValidationData"):
            for session in ("000", "001")[: 1 if split == "TrainingData" else 2]:
                case = f"BraTS-GLI-00001-{session if split == 'TrainingData' else '10' + session[-1]}"
                brats(data / split, case, BRATS_2023[:1], "-", (1,))
        brats(data / "TrainingData", "BraTS-GLI-00002-000", BRATS_2023[:1], "-", (1,))
        report = store.add(data)
        assert report.added == ["BraTS-GLI-00002-000-t1c"]
        assert len(report.refused) == 3
        assert {refusal.reason for refusal in report.refused} == {
            "its subject would be in more than one split (train, validation)"
        }

    def test_a_stored_subject_keeps_its_split(self, store: Store, data: Path):
        brats(data / "a_TrainingData", "BraTS-GLI-00001-000", BRATS_2023[:1], "-", None)
        brats(data / "b_ValidationData", "BraTS-GLI-00001-001", BRATS_2023[:1], "-", None)
        assert len(store.add(data / "a_TrainingData").added) == 1
        report = store.add(data / "b_ValidationData")
        assert (report.added, [refusal.name for refusal in report.refused]) == ([], ["BraTS-GLI-00001-001-t1c.nii.gz"])

    def test_subjects_of_two_data_sets_with_one_name_are_told_of(self, store: Store, data: Path):
        bids(data / "one")
        bids(data / "two")
        report = store.add(data)
        assert any(note.startswith("2 subjects are in more than one data set") for note in report.notes)

    def test_data_sets_are_told_apart_by_their_folders(self, store: Store, data: Path):
        for name in ("one", "two"):
            for place, path in enumerate(sorted(bids(data / name).glob("sub-*/**/anat/*T1w.nii.gz"))):
                tiny_scan(path, place + 1000 * (name == "two"))
        store.add(data, subject_from=r"(\w+/sub-\w+)/")
        assert {subject for (subject,) in rows(store, "subject").values()} == {
            f"{name}/sub-{number}" for name in ("one", "two") for number in ("01", "02")
        }


def test_two_data_sets_may_mean_other_things_by_one_column(store: Store, data: Path):
    for name, participants in (
        ("one", ("participant_id\tscore\tcode", "sub-01\t3\tx", "sub-02\t4.5\ty")),
        ("two", ("participant_id\tscore\tcode", "sub-01\thigh\t1", "sub-02\tlow\t2")),
    ):
        root = bids(data / name)
        write_text(root / "participants.tsv", *participants)
        for seed, path in enumerate(sorted(root.glob("sub-*/**/anat/*_T1w.nii.gz"))):
            tiny_scan(path, seed + 1000 * (name == "two"))
        (root / "sub-02" / "anat" / "sub-02_T2w.nii.gz").unlink()
    store.add(data / "one")
    report = store.add(data / "two")
    assert (len(report.added), report.refused) == (3, [])
    assert "columns that hold another type in the store than in this data set were left out: score" in report.notes
    assert rows(store, "score", "code")["sub-02_T1w"] == (4.5, "y")
    assert rows(store, "score", "code")["sub-02_T1w-2"] == (None, "2")


def test_a_folder_may_hold_data_sets_and_plain_files(store: Store, data: Path):
    msd(data / "Task09_Spleen")
    tiny_scan(data / "loose" / "spleen_2.nii.gz", 77)
    report = store.add(data)
    assert sorted(report.added) == ["loose_spleen_2", "spleen_1", "spleen_10", "spleen_2"]
    assert report.refused == []


@pytest.mark.parametrize("write", [bids, msd, autopet, lambda root: totalsegmentator(root, {"liver": blocks(1)})])
def test_a_data_set_is_read_by_any_path_and_once(store: Store, data: Path, write, monkeypatch: pytest.MonkeyPatch):
    write(data / "set")
    (data / "link").symlink_to("set")
    monkeypatch.chdir(data)
    first = store.add(["set", Path(), "link", data / "set" / ".." / "set"], subject_from=r"(nothing like it)")
    assert first.refused == []
    assert len(first.added) == len(set(first.added)) == store.scans().num_rows
    assert len(store.add("set").unchanged) == len(first.added)


def test_surrogate_ids_hide_the_names_of_a_data_set_and_keep_its_facts(store: Store, data: Path, tmp_path: Path):
    report = store.add(bids(data), surrogate_ids=True, surrogate_key=tmp_path / "key")
    assert not any("sub-" in scan for scan in report.added)
    ages = store.sql("SELECT subject, age FROM subjects ORDER BY age").to_pylist()
    assert [row["age"] for row in ages] == [34.0, 89.0]
    assert not any("sub-" in row["subject"] for row in ages)


def test_workers_take_data_sets_too(store: Store, data: Path):
    assert len(store.add(totalsegmentator(data, {"liver": blocks(1), "aorta": blocks(0, 1)}), workers=2).added) == 2
    assert labels_of(store, "s0004_ct") == {"liver": 5, "aorta": 52}


class TestLate:
    """Metadata for scans that are stored already."""

    def test_a_data_set_that_was_added_as_plain_files_gets_its_facts(self, store: Store, data: Path):
        store.add(bids(data) / "sub-02" / "anat")  # by its names alone
        assert rows(store, "subject", "modality") == dict.fromkeys(("sub-02_T1w", "sub-02_T2w"), ("sub-02", None))
        report = store.add(data)
        assert [refusal.reason for refusal in report.refused] == [
            "the scan is stored already, without labels; a stored scan is not given labels later"
        ]
        assert rows(store, "modality", "age", "group")["sub-02_T1w"] == ("MR", 89.0, "patient")
        (person,) = store.sql("SELECT sex, \"group\" FROM subjects WHERE subject = 'sub-02'").to_pylist()
        assert person == {"sex": "M", "group": "patient"}
        assert any(note.startswith("2 scans that are stored already got metadata") for note in report.notes)

    def test_empty_cells_are_filled_and_others_stay(self, store: Store, data: Path, tmp_path: Path):
        for seed, name in enumerate(("a", "b", "c")):
            tiny_scan(data / f"{name}.nii", seed)
        store.add(data, metadata=write_text(tmp_path / "1.csv", "scan,age,site,n", "a,30,x,1", "b,40,,2"))
        generation = store.generation
        late = write_text(
            tmp_path / "2.csv", "scan,age,site,n,split", "a,31,x,1,train", "b,40,y,2,train", "c,50,7,2.5,test"
        )
        report = store.add(data, metadata=late)
        assert [(item.name, "(age)" in item.reason) for item in report.refused] == [("a.nii", True)]
        assert rows(store, "age", "site", "n", "split") == {
            "a": (30.0, "x", 1.0, None),
            "b": (40.0, "y", 2.0, "train"),
            "c": (50.0, "7", 2.5, "test"),
        }
        assert store.generation == generation + 1
        ages = store.sql("SELECT subject, age FROM subjects ORDER BY subject").to_pylist()
        assert [row["age"] for row in ages] == [
            30.0,
            40.0,
            None,
        ]  # a table of scans says nothing of people who are known
        assert isi.check(store.path, read=1.0) == []
        again = store.add(data, metadata=late)
        assert (store.generation, len(again.refused), again.notes) == (generation + 1, 1, [])

    def test_a_copy_under_another_name_gives_nothing(self, store: Store, data: Path, tmp_path: Path):
        tiny_scan(data / "one" / "sub-01_T1w.nii", 0)
        tiny_scan(data / "two" / "sub-02_T1w.nii", 0)
        store.add(data / "one")
        table = write_text(tmp_path / "t.csv", "participant_id,age", "sub-02,40")
        report = store.add(data / "two", metadata=table)
        assert [refusal.name for refusal in report.refused] == ["sub-02_T1w.nii"]
        assert store.scans().to_pylist()[0].get("age") is None
