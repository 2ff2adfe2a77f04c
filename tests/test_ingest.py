"""`add`: what becomes of files, their labels and their metadata."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from affines import affine_of
from cohorts import COPIES, Cohort, tiny_scan, write_nifti
from scipy import ndimage

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import ScanRefused, UsageError
from isimed_index.ingest.report import Refusal
from isimed_index.ingest.take import label_centroids


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return isi.create(tmp_path / "store")


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class TestAdd:
    def test_is_idempotent_by_content(self, store: Store, tmp_path: Path):
        for seed in range(3):
            tiny_scan(tmp_path / "in" / f"s{seed}.nii.gz", seed)
        first = store.add(tmp_path / "in")
        assert (first.added, first.unchanged, first.refused) == (["s0", "s1", "s2"], [], [])
        generation = store.generation
        renamed = tiny_scan(tmp_path / "other" / "renamed.nii", 1)
        again = store.add([tmp_path / "in", renamed])
        assert (again.added, again.unchanged) == ([], ["s0", "s1", "s2", "s1"])
        assert store.generation == generation
        (note,) = again.notes  # of the one whose name does not say it
        assert note.endswith("stored under another name, and are counted as unchanged: renamed.nii is s1")
        assert note.startswith("1 files ")

    def test_twice_the_same_content_in_one_batch_is_one_scan(self, store: Store, tmp_path: Path):
        tiny_scan(tmp_path / "old" / "x.nii", 0)
        store.add(tmp_path / "old")
        tiny_scan(tmp_path / "new" / "x.nii", 1)  # gets the id new_x
        tiny_scan(tmp_path / "new" / "y.nii", 1)
        report = store.add(tmp_path / "new")
        assert (report.added, report.unchanged) == (["new_x"], ["new_x"])

    def test_labels_that_come_too_late_are_refused_by_name(self, store: Store, tmp_path: Path):
        image = nib.load(tiny_scan(tmp_path / "in" / "s.nii", 0))
        store.add(tmp_path / "in")
        write_nifti(tmp_path / "in" / "s_seg.nii", np.ones(image.shape, np.uint8), image.affine)
        report = store.add(tmp_path / "in", labels="{stem}_seg.nii")
        assert (report.added, report.unchanged) == ([], ["s"])
        assert [refusal.name for refusal in report.refused] == ["s.nii"]
        assert "without labels" in report.refused[0].reason

    def test_a_changed_label_map_of_a_stored_scan_is_refused_by_name(self, store: Store, tmp_path: Path):
        image = nib.load(tiny_scan(tmp_path / "in" / "s.nii", 0))
        labels = np.zeros(image.shape, np.uint8)
        labels[2:4], labels[5:7] = 3, 9

        def again(voxels: np.ndarray) -> tuple[list[str], list[str]]:
            write_nifti(tmp_path / "in" / "s_seg.nii", voxels, image.affine)
            report = store.add(tmp_path / "in", labels="{stem}_seg.nii")
            assert [file.refusal for file in report.files] == (report.refused or [None])
            return report.added, [f"{refusal.name}: {refusal.reason}" for refusal in report.refused]

        assert again(labels) == (["s"], [])
        assert again(labels) == ([], [])
        stored = store.sql("SELECT * FROM labels ORDER BY label").to_pylist()
        said = "s.nii: its label map differs from the stored one; a stored scan keeps its labels"
        moved, more, other = labels.copy(), labels.copy(), labels.copy()
        moved[2, 0, 0], moved[0, 0, 0] = 0, 3  # one voxel
        more[0, 0, 0] = 3
        other[labels == 9] = 8
        shifted = np.roll(labels, 1, axis=0)  # as many voxels, elsewhere
        for changed in (moved, more, other, shifted, np.zeros_like(labels)):
            assert again(changed) == ([], [said])
        assert store.sql("SELECT * FROM labels ORDER BY label").to_pylist() == stored
        assert store.add(tmp_path / "in" / "s.nii").refused == []  # without a label map nothing differs
        assert again(shifted) == ([], [said])
        store.delete("scan = 's'")
        assert again(shifted) == (["s"], [])
        assert again(shifted) == ([], [])

    def test_two_copies_with_different_labels_in_one_add(self, store: Store, tmp_path: Path):
        for place, name in enumerate(("a", "b", "c")):
            image = nib.load(tiny_scan(tmp_path / "in" / f"{name}.nii", 0))
            labels = np.zeros(image.shape, np.uint8)
            labels[min(place, 1)] = 1
            write_nifti(tmp_path / "in" / f"{name}_seg.nii", labels, image.affine)
        report = store.add(tmp_path / "in", labels="{stem}_seg.nii")
        assert (report.added, report.unchanged) == (["a"], ["a", "a"])
        assert [refusal.name for refusal in report.refused] == ["b.nii", "c.nii"]

    def test_ids_are_unique_within_an_add_and_across_adds(self, store: Store, tmp_path: Path):
        for seed, folder in enumerate("abc"):
            tiny_scan(tmp_path / folder / "scan.nii.gz", seed)
        assert store.add([tmp_path / "a", tmp_path / "b"]).added == ["a_scan", "b_scan"]
        assert store.add(tmp_path / "c").added == ["scan"]
        tiny_scan(tmp_path / "deeper" / "a" / "scan.nii", 7)
        tiny_scan(tmp_path / "deeper" / "b" / "scan.nii", 8)
        assert store.add(tmp_path / "deeper" / "a").added == ["a_scan-2"]
        assert store.add(tmp_path / "deeper" / "b").added == ["b_scan-2"]

    @pytest.mark.parametrize("workers", [1, 3])
    def test_more_files_than_a_batch_land_in_order(self, store: Store, tmp_path: Path, workers: int):
        for seed in range(19):
            tiny_scan(tmp_path / "in" / f"s{seed:02d}.nii", seed, (4, 4, 4))
        (tmp_path / "in" / "s05.nii").write_text("no image")
        report = store.add(tmp_path / "in", workers=workers)
        assert report.added == [f"s{n:02d}" for n in range(19) if n != 5]
        assert store.generation == 2
        assert store.scans().column("scan").to_pylist() == report.added

    def test_refusals_say_the_file_once(self, store: Store, tmp_path: Path):
        bad = table(tmp_path / "bad.nii", "not an image")
        (tmp_path / "empty").mkdir()
        report = store.add([bad, tmp_path / "empty", tiny_scan(tmp_path / "good.nii")])
        assert report.added == ["good"]
        assert [refusal.name for refusal in report.refused] == ["empty", "bad.nii"]
        assert report.refused[1] == Refusal(
            "bad.nii", "scan_refused", "this is not a NIfTI file", "convert the image to .nii.gz"
        )
        assert Refusal.of("x", ScanRefused("y.nii: broken")).reason == "y.nii: broken"

    def test_what_cannot_be_asked(self, store: Store, tmp_path: Path):
        scan = tiny_scan(tmp_path / "a.nii")
        for wrong in (
            {"labels": "{stem}_seg.nii", "spacing_mm": 2.0},
            {"workers": 0},
            {"labels": "no-stem.nii"},
            {"subject_from": "("},
            {"subject_from": "no group"},
            {"spacing_mm": -1.0},
        ):
            with pytest.raises(UsageError):
                store.add(scan, **wrong)
        with pytest.raises(UsageError, match="there is no file or folder gone"):
            store.add(tmp_path / "gone")
        assert store.scans().num_rows == 0
        assert not any((store.path / "scans").iterdir())

    def test_spacing_resamples(self, store: Store, tmp_path: Path):
        store.add(tiny_scan(tmp_path / "a.nii", shape=(12, 10, 9)), spacing_mm=6.0)
        row = store.scans().to_pylist()[0]
        assert [row[f"d{axis}_mm"] for axis in "xyz"] == pytest.approx([6.0] * 3)
        assert [row[f"n{axis}"] for axis in "xyz"] == [4, 3, 4]
        assert store.add(tmp_path / "a.nii", spacing_mm=6.0).unchanged == ["a"]

    def test_subjects_and_sessions(self, store: Store, tmp_path: Path):
        for seed, name in enumerate(("sub-07_ses-b_T1w", "IXI012-Guys-0700-T1", "plain")):
            tiny_scan(tmp_path / "in" / f"{name}.nii", seed)
        store.add(tmp_path / "in", subject_from=r"IXI(\d+)")
        assert {row["scan"]: (row["subject"], row["session"]) for row in store.scans().to_pylist()} == {
            "sub-07_ses-b_T1w": ("sub-07_ses-b_T1w", None),
            "IXI012-Guys-0700-T1": ("012", None),
            "plain": ("plain", None),
        }
        tiny_scan(tmp_path / "bids" / "sub-07_ses-b_T2w.nii", 9)
        store.add(tmp_path / "bids")
        row = store.sql("SELECT subject, session FROM scans WHERE scan = 'sub-07_ses-b_T2w'").to_pylist()[0]
        assert row == {"subject": "sub-07", "session": "ses-b"}

    def test_a_folder_per_patient_gives_each_its_subject(self, store: Store, tmp_path: Path):
        for seed, folder in enumerate(("sub-00", "sub-01/ses-b", "P012/anat", "other")):
            tiny_scan(tmp_path / "in" / folder / "T1.nii.gz", seed)
        store.add([tmp_path / "in" / "sub-00", tmp_path / "in"])
        found = {row["scan"]: (row["subject"], row["session"]) for row in store.scans().to_pylist()}
        assert found == {
            "sub-00_T1": ("sub-00", None),
            "ses-b_T1": ("sub-01", "ses-b"),
            "anat_T1": ("anat_T1", None),
            "other_T1": ("other_T1", None),
        }
        subjects = store.sql("SELECT subject FROM subjects ORDER BY subject").column("subject").to_pylist()
        assert subjects == ["anat_T1", "other_T1", "sub-00", "sub-01"]

    def test_a_subject_that_is_a_scan_id_stays_unique_over_adds(self, store: Store, tmp_path: Path):
        for seed, folder in enumerate("ab"):
            store.add(tiny_scan(tmp_path / folder / "T1.nii.gz", seed))
        assert store.scans().column("subject").to_pylist() == store.scans().column("scan").to_pylist() == ["T1", "b_T1"]

    def test_an_expression_finds_the_subject_in_the_path_below_the_folder(self, store: Store, tmp_path: Path):
        tiny_scan(tmp_path / "in" / "P012" / "v1" / "T1.nii.gz", 0)
        tiny_scan(tmp_path / "in" / "P013" / "v1" / "T1.nii.gz", 1)
        store.add(tmp_path / "in", subject_from=r"^(?P<subject>\w+)/(?P<session>v\d)/")
        rows = store.sql("SELECT scan, subject, session FROM scans ORDER BY scan").to_pylist()
        assert [tuple(row.values()) for row in rows] == [("v1_T1", "P012", "v1"), ("v1_T1-2", "P013", "v1")]

    def test_memory_holds_no_batch_of_volumes(self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        import gc

        from isimed_index.ingest import add as ingest
        from isimed_index.scans.scan import Scan

        for seed in range(6):
            tiny_scan(tmp_path / "in" / f"s{seed}.nii", seed)
        alive = []
        proposal = ingest.proposal

        def spy(*args):
            gc.collect()
            alive.append(sum(type(thing) is Scan for thing in gc.get_objects()))
            return proposal(*args)

        monkeypatch.setattr(ingest, "proposal", spy)
        store.add(tmp_path / "in")
        assert max(alive) <= 1


class TestLabels:
    def test_centroids_are_those_of_scipy(self):
        labels = np.random.default_rng(0).choice([0, 0, 2, 7, 1000], (9, 8, 7)).astype(np.int16)
        found = label_centroids(labels)
        assert sorted(found) == [2, 7, 1000]
        for label, (count, centre) in found.items():
            assert count == (labels == label).sum()
            np.testing.assert_allclose(centre, ndimage.center_of_mass(labels == label))
        assert label_centroids(np.zeros((3, 3, 3), np.uint8)) == {}

    @pytest.mark.parametrize("codes", ["RAS", "PIR"])
    def test_rows_are_in_mm_of_the_patient(self, store: Store, tmp_path: Path, codes: str):
        affine = affine_of((10, -5, 20), (1.5, 2, 3), (1, 1, 1), (0, 1, 2), (5, -40, 12), shear=0.2)
        rng = np.random.default_rng(1)
        labels = rng.choice([0, 3, 5], (10, 11, 12)).astype(np.uint8)
        write_nifti(tmp_path / "a.nii.gz", rng.integers(0, 99, labels.shape).astype(np.int16), affine, codes)
        seg = write_nifti(tmp_path / "a_seg.nii.gz", labels, affine, codes)
        names = table(tmp_path / "names.tsv", "index\tname\n3\tliver\n")
        report = store.add(tmp_path / "a.nii.gz", labels="{stem}_seg.nii.gz", label_names=names)
        rows = {row["label"]: row for row in store.sql("SELECT * FROM labels").to_pylist()}
        assert {label: row["name"] for label, row in rows.items()} == {3: "liver", 5: None}
        assert report.unnamed == [5]
        image = nib.load(seg)
        for label, row in rows.items():
            where = np.argwhere(np.asarray(image.dataobj) == label)
            centre = nib.affines.apply_affine(image.affine, where.mean(axis=0))
            np.testing.assert_allclose([row["x_mm"], row["y_mm"], row["z_mm"]], centre, atol=1e-3)
            assert row["voxels"] == len(where)
            volume = len(where) * abs(np.linalg.det(image.affine[:3, :3]))
            assert row["volume_mm3"] == pytest.approx(volume, rel=1e-4)

    def test_a_missing_or_misaligned_label_map_refuses_its_scan_alone(self, store: Store, tmp_path: Path):
        for seed, name in enumerate(("good", "lacks", "shifted")):
            tiny_scan(tmp_path / "in" / f"{name}.nii", seed)
        labels = np.ones((12, 10, 9), np.uint8)
        write_nifti(tmp_path / "in" / "good_seg.nii", labels, np.diag([2.0, 2.0, 3.0, 1.0]))
        write_nifti(tmp_path / "in" / "shifted_seg.nii", labels, np.diag([2.0, 2.0, 3.1, 1.0]))
        report = store.add(tmp_path / "in", labels="{stem}_seg.nii")
        assert report.added == ["good"]
        assert {refusal.name: refusal.reason.split(" ")[0] for refusal in report.refused} == {
            "lacks.nii": "its",
            "shifted.nii": "shifted_seg.nii:",
        }
        assert not any(str(tmp_path) in refusal.reason for refusal in report.refused)


class TestMetadata:
    def test_columns_of_scans_and_subjects(self, store: Store, cohort: Cohort, tmp_path: Path):
        rows = {row["scan"]: row for row in isi.open(cohort.store).scans().to_pylist()}
        assert [rows[copy.stem]["age"] for copy in COPIES] == [34.0, 34.0, 41.0, None, 58.0]
        assert rows["sub-03_T1w"]["site"] == "site1"
        subjects = isi.open(cohort.store).sql("SELECT subject, age FROM subjects ORDER BY subject").to_pylist()
        assert [row["age"] for row in subjects] == [34.0, 41.0, None, 58.0, 63.5]

    def test_coded_values_own_columns_and_precedence(self, store: Store, tmp_path: Path):
        for seed, name in enumerate(("a", "b", "sub-01_ses-2_T1w")):
            tiny_scan(tmp_path / "in" / f"{name}.nii", seed)
        path = table(
            tmp_path / "t.csv",
            "scan,subject,sex,split,session,modality,nx\na,P1,1,0,,MR,99\nb,P1,1,0,5,MR,99\nsub-01_ses-2_T1w,,2,1,,,99\n",
        )
        store.add(tmp_path / "in", metadata=path)
        rows = {row["scan"]: row for row in store.scans().to_pylist()}
        keys = ("subject", "session", "split", "modality", "nx", "sex")
        assert {scan: tuple(row[key] for key in keys) for scan, row in rows.items()} == {
            "a": ("P1", None, "0", "MR", 12, "1"),
            "b": ("P1", "5", "0", "MR", 12, "1"),
            "sub-01_ses-2_T1w": ("sub-01", "ses-2", "1", None, 12, "2"),
        }
        subjects = store.sql("SELECT subject, sex FROM subjects ORDER BY subject").to_pylist()
        assert subjects == [{"subject": "P1", "sex": "1"}, {"subject": "sub-01", "sex": "2"}]

    def test_metadata_that_come_too_late_are_refused_by_name(self, store: Store, tmp_path: Path):
        for seed, name in enumerate(("same", "other", "sub-01_T1w", "absent")):
            tiny_scan(tmp_path / "in" / f"{name}.nii", seed)
        first = table(tmp_path / "1.csv", "scan,age,code,site,split,score\nsame,34,x,a,,3\nother,41,007,b,test,4.5\n")
        assert store.add(tmp_path / "in", metadata=first).refused == []
        generation = store.generation
        assert store.add(tmp_path / "in", metadata=first).refused == []
        assert store.generation == generation
        second = table(
            tmp_path / "2.csv",
            "subject,age,code,site,split,sex,nx,score\nsame,34.0,n/a,a,,,99,3\n"
            "other,42,7,b,test,,99,4.50\nsub-01,50,,,,F,99,low\n",
        )
        report = store.add(tmp_path / "in", metadata=second)
        assert (len(report.unchanged), report.added) == (4, [])
        assert [refusal.name for refusal in report.refused] == ["other.nii", "sub-01_T1w.nii"]
        assert "(age, code)" in report.refused[0].reason
        assert "(score)" in report.refused[1].reason  # a column of numbers cannot say it
        assert "42" not in report.refused[0].reason
        assert report.refused[0].kind == "scan_refused"
        rows = {row["scan"]: row for row in store.scans().to_pylist()}
        assert (rows["other"]["age"], rows["other"]["code"], rows["sub-01_T1w"]["age"]) == (41.0, "007", None)

    def test_metadata_of_a_second_copy_in_one_add_are_refused_too(self, store: Store, tmp_path: Path):
        for name in ("a", "b"):
            tiny_scan(tmp_path / "in" / f"{name}.nii", 0)
        report = store.add(tmp_path / "in", metadata=table(tmp_path / "t.csv", "scan,site\na,x\nb,y\n"))
        assert (report.added, report.unchanged) == (["a"], ["a"])
        assert [refusal.name for refusal in report.refused] == ["b.nii"]

    @pytest.mark.parametrize(
        ("stored", "copy"),
        [
            ("case10", "case1"),
            ("case10", "ase10"),
            ("case10", "10"),
            ("case10", "case10-2"),
            ("case-2", "case"),  # a number follows only the folder and the name
            ("other_case", "case"),
        ],
    )
    def test_a_copy_whose_name_is_part_of_a_scans_gives_it_nothing(
        self, store: Store, tmp_path: Path, stored: str, copy: str
    ):
        store.add(tiny_scan(tmp_path / f"{stored}.nii", 0))
        path = tiny_scan(tmp_path / "in" / f"{copy}.nii", 0)
        report = store.add(path, metadata=table(tmp_path / "t.csv", f"scan,site\n{copy},theirs\n{stored},ours\n"))
        assert (report.added, report.unchanged) == ([], [stored])
        assert [refusal.name for refusal in report.refused] == [f"{copy}.nii"]
        assert "(site)" in report.refused[0].reason
        assert store.scans().to_pylist()[0].get("site") is None

    @pytest.mark.parametrize("volume", [None, 1])
    def test_names_that_a_file_got_among_others_are_its_own(self, store: Store, tmp_path: Path, volume: int | None):
        """Its folder before its name, and a number behind: the next add has the file alone, and knows it."""
        for seed, folder in enumerate(("x/a", "y/b", "z/b")):
            (tmp_path / folder).mkdir(parents=True)
            voxels = np.random.default_rng(seed).integers(0, 900, (6, 6, 6, *(() if volume is None else (3,))))
            nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), tmp_path / folder / "T1.nii")
        end = "" if volume is None else f"_vol-{volume}"
        every = store.add([tmp_path / "x", tmp_path / "y", tmp_path / "z"], volume=volume).added
        assert every == [f"a_T1{end}", f"b_T1{end}", f"b_T1-2{end}"]
        for path, scan in zip(("x/a", "y/b", "z/b"), every, strict=True):
            given = table(tmp_path / "t.csv", f"scan,site\n{scan},{scan}\n")
            assert store.add(tmp_path / path / "T1.nii", volume=volume, metadata=given).refused == []
        assert [row["site"] for row in store.scans().to_pylist()] == store.scans().column("scan").to_pylist()

    def test_a_hidden_scan_is_known_by_its_surrogate_alone(self, store: Store, tmp_path: Path):
        """Every surrogate holds the word `scan` and hexadecimal digits: a copy called so is not that scan's file."""
        hidden = {"surrogate_ids": True, "surrogate_key": tmp_path / "key"}
        (scan,) = store.add(tiny_scan(tmp_path / "Meier.nii", 0), **hidden).added
        copy = tiny_scan(tmp_path / "in" / f"{scan[:4]}.nii", 0)
        given = table(tmp_path / "t.csv", f"scan,site\n{scan[:4]},theirs\nMeier,ours\n")
        assert [refusal.name for refusal in store.add(copy, metadata=given, **hidden).refused] == [copy.name]
        assert store.add(tmp_path / "Meier.nii", metadata=given, **hidden).refused == []
        assert store.scans().column("site").to_pylist() == ["ours"]

    def test_two_adds_with_different_columns(self, store: Store, tmp_path: Path):
        tiny_scan(tmp_path / "a.nii", 0)
        tiny_scan(tmp_path / "b.nii", 1)
        store.add(tmp_path / "a.nii", metadata=table(tmp_path / "1.csv", "scan,score\na,3\n"))
        store.add(tmp_path / "b.nii", metadata=table(tmp_path / "2.csv", "scan,score,site\nb,2.5,x\n"))
        assert store.sql("SELECT score, site FROM scans ORDER BY scan").to_pylist() == [
            {"score": 3.0, "site": None},
            {"score": 2.5, "site": "x"},
        ]
        tiny_scan(tmp_path / "c.nii", 2)
        with pytest.raises(UsageError, match="another type"):
            store.add(tmp_path / "c.nii", metadata=table(tmp_path / "3.csv", "scan,score\nc,high\n"))
        assert store.scans().num_rows == 2


def test_a_missing_label_map_is_named_as_it_was_asked_for(tmp_path: Path):
    tiny_scan(tmp_path / "in" / "a.nii")
    done = isi.create(tmp_path / "store").add(tmp_path / "in", labels="../seg/{stem}.nii")
    assert done.refused[0].reason == "its label map ../seg/a.nii does not exist"
