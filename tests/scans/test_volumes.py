"""One volume of several: SimpleITK and nibabel say which and where, and only one is held in memory."""

from __future__ import annotations

import bz2
import gzip
import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from dicoms import ROOT, grid, noise, write_enhanced, write_series
from judges import agrees_with, itk_image, itk_series
from pydicom.uid import generate_uid

from isimed_index.api import create
from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans.dicom.series import group
from isimed_index.scans.read import read_labels, read_scan, read_series
from isimed_index.scans.surrogate import Surrogates
from isimed_index.space import apply_affine, inverse

KEY = Surrogates(b"\x07" * 32)
RAS = np.diag([-1.0, -1, 1, 1]) @ grid()


def series_4d(volumes: int = 5) -> np.ndarray:
    """Voxels (x, y, z, volume) of odd shape, another noise in every volume."""
    return np.stack([noise(seed=seed) for seed in range(volumes)], axis=3)


def refused(path: Path, volume: int | None) -> str:
    with pytest.raises(ScanRefused) as caught:
        read_scan(path, "a", volume)
    return caught.value.line()


def nrrd(path: Path, voxels: np.ndarray, first: bool = False, encoding: str = "raw", **fields: str) -> Path:
    """A 4-D NRRD as 3D Slicer writes sequences (`first`: list axis first) and others time series (last)."""
    axes = ["({:.17g},{:.17g},{:.17g})".format(*column) for column in grid()[:3, :3].T]
    kinds, sizes = ["domain"] * 3, list(voxels.shape[:3])
    at = 0 if first else 3
    axes.insert(at, "none")
    kinds.insert(at, "list")
    sizes.insert(at, voxels.shape[3])
    header = {
        "type": "short",
        "dimension": "4",
        "space": "left-posterior-superior",
        "sizes": " ".join(map(str, sizes)),
        "space directions": " ".join(axes),
        "kinds": " ".join(kinds),
        "endian": "little",
        "encoding": encoding,
        "space origin": "({:.17g},{:.17g},{:.17g})".format(*grid()[:3, 3]),
    } | {key.replace("_", " "): value for key, value in fields.items()}
    body = (np.moveaxis(voxels, 3, 0) if first else voxels).astype("<i2").ravel(order="F").tobytes()
    pack = {"raw": bytes, "gzip": gzip.compress, "bzip2": bz2.compress}[encoding]
    lines = [f"{key}: {value}" for key, value in header.items() if value]
    path.write_bytes("\n".join(["NRRD0005", *lines, "", ""]).encode() + pack(body))
    return path


def metaimage(path: Path, voxels: np.ndarray, compressed: bool = False) -> Path:
    """A 4-D MetaImage as SimpleITK writes it: three oblique axes, and time."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T), isVector=False)
    spacing = np.linalg.norm(grid()[:3, :3], axis=0)
    direction = np.eye(4)
    direction[:3, :3] = grid()[:3, :3] / spacing
    image.SetSpacing([*spacing, 2.5])
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin([*grid()[:3, 3], 0.0])
    SimpleITK.WriteImage(image, str(path), compressed)
    return path


def nifti(path: Path, voxels: np.ndarray, kind=nib.Nifti1Image) -> Path:
    nib.save(kind(voxels, RAS), path)
    return path


def mgh(path: Path, voxels: np.ndarray) -> Path:
    nib.save(nib.MGHImage(voxels, RAS), path)
    return path


WRITERS = {
    "a.nii": nifti,
    "a.nii.gz": nifti,
    "two.nii.gz": lambda path, voxels: nifti(path, voxels, nib.Nifti2Image),
    "pair.hdr": lambda path, voxels: nifti(path, voxels, nib.Nifti1Pair),
    "a.mgh": mgh,
    "a.mgz": mgh,
    "a.mha": metaimage,
    "z.mha": lambda path, voxels: metaimage(path, voxels, True),
    "a.mhd": metaimage,
    "last.nrrd": nrrd,
    "first.nrrd": lambda path, voxels: nrrd(path, voxels, True),
    "z-last.nrrd": lambda path, voxels: nrrd(path, voxels, encoding="gzip"),
    "z-first.nrrd": lambda path, voxels: nrrd(path, voxels, True, "gzip"),
    "bz2-first.nrrd": lambda path, voxels: nrrd(path, voxels, True, "bzip2"),
}


def judged(path: Path, number: int) -> SimpleITK.Image:
    """The volume as SimpleITK extracts it; of what it does not read as 4-D, that which was written."""
    if path.name == "two.nii.gz":
        image = nib.load(path).slicer[..., number]
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), path.with_name("judged.nii"))
        return itk_image(path.with_name("judged.nii"))
    if path.suffix in (".nrrd", ".mgh", ".mgz"):  # ITK reads the one as vectors, and the other not at all
        image = SimpleITK.GetImageFromArray(np.ascontiguousarray(series_4d()[..., number].T))
        spacing = np.linalg.norm(grid()[:3, :3], axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((grid()[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(grid()[:3, 3].tolist())
        return image
    image = itk_image(path)
    assert image.GetDimension() == 4
    return SimpleITK.Extract(image, [*image.GetSize()[:3], 0], [0, 0, 0, number])


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("number", [0, 3, 4])
def test_the_volume_is_that_of_the_judge(tmp_path, name, number):
    path = WRITERS[name](tmp_path / name, series_4d())
    scan = read_scan(path, "a", number)
    assert agrees_with(scan, judged(path, number), np.random.default_rng(0), 300) < 1e-4
    np.testing.assert_array_equal(np.sort(scan.voxels, axis=None), np.sort(noise(seed=number), axis=None))
    assert (scan.attributes["volume"], scan.attributes["volumes"]) == (number, 5)


@pytest.mark.parametrize("name", WRITERS)
def test_none_chosen_or_none_there_is_refused_with_the_count(tmp_path, name):
    path = WRITERS[name](tmp_path / name, series_4d())
    line = refused(path, None)
    assert "expected a 3-D volume, found 4-D data of shape" in line
    assert ": 5 volumes. Next: take one of them with isimed add --volume N, where N is 0 to 4" in line
    assert "it has 5 volumes, numbered 0 to 4: there is no volume 5" in refused(path, 5)


@pytest.mark.parametrize("name", [name for name in WRITERS if ".mg" not in name])  # MGH always has four
def test_four_axes_with_one_volume_are_three(tmp_path, name):
    path = WRITERS[name](tmp_path / name, series_4d(1))
    scan = read_scan(path, "a")
    np.testing.assert_array_equal(np.sort(scan.voxels, axis=None), np.sort(noise(seed=0), axis=None))
    assert "volume" not in scan.attributes
    assert read_scan(path, "a", 0).digest == scan.digest
    assert "it has one volume, number 0: there is no volume 2" in refused(path, 2)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mgz", "z.mha", "z-last.nrrd", "last.nrrd", "z-first.nrrd"])
def test_a_file_cut_off_behind_the_volume_is_refused(tmp_path, name):
    path = WRITERS[name](tmp_path / name, series_4d())
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 3 // 4])
    assert "truncated" in refused(path, 0)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.mha", "z.mha", "z-last.nrrd", "z-first.nrrd"])
def test_the_other_volumes_are_never_held(tmp_path, name):
    voxels = np.zeros((64, 64, 64, 100), np.int16)  # 50 MiB
    voxels[1, 2, 3] = np.arange(100)
    path = WRITERS[name](tmp_path / name, voxels)
    read_scan(path, "warm up", 1)
    tracemalloc.start()
    scan = read_scan(path, "a", 42)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scan.voxels.max() == 42
    assert peak < 2**24 + 3 * scan.voxels.nbytes + 2**23  # a block, and what any volume takes


def test_an_interleaved_volume_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("isimed_index.scans.volume._BLOCK", 64)
    path = nrrd(tmp_path / "a.nrrd", series_4d(), True, "gzip")
    assert agrees_with(read_scan(path, "a", 3), judged(path, 3), np.random.default_rng(0)) < 1e-6


@pytest.mark.parametrize("kinds", ["vector domain domain domain", "RGB-color domain domain domain"])
def test_vectors_stay_refused(tmp_path, kinds):
    assert "several numbers a voxel" in refused(nrrd(tmp_path / "a.nrrd", series_4d(3), True, kinds=kinds), 0)


@pytest.mark.parametrize("kinds", ["", "domain domain domain domain"])
def test_a_first_axis_that_does_not_say_what_it_counts_is_refused(tmp_path, kinds):
    line = refused(nrrd(tmp_path / "a.nrrd", series_4d(3), True, kinds=kinds), 0)
    assert "does not say which axis counts volumes" in line


def test_five_axes_are_refused(tmp_path):
    path = nifti(tmp_path / "a.nii", np.zeros((4, 5, 6, 1, 3), np.float32))
    assert "found 5-D data of shape 4×5×6×1×3" in refused(path, 0)


def test_time_that_runs_through_space_is_refused(tmp_path):
    path = metaimage(tmp_path / "a.mha", series_4d())
    raw = path.read_bytes()
    at = raw.index(b"TransformMatrix = ") + len(b"TransformMatrix = ")
    words = raw[at : raw.index(b"\n", at)].split()
    words[3] = b"0.5"
    path.write_bytes(raw[:at] + b" ".join(words) + raw[raw.index(b"\n", at) :])
    assert "time runs through space" in refused(path, 0)


def test_a_label_map_of_several_volumes_is_refused(tmp_path):
    scan = read_scan(nifti(tmp_path / "a.nii.gz", series_4d()), "a", 2)
    nifti(tmp_path / "s.nii.gz", series_4d())
    with pytest.raises(ScanRefused, match="expected a 3-D label map, found 4-D") as caught:
        read_labels(tmp_path / "s.nii.gz", scan, {})
    assert "--volume" not in caught.value.line()
    nifti(tmp_path / "one.nii.gz", (noise() > 0).astype(np.uint8))
    assert read_labels(tmp_path / "one.nii.gz", scan, {}).voxels.shape == scan.shape


class TestSeries:
    def read(self, folder: Path, volume: int | None):
        ((series,), left) = group(sorted(path for path in folder.rglob("*") if path.is_file()), KEY)
        assert not left
        return read_series(series, "a", volume)

    def echoes(self, folder: Path, tag: str = "EchoTime", values=(2.5, 10, 4.9)) -> list[list[Path]]:
        """One series whose volumes differ in one number; in no order of it."""
        uid, study, frame = (generate_uid(ROOT) for _ in range(3))
        tags = {"FrameOfReferenceUID": frame}
        return [
            write_series(
                folder / str(n),
                noise(seed=n),
                series=uid,
                study=study,
                **tags,
                **{tag: value},
                shuffle=n,
                scaling=scale,
            )
            for n, (value, scale) in enumerate(zip(values, [[(1, 0)], [(2, 1)], [(1, 0)]], strict=False))
        ]

    @pytest.mark.parametrize("tag", ["EchoTime", "TemporalPositionIdentifier", "DiffusionBValue", "AcquisitionNumber"])
    def test_classic_files(self, tmp_path, tag):
        values = (2.5, 10, 4.9) if tag == "EchoTime" else (2, 10, 3)  # as texts, 10 would come first
        paths = self.echoes(tmp_path, tag, values)
        for number, written in enumerate((0, 2, 1)):
            scan = self.read(tmp_path, number)
            assert agrees_with(scan, itk_series(paths[written]), np.random.default_rng(1)) < 1e-6
            assert scan.attributes["volume_by"] == tag
            assert scan.attributes["volume_value"] == values[written]
            assert (scan.attributes["volume"], scan.attributes["volumes"]) == (number, 3)
        with pytest.raises(ScanRefused, match=r"18 images at 6 places; they differ in .*: 3 volumes") as caught:
            self.read(tmp_path, None)
        assert "isimed add --volume N, where N is 0 to 2" in caught.value.line()
        with pytest.raises(ScanRefused, match="it has 3 volumes, numbered 0 to 2: there is no volume 3"):
            self.read(tmp_path, 3)

    def test_an_enhanced_file(self, tmp_path):
        voxels = np.concatenate([noise(seed=1), noise(seed=2)], axis=2)
        tags = [{"FrameContentSequence": {"TemporalPositionIndex": 1 + n // 6}} for n in range(12)]
        write_enhanced(tmp_path / "e", voxels, places=[*range(6), *range(6)], frame_tags=tags)
        for number in (0, 1):
            plain = write_series(tmp_path / f"plain{number}", noise(seed=1 + number))
            scan = self.read(tmp_path / f"plain{number}", None)
            assert self.read_one(tmp_path / "e", number).digest == scan.digest
            assert len(plain) == 6

    def read_one(self, path: Path, volume: int):
        ((series,), _) = group([path], KEY)
        return read_series(series, "a", volume)

    def test_one_volume_has_no_other(self, tmp_path):
        write_series(tmp_path, noise())
        assert "volume" not in self.read(tmp_path, 0).attributes
        with pytest.raises(ScanRefused, match="it has one volume, number 0: there is no volume 1"):
            self.read(tmp_path, 1)

    def test_what_is_not_clear_is_refused_with_numbers(self, tmp_path):
        """Two dimensions at once, an image too many, and two numbers that sort the images differently."""
        uid, study, frame = (generate_uid(ROOT) for _ in range(3))
        for n, (echo, time) in enumerate([(1, 1), (1, 2), (2, 1), (2, 2)]):
            tags = {"EchoTime": echo, "TemporalPositionIdentifier": time, "FrameOfReferenceUID": frame}
            write_series(tmp_path / str(n), noise(seed=n), series=uid, study=study, **tags)
        with pytest.raises(ScanRefused, match=r"24 images at 6 places; they differ in EchoTime \(1, 2\), Temporal"):
            self.read(tmp_path, 0)
        more = self.echoes(tmp_path / "more")
        more[0][0].unlink()
        with pytest.raises(ScanRefused, match=r"17 images at 6 places; they differ in EchoTime"):
            self.read(tmp_path / "more", 0)


class TestAdd:
    def test_two_volumes_of_a_file_are_two_scans(self, tmp_path):
        path = nifti(tmp_path / "perfusion.nii.gz", series_4d())
        store = create(tmp_path / "s.isimed")
        (line,) = [item.next_step for item in store.add(path).refused]
        assert "--volume N, where N is 0 to 4" in line
        assert store.add(path, volume=3).added == ["perfusion_vol-3"]
        assert store.add(path, volume=0).added == ["perfusion_vol-0"]
        again = store.add(path, volume=3)
        assert (again.added, again.unchanged) == ([], ["perfusion_vol-3"])
        rows = store.sql("SELECT scan, subject, volume FROM scans ORDER BY scan").to_pylist()
        assert rows == [
            {"scan": "perfusion_vol-0", "subject": "perfusion_vol-0", "volume": 0},
            {"scan": "perfusion_vol-3", "subject": "perfusion_vol-3", "volume": 3},
        ]
        with pytest.raises(UsageError, match="from 0"):
            store.add(path, volume=-1)
        assert [item.reason for item in store.add(path, volume=5).refused] == [
            "it has 5 volumes, numbered 0 to 4: there is no volume 5"
        ]

    def test_files_of_one_name_keep_the_number(self, tmp_path):
        store = create(tmp_path / "s.isimed")
        for folder, turn in (("x", 1), ("y", -1)):
            (tmp_path / folder).mkdir()
            path = nifti(tmp_path / folder / "T1.nii", turn * series_4d())
            store.add(path, volume=1)
        rows = store.sql("SELECT scan, subject FROM scans ORDER BY scan").to_pylist()
        assert [tuple(row.values()) for row in rows] == [("T1_vol-1", "T1_vol-1"), ("y_T1_vol-1", "y_T1_vol-1")]

    def test_volumes_of_files_of_one_name_are_never_one_subject(self, tmp_path):
        """Nothing in the store says which file a volume came from: two people's `T1` differ in the folder alone."""
        store = create(tmp_path / "s.isimed")
        for turn, (folder, volume) in enumerate((("x/a", 0), ("y/a", 1), ("y/a", 0), ("z/a", 0), ("z/a", 1))):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            path = nifti(tmp_path / folder / "T1.nii.gz", series_4d() * {"x": 1, "y": -1, "z": 2}[folder[0]])
            assert len(store.add(path, volume=volume).added) == 1, turn
        rows = store.sql("SELECT scan, subject FROM scans ORDER BY scan").to_pylist()
        assert [row["scan"] for row in rows] == ["T1_vol-0", "T1_vol-1", "a_T1_vol-0", "a_T1_vol-0-2", "a_T1_vol-1"]
        assert [row["subject"] for row in rows] == [row["scan"] for row in rows]
        store.purge("T1_vol-0")
        assert store.scans().column("scan").to_pylist().count("T1_vol-1") == 1

    def test_an_expression_keeps_volumes_of_a_person_together(self, tmp_path):
        store = create(tmp_path / "s.isimed")
        (tmp_path / "in" / "P012").mkdir(parents=True)
        nifti(tmp_path / "in" / "P012" / "T1.nii.gz", series_4d())
        for volume in (0, 1):
            store.add(tmp_path / "in", volume=volume, subject_from=r"^(P\d+)/")
        assert store.sql("SELECT DISTINCT subject FROM scans").to_pylist() == [{"subject": "P012"}]

    def test_a_table_keeps_volumes_of_a_person_together(self, tmp_path):
        store = create(tmp_path / "s.isimed")
        (tmp_path / "t.csv").write_text("scan,subject\nperfusion,P7\n")
        path = nifti(tmp_path / "perfusion.nii.gz", series_4d())
        for volume in (0, 3):
            assert store.add(path, volume=volume, metadata=tmp_path / "t.csv").refused == []
        assert store.scans().column("subject").to_pylist() == ["P7", "P7"]

    def test_tables_and_names_say_whose_a_volume_is(self, tmp_path):
        store = create(tmp_path / "s.isimed")
        (tmp_path / "t.csv").write_text("scan,sex,volume\nperfusion,F,12.5\n")
        store.add(nifti(tmp_path / "perfusion.nii.gz", series_4d()), volume=3, metadata=tmp_path / "t.csv")
        store.add(nifti(tmp_path / "sub-07_bold.nii.gz", -series_4d()), volume=3)
        rows = store.sql("SELECT scan, subject, volume, sex FROM scans ORDER BY scan").to_pylist()
        assert [tuple(row.values()) for row in rows] == [
            ("perfusion_vol-3", "perfusion_vol-3", 3, "F"),
            ("sub-07_bold_vol-3", "sub-07", 3, None),
        ]

    def test_a_folder_of_both_kinds(self, tmp_path):
        (tmp_path / "in").mkdir()
        nifti(tmp_path / "in" / "four.nii", series_4d())
        nifti(tmp_path / "in" / "three.nii", noise(seed=9))
        store = create(tmp_path / "s.isimed")
        assert sorted(store.add(tmp_path / "in", volume=0).added) == ["four_vol-0", "three"]
        assert store.sql("SELECT volume FROM scans ORDER BY scan").column(0).to_pylist() == [0, None]

    def test_the_stored_voxels_are_those_of_the_volume(self, tmp_path):
        path = nifti(tmp_path / "a.nii.gz", series_4d())
        store = create(tmp_path / "s.isimed")
        store.add(path, volume=2)
        from isimed_index.scans.chunks import open_chunks

        stored = open_chunks(store.snapshot.chunks_path("a_vol-2"), "a_vol-2")
        judge = nib.load(path)
        index = np.random.default_rng(0).integers(0, judge.shape[:3], (200, 3))
        at = np.rint(apply_affine(inverse(stored.affine) @ judge.affine, index)).astype(int)
        found = stored.voxels()[tuple(at.T)]
        np.testing.assert_array_equal(found, np.asarray(judge.dataobj)[..., 2][tuple(index.T)])
