"""Analyze 7.5, whose axes the user states: nibabel judges voxels and scaling, places are written down by hand."""

from __future__ import annotations

import gzip
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from cohorts import write_nifti
from dicoms import noise

import isimed_index as isi
from isimed_cli.main import main
from isimed_index.errors import ScanRefused, UsageError
from isimed_index.ingest.options import AddOptions
from isimed_index.scans.read import read_labels, read_scan
from isimed_index.space import AXIS_CODES, apply_affine, inverse

TYPES = ["u1", "i2", "i4", "f4", "f8"]
EDGES = (0.7, 0.9, 2.5)
# Where a step of 1 mm along an axis leads, in RAS+ mm, written down by hand.
STEP = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
CODES = sorted(
    "".join(letters) for sides in permutations(("RL", "AP", "SI")) for letters in product(*sides)
)  # the six orders of axes, and two ways along each


def write(path: Path, voxels: np.ndarray, kind=nib.AnalyzeImage, big: bool = False, **fields) -> Path:
    """A pair as nibabel writes it, with some fields of its header changed; the path of its header."""
    image = kind(voxels, np.diag([*EDGES, 1]), kind.header_class(endianness=">" if big else "<"))
    image.header.set_data_dtype(voxels.dtype)
    image.to_filename(path)
    path.with_suffix(".mat").unlink(missing_ok=True)
    return edited(path, **fields)


def edited(path: Path, **fields) -> Path:
    raw = path.read_bytes()
    header = nib.Spm99AnalyzeHeader(raw, check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock)
    return path


def refused(path: Path, codes: str | None = "LAS", volume: int | None = None) -> str:
    with pytest.raises(ScanRefused) as caught:
        read_scan(path, "a", volume, codes)
    assert caught.value.next_step
    return f"{caught.value.line()} | {caught.value.next_step}"


def by_hand(codes: str, index, zero) -> np.ndarray:
    """The place of a voxel of the file: so many steps from the voxel that is at 0, each along its own direction."""
    steps = zip(index, zero, EDGES, codes, strict=True)
    return sum((at - at_zero) * edge * np.array(STEP[code]) for at, at_zero, edge, code in steps)


def assert_lies(scan, voxels: np.ndarray, codes: str, zero) -> None:
    """Every voxel of the file has its value where it lies by hand."""
    index = np.argwhere(np.ones(voxels.shape, bool))
    places = np.array([by_hand(codes, one, zero) for one in index])
    nearest = np.rint(apply_affine(inverse(scan.affine), places)).astype(int)
    np.testing.assert_allclose(apply_affine(scan.affine, nearest), places, atol=1e-5)
    np.testing.assert_array_equal(scan.voxels[tuple(nearest.T)], voxels[tuple(index.T)])


def test_there_are_48_codes():
    assert len(CODES) == 48
    assert sorted(AXIS_CODES) == CODES


@pytest.mark.parametrize("codes", CODES)
def test_every_voxel_lies_where_the_stated_axes_lead(tmp_path: Path, codes: str):
    voxels = noise((4, 5, 3))
    scan = read_scan(write(tmp_path / "a.hdr", voxels), "a", analyze_axes=codes)
    assert_lies(scan, voxels, codes, (1.5, 2.0, 1.0))  # the middle of the volume is at 0
    assert scan.orientation == "RAS"
    assert scan.attributes == {
        "source_format": "Analyze 7.5",
        "source_orientation": codes,
        "affine_source": "stated axes, centre of the volume",
        "stated_orientation": codes,
    }


@pytest.mark.parametrize(
    ("codes", "expected"), [("LAS", (-1.75, 1.8, -3.75)), ("RAS", (1.75, 1.8, -3.75)), ("PLI", (-1.8, -1.75, 3.75))]
)
def test_left_is_left_in_another_program(tmp_path: Path, codes: str, expected):
    """The file's first voxel, by SimpleITK from our export: in LPS, x grows to the left."""
    voxels = np.zeros((6, 5, 4), np.int16)
    voxels[0, 0, 0] = 100
    store = isi.create(tmp_path / "s.isimed")
    assert not store.add(write(tmp_path / "a.hdr", voxels), analyze_axes=codes).refused
    store.export_scan("a", tmp_path / "out.nii.gz")
    image = SimpleITK.ReadImage(str(tmp_path / "out.nii.gz"))
    (bright,) = np.argwhere(SimpleITK.GetArrayViewFromImage(image).transpose(2, 1, 0) == 100)
    place = np.array(image.TransformIndexToPhysicalPoint([int(at) for at in bright]))
    np.testing.assert_allclose(place, expected, atol=1e-5)
    row = store.sql("SELECT orientation, stated_orientation, format FROM scans").to_pylist()
    assert row == [{"orientation": codes, "stated_orientation": codes, "format": "Analyze 7.5"}]


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
def test_voxels_are_those_that_nibabel_reads(tmp_path: Path, dtype: str, big: bool):
    voxels = noise(dtype=np.uint8, low=0, high=255).astype(dtype)
    path = write(tmp_path / "a.hdr", voxels, big=big)
    judge = nib.AnalyzeImage.from_filename(path)
    assert (judge.header.endianness, judge.get_data_dtype().kind) == (">" if big else "<", np.dtype(dtype).kind)
    for name in ("a.hdr", "a.img"):
        scan = read_scan(tmp_path / name, "a", analyze_axes="RAS")
        np.testing.assert_array_equal(scan.voxels, np.asarray(judge.dataobj))
        assert scan.voxels.dtype == np.dtype(dtype)
    assert (scan.slope, scan.intercept) == (1, 0)


@pytest.mark.parametrize("slope", [2.5, -0.5, 0.0, np.nan, np.inf])
def test_the_scale_factor_is_that_of_spm(tmp_path: Path, slope: float):
    path = write(tmp_path / "a.hdr", noise(), nib.Spm99AnalyzeImage, scl_slope=slope)
    judge = nib.Spm99AnalyzeImage.from_filename(path)
    scan = read_scan(path, "a", analyze_axes="RAS")
    np.testing.assert_array_equal(scan.values(), np.asarray(judge.dataobj, np.float32))
    assert scan.slope == (slope if np.isfinite(slope) and slope else 1)


@pytest.mark.parametrize(
    "origin", [(3, 4, 5), (-6, 1, 11), (1, 0, 0), (0, 0, 0), (14, 1, 1), (3, -9, 1), (0x4142,) * 3]
)
@pytest.mark.parametrize("codes", ["LAS", "RAS"])
def test_the_origin_is_that_of_spm(tmp_path: Path, origin, codes: str):
    """nibabel takes the first axis to grow to the left; it does not go by the axes that are stated here."""
    voxels = noise()
    path = write(tmp_path / "a.hdr", voxels, nib.Spm99AnalyzeImage, origin=[*origin, 0, 0])
    judge = nib.Spm99AnalyzeImage.from_filename(path).affine
    mirror = np.diag([1.0 if codes == "LAS" else -1.0, 1, 1, 1])
    scan = read_scan(path, "a", analyze_axes=codes)
    assert_lies(scan, voxels, codes, np.linalg.inv(judge)[:3, 3])
    np.testing.assert_allclose(
        nib.as_closest_canonical(nib.Nifti1Image(voxels, mirror @ judge)).affine, scan.affine, atol=1e-5
    )
    used = origin in ((3, 4, 5), (-6, 1, 11), (1, 0, 0))
    assert scan.attributes["affine_source"] == "stated axes, " + ("SPM origin" if used else "centre of the volume")


@pytest.mark.parametrize("zipped", [(".hdr",), (".img",), (".hdr", ".img")])
def test_compressed_pairs(tmp_path: Path, zipped):
    plain = read_scan(write(tmp_path / "a.hdr", noise()), "a", analyze_axes="LPI")
    for suffix in zipped:
        path = tmp_path / f"a{suffix}"
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    header = next(tmp_path.glob("a.hdr*"))
    assert read_scan(header, "a", analyze_axes="LPI").digest == plain.digest
    data = next(tmp_path.glob("a.img*"))
    if ".img" in zipped:
        data.write_bytes(data.read_bytes()[:-6])
        assert "truncated" in refused(header)


def test_one_volume_of_several(tmp_path: Path):
    voxels = np.stack([noise(seed=seed) for seed in range(3)], axis=3)
    path = write(tmp_path / "a.hdr", voxels)
    assert "3 volumes" in refused(path)
    assert "no volume 3" in refused(path, volume=3)
    scan = read_scan(path, "a", 1, "RAS")
    np.testing.assert_array_equal(scan.voxels, voxels[..., 1])
    assert (scan.attributes["volume"], scan.attributes["volumes"]) == (1, 3)
    one = read_scan(write(tmp_path / "b.hdr", voxels[..., :1]), "b", analyze_axes="RAS")
    assert one.shape == voxels.shape[:3]


def test_unstated_axes_are_refused_and_the_way_out_is_named(tmp_path: Path):
    line = refused(write(tmp_path / "a.hdr", noise()), None)
    assert "which side of the patient is left" in line
    assert "isimed add --analyze-axes" in line


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"datatype": 0}, "found 0"),
        ({"datatype": 1}, "1-bit"),
        ({"datatype": 32}, "complex"),
        ({"datatype": 128}, "RGB"),
        ({"datatype": 132}, "found 132"),
        ({"bitpix": 8}, "int16 and have 8 bits"),
        ({"pixdim": [0, 0.7, 0, 2.5, 0, 0, 0, 0]}, "0.7×0×2.5"),
        ({"pixdim": [0, 0.7, -1, 2.5, 0, 0, 0, 0]}, "0.7×-1×2.5"),
        ({"pixdim": [0, np.nan, 1, 2.5, 0, 0, 0, 0]}, "nan×1×2.5"),
        ({"pixdim": [0, 1, 1, np.inf, 0, 0, 0, 0]}, "1×1×inf"),
        ({"vox_units": b"cm"}, "another unit than mm"),
        ({"funused2": 5.0}, "funused2"),
        ({"dim": [3, 7, 9, 0, 0, 0, 0, 0]}, "empty"),
        ({"dim": [3, 7, -9, 6, 0, 0, 0, 0]}, "empty"),
        ({"dim": [2, 7, 9, 0, 0, 0, 0, 0]}, "2-D"),
        ({"dim": [5, 7, 3, 2, 3, 3, 0, 0]}, "5-D"),
        ({"dim": [3, 700, 900, 600, 0, 0, 0, 0]}, "truncated"),
        ({"dim": [9, 7, 9, 6, 0, 0, 0, 0]}, "not a NIfTI file"),
        ({"vox_offset": -8}, "byte -8"),
        ({"vox_offset": 0.5}, "byte 0.5"),
        ({"vox_offset": 100}, "truncated"),
        ({"vox_offset": np.nan}, "byte nan"),
    ],
)
def test_what_a_header_cannot_say_is_refused(tmp_path: Path, fields, says: str):
    path = write(tmp_path / "a.hdr", noise())
    read_scan(path, "a", analyze_axes="LAS")
    assert says in refused(edited(path, **fields))


@pytest.mark.parametrize("unit", [b"", b"mm", b"MM\0x", b"mm  "])
def test_lengths_in_mm(tmp_path: Path, unit: bytes):
    np.testing.assert_allclose(
        read_scan(write(tmp_path / "a.hdr", noise(), vox_units=unit), "a", analyze_axes="RAS").spacing_mm, EDGES
    )


def test_a_mat_file_beside_it_is_not_contradicted(tmp_path: Path):
    voxels = noise()
    image = nib.Spm99AnalyzeImage(voxels, np.diag([-2.0, 2, 2, 1]))
    image.to_filename(tmp_path / "a.hdr")
    assert (tmp_path / "a.mat").is_file()
    assert ".mat" in refused(tmp_path / "a.hdr")
    (tmp_path / "a.mat").unlink()
    read_scan(tmp_path / "a.hdr", "a", analyze_axes="LAS")


def test_without_its_voxels(tmp_path: Path):
    path = write(tmp_path / "a.hdr", noise())
    (tmp_path / "a.img").unlink()
    assert "(.img) is not beside it" in refused(path)


def test_a_nifti_pair_goes_by_its_own_header(tmp_path: Path):
    nib.save(nib.Nifti1Pair(noise(), np.diag([-2.0, 2, 2, 1])), tmp_path / "a.hdr")
    scans = [read_scan(tmp_path / "a.hdr", "a", analyze_axes=codes) for codes in (None, "RAS")]
    assert scans[0].digest == scans[1].digest
    assert "stated_orientation" not in scans[1].attributes


def test_texts_of_the_header_go_nowhere(tmp_path: Path):
    texts = {"descrip": b"DOE^JANE", "patient_id": b"P-4711", "exp_date": b"19990102", "db_name": b"JANE"}
    path = write(tmp_path / "a.hdr", noise(), **texts)
    (tmp_path / "s").mkdir()
    store = isi.create(tmp_path / "s" / "s.isimed")
    assert store.add(path, analyze_axes="LAS").added == ["a"]
    for file in (file for file in (tmp_path / "s").rglob("*") if file.is_file()):
        assert not any(text in file.read_bytes() for text in texts.values()), file.name


def test_label_maps_are_read_by_the_same_axes(tmp_path: Path):
    voxels, marks = noise(), np.zeros((7, 9, 6), np.uint8)
    marks[0, 1, 2] = 3
    write(tmp_path / "a.hdr", voxels)
    seg = write(tmp_path / "a_seg.hdr", marks)
    scan = read_scan(tmp_path / "a.hdr", "a", analyze_axes="LPS")
    labels = read_labels(seg, scan, {}, "LPS")
    (marked,) = np.argwhere(labels.voxels == 3)
    assert scan.voxels[tuple(marked)] == voxels[0, 1, 2]
    with pytest.raises(ScanRefused, match="which side"):
        read_labels(seg, scan, {})
    store = isi.create(tmp_path / "s.isimed")
    done = store.add(tmp_path / "a.hdr", labels="{stem}_seg.hdr", analyze_axes="LPS")
    assert not done.refused
    (row,) = store.sql("SELECT label, x_mm, y_mm, z_mm FROM labels").to_pylist()
    place = by_hand("LPS", (0, 1, 2), (3, 4, 2.5))
    assert row["label"] == 3
    np.testing.assert_allclose([row["x_mm"], row["y_mm"], row["z_mm"]], place, atol=1e-5)


def test_labels_that_lie_elsewhere_are_refused(tmp_path: Path):
    scan = read_scan(write_nifti(tmp_path / "a.nii", noise(), np.diag([*EDGES, 1])), "a")
    with pytest.raises(ScanRefused, match="apart"):
        read_labels(write(tmp_path / "a_seg.hdr", noise()), scan, {}, "RAS")


@pytest.mark.parametrize("codes", ["", "LA", "LASS", "las", "LRS", "LLS", "XYZ", "LAS ", "L A S"])
def test_a_wrong_code_is_a_usage_error(tmp_path: Path, codes: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UsageError, match="directions of three axes"):
        AddOptions(analyze_axes=codes)
    path = write(tmp_path / "a.hdr", noise())
    assert main(["add", str(path), "--analyze-axes", codes, "-s", str(tmp_path / "s.isimed")]) == 2
    assert "error[usage]" in capsys.readouterr().err


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, at = write(tmp_path / "a.hdr", noise()), ["-s", str(tmp_path / "s.isimed")]
    assert main(["add", str(path), *at]) == 1  # nothing was read
    assert "isimed add --analyze-axes" in capsys.readouterr().err
    for workers in ("1", "2"):
        assert main(["add", str(path), "--analyze-axes", "LAS", "--workers", workers, *at]) == 0
    (row,) = isi.open(tmp_path / "s.isimed", mode="r").scans().to_pylist()
    assert (row["scan"], row["stated_orientation"]) == ("a", "LAS")


def test_changed_bytes_are_read_or_refused(tmp_path: Path):
    rng = np.random.default_rng(3)
    path = write(tmp_path / "a.hdr", noise())
    raw = path.read_bytes()
    read = 0
    for _ in range(300):
        changed = bytearray(raw)
        for place in rng.integers(0, len(raw), rng.integers(1, 5)):
            changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            read_scan(path, "a", analyze_axes="LAS")
            read += 1
        except ScanRefused:
            continue
    assert 0 < read < 300
