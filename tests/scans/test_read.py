"""Reading: nibabel is the judge of geometry and values; every broken file is refused with its reason."""

import gzip
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from isimed_index.errors import ScanRefused
from isimed_index.scans import volume
from isimed_index.scans.read import read_labels, read_scan
from isimed_index.space import apply_affine

RNG = np.random.default_rng(0)


def with_scaling(path, slope, intercept):
    """Set scl_slope and scl_inter in the bytes of a file, leaving its voxels alone."""
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    raw[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


@pytest.mark.parametrize("name", ["head.nii", "head.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "u2", "i4", "f4", ">f8"])
def test_voxels_and_places_are_those_of_nibabel(write, voxels, oblique, name, kind, dtype):
    path = write(name, np.abs(voxels).astype(dtype) if "u" in dtype else voxels.astype(dtype), oblique, kind=kind)
    scan = read_scan(path, "a")
    judge = nib.as_closest_canonical(nib.load(path))
    assert nib.load(path).header.endianness == (">" if ">" in dtype else "<")
    np.testing.assert_array_equal(scan.voxels, np.asarray(judge.dataobj))
    assert scan.voxels.dtype == np.dtype(dtype).newbyteorder("=")
    assert scan.voxels.flags.c_contiguous
    np.testing.assert_allclose(scan.affine, judge.affine, atol=1e-9)
    np.testing.assert_allclose(scan.spacing_mm, [2.5, 0.9, 1.1], rtol=1e-6)
    assert scan.orientation == "RAS"
    assert scan.attributes["source_orientation"] == "PSR"
    assert scan.attributes["source_format"] == ("NIfTI-1" if kind is nib.Nifti1Image else "NIfTI-2")


@pytest.mark.parametrize("kind", ["u1", ">i2", "f4"])
@pytest.mark.parametrize("axes", list(permutations("RAS")))
def test_volumes_of_several_tiles_are_turned_as_nibabel_turns_them(write, axes, kind):
    for signs in product((False, True), repeat=3):
        codes = [
            {"R": "L", "A": "P", "S": "I"}[axis] if turned else axis for axis, turned in zip(axes, signs, strict=True)
        ]
        affine = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (270, 3, 5))
        path = write("head.nii", RNG.integers(0, 256, (270, 3, 5)).astype(kind), affine)
        scan = read_scan(path, "a")
        judge = nib.as_closest_canonical(nib.load(path))
        assert scan.attributes["source_orientation"] == "".join(nib.aff2axcodes(nib.load(path).affine))
        np.testing.assert_array_equal(scan.voxels, np.asarray(judge.dataobj))
        np.testing.assert_allclose(scan.affine, judge.affine)
    assert scan.id == "a"


def test_a_physical_point_keeps_its_voxel(write, voxels, oblique):
    voxels[2, 7, 3] = 30000
    scan = read_scan(write("a.nii.gz", voxels, oblique), "a")
    where = np.argwhere(scan.voxels == 30000)
    np.testing.assert_allclose(apply_affine(scan.affine, where), [apply_affine(oblique, [2, 7, 3])], atol=1e-6)


def test_stored_voxels_stay_and_the_slope_is_applied_on_demand(write, voxels):
    path = with_scaling(write("a.nii.gz", voxels), 0.25, -1024)
    scan = read_scan(path, "a")
    assert (scan.slope, scan.intercept) == (0.25, -1024)
    np.testing.assert_array_equal(scan.voxels, voxels)
    np.testing.assert_allclose(scan.values(), nib.load(path).get_fdata(), rtol=1e-6)


@pytest.mark.parametrize("slope", [0, np.nan])
def test_no_slope_means_one(write, voxels, slope):
    scan = read_scan(with_scaling(write("a.nii", voxels), slope, 7), "a")
    np.testing.assert_array_equal(scan.values(), voxels.astype(np.float32))


def test_the_sform_comes_before_the_qform_and_the_choice_is_recorded(write, voxels, oblique):
    both = write("both.nii", voxels, oblique, codes=(0, 1))
    image = nib.Nifti1Image(voxels, oblique)
    image.set_qform(np.diag([2, 2, 2, 1]), 1)
    nib.save(image, both)
    np.testing.assert_allclose(read_scan(both, "a").affine, nib.as_closest_canonical(nib.load(both)).affine)
    assert read_scan(both, "a").attributes["affine_source"] == "sform"
    only_q = read_scan(write("q.nii", voxels, np.diag([2, 2, 2, 1]), codes=(1, 0)), "a")
    assert only_q.attributes["affine_source"] == "qform"
    np.testing.assert_allclose(only_q.spacing_mm, 2)


def test_a_qfac_of_zero_means_one(write, voxels):
    path = write("a.nii", voxels, codes=(1, 0))
    raw = bytearray(path.read_bytes())
    raw[76:80] = bytes(4)
    path.write_bytes(raw)
    np.testing.assert_allclose(read_scan(path, "a").affine, np.eye(4))


@pytest.mark.parametrize(("unit", "mm"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_lengths_become_millimetres(write, voxels, unit, mm):
    scan = read_scan(write("a.nii", voxels, np.diag([2.0, 3, 4, 1]), xyzt_units=unit), "a")
    np.testing.assert_allclose(scan.spacing_mm, [2 * mm, 3 * mm, 4 * mm])


def test_trailing_axes_of_length_one_are_dropped(write, voxels):
    scan = read_scan(write("a.nii.gz", voxels[..., None, None]), "a")
    np.testing.assert_array_equal(scan.voxels, voxels)


@pytest.mark.parametrize(("slope", "expected"), [(1.0, -3.0), (-1.0, 5.0)])
def test_some_nan_become_background_and_are_counted(write, slope, expected):
    data = RNG.uniform(-2, 4, (5, 5, 5)).astype(np.float32)
    data[0, 0, :3] = [np.nan, np.inf, -np.inf]
    data[1, 1, :2] = -3, 5
    scan = read_scan(with_scaling(write("a.nii", data), slope, 0), "a")
    np.testing.assert_array_equal(scan.voxels[0, 0, :3], expected)
    np.testing.assert_array_equal(scan.voxels[1:], data[1:])
    assert scan.attributes["nonfinite_voxels"] == 3
    assert scan.background == expected


def refused(path):
    with pytest.raises(ScanRefused) as caught:
        read_scan(path, "a")
    assert str(caught.value).startswith(f"{path.name}: ")
    assert str(path.parent) not in caught.value.line()
    assert caught.value.line().count("\n") == 0
    return str(caught.value)


@pytest.mark.parametrize("keep", [3, 40, 200, 0.5, 0.99])
def test_truncated_gz_is_refused(write, voxels, keep):
    path = write("a.nii.gz", voxels)
    raw = path.read_bytes()
    path.write_bytes(raw[: keep if keep >= 1 else int(len(raw) * keep)])
    assert "truncated" in refused(path)


def test_a_sound_gz_of_a_truncated_file_is_refused(write, voxels):
    path = write("a.nii.gz", voxels)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    assert "too short for 7×9×6 voxels" in refused(path)


def test_truncated_plain_file_is_refused(write, voxels):
    path = write("a.nii", voxels)
    raw = path.read_bytes()
    path.write_bytes(raw[:-1])
    assert "truncated" in refused(path)
    path.write_bytes(raw[:100])
    assert "header" in refused(path)


@pytest.mark.parametrize("where", [-6, 0.5, 0.8])
def test_one_changed_byte_in_a_gz_is_refused(write, voxels, where):
    path = write("a.nii.gz", voxels)
    raw = bytearray(path.read_bytes())
    raw[where if where < 0 else int(len(raw) * where)] ^= 0xFF
    path.write_bytes(raw)
    assert "damaged" in refused(path)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("content", [b"", b"hi", b"patient notes, not an image\n" * 50])
def test_a_text_file_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert "not a NIfTI file" in refused(path)


def test_a_header_of_a_pair_without_its_voxels_is_refused(write, voxels):
    path = write("a.nii", voxels)
    raw = bytearray(path.read_bytes())
    raw[344:348] = b"ni1\0"
    path.write_bytes(raw)
    assert "not beside it" in refused(path)


@pytest.mark.parametrize(
    ("shape", "says"),
    [((8, 9), "2-D"), ((8, 9, 1), "2-D"), ((1, 8, 9), "2-D"), ((4, 5, 6, 3), "4-D"), ((4, 5, 6, 1, 3), "5-D")],
)
def test_what_is_not_three_dimensional_is_refused(write, shape, says):
    assert says in refused(write("a.nii.gz", RNG.normal(size=shape).astype(np.float32)))


@pytest.mark.parametrize(
    ("value", "says"), [(np.nan, "NaN"), (np.inf, "NaN"), (0.0, "same value"), (3.5, "same value, 3.5")]
)
def test_volumes_without_content_are_refused(write, value, says):
    assert says in refused(write("a.nii.gz", np.full((4, 5, 6), value, np.float32)))


def test_values_beyond_float32_are_refused(write):
    assert "32-bit" in refused(write("a.nii", RNG.normal(size=(4, 5, 6)) * 1e300))


@pytest.mark.parametrize(
    ("affine", "says"),
    [
        (np.diag([1.0, 0, 1, 1]), "singular"),
        (np.array([[1.0, 2, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([1.0, np.nan, 1, 1]), "NaN"),
    ],
)
def test_a_broken_affine_is_refused(write, voxels, affine, says):
    path = write("a.nii.gz", voxels)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[280:328] = affine[:3].astype("<f4").tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))
    assert says in refused(path)


def test_a_qform_without_spacing_is_refused(write, voxels):
    path = write("a.nii", voxels, codes=(1, 0))
    raw = bytearray(path.read_bytes())
    raw[80:84] = bytes(4)
    path.write_bytes(raw)
    assert "singular" in refused(path)


def test_a_file_without_any_orientation_is_refused(write, voxels):
    assert "neither its sform nor its qform" in refused(write("a.nii.gz", voxels, codes=(0, 0)))


def test_colour_and_complex_voxels_are_refused(write):
    assert "complex64" in refused(write("c.nii.gz", np.ones((4, 5, 6), np.complex64)))
    assert "RGB" in refused(write("rgb.nii.gz", np.zeros((4, 5, 6), np.dtype([(c, "u1") for c in "RGB"]))))


@pytest.mark.parametrize(
    ("at", "value", "says"),
    [
        (70, np.array([77], "<i2"), "header is damaged"),  # an unknown voxel type
        (108, np.array([12], "<f4"), "byte 12"),  # voxels inside the header
        (108, np.array([np.nan], "<f4"), "byte nan"),
        (42, np.array([-4], "<i2"), "empty"),
        (42, np.array([30000, 30000, 30000], "<i2"), "truncated"),  # more than the file can hold
        (116, np.array([np.nan], "<f4"), "scl_inter"),
        (123, np.array([7], "u1"), "unit"),
    ],
)
def test_a_damaged_header_is_refused(write, voxels, at, value, says):
    path = with_scaling(write("a.nii", voxels), 2, 0)
    raw = bytearray(path.read_bytes())
    raw[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(raw)
    assert says in refused(path)


def test_a_decompression_bomb_is_stopped(write, voxels, monkeypatch):
    monkeypatch.setattr(volume, "_MAX_TRAILING_BYTES", 1000)
    path = write("a.nii", voxels)
    path.write_bytes(gzip.compress(path.read_bytes() + bytes(5000)))
    assert "more data" in refused(path)


def test_a_huge_volume_is_refused(write, voxels, monkeypatch):
    monkeypatch.setattr(volume, "MAX_VOXELS", 100)
    assert "378 voxels" in refused(write("a.nii", voxels))


def test_a_file_that_is_gone_or_a_folder_is_refused(tmp_path):
    assert "cannot be read" in refused(tmp_path / "gone.nii.gz")
    assert "cannot be read" in refused(tmp_path)


def test_labels_follow_their_scan_through_reorientation(write, voxels, oblique):
    scan = read_scan(write("a.nii.gz", voxels, oblique), "a")
    marks = (voxels > 500).astype(np.uint8) * 7
    labels = read_labels(write("a_seg.nii.gz", marks, oblique), scan, {7: "bright"})
    np.testing.assert_array_equal(labels.voxels == 7, scan.voxels > 500)
    assert labels.voxels.dtype == np.uint8
    assert labels.names == {7: "bright"}


def test_labels_stored_in_another_axis_order_are_the_same(write, voxels, oblique):
    scan = read_scan(write("a.nii.gz", voxels, oblique), "a")
    turned = nib.as_closest_canonical(nib.Nifti1Image((voxels > 500).astype(np.uint8), oblique))
    path = write("a_seg.nii.gz", np.asarray(turned.dataobj), turned.affine)
    np.testing.assert_array_equal(read_labels(path, scan, {}).voxels, scan.voxels > 500)


@pytest.mark.parametrize("shift_mm", [0.01, 40])
def test_labels_that_lie_elsewhere_are_refused(write, voxels, oblique, shift_mm):
    scan = read_scan(write("a.nii.gz", voxels, oblique), "a")
    moved = oblique.copy()
    moved[1, 3] += shift_mm
    with pytest.raises(ScanRefused, match=r"a_seg.nii.gz: .*mm apart"):
        read_labels(write("a_seg.nii.gz", voxels, moved), scan, {})


def test_labels_of_another_shape_are_refused(write, voxels, oblique):
    scan = read_scan(write("a.nii.gz", voxels, oblique), "a")
    with pytest.raises(ScanRefused, match="not on the grid"):
        read_labels(write("a_seg.nii.gz", voxels[:-1], oblique), scan, {})


@pytest.mark.parametrize(
    ("least", "most", "dtype"),
    [(0, 200, np.uint8), (0, 300, np.uint16), (-1, 100, np.int8), (-1, 128, np.int16), (-300, 2**20, np.int32)],
)
def test_whole_numbers_stored_as_reals_become_integers(write, voxels, least, most, dtype):
    scan = read_scan(write("a.nii.gz", voxels), "a")
    real = np.where(voxels > 0, float(most), float(least)).astype(np.float32)
    labels = read_labels(write("s.nii.gz", real), scan, {})
    assert labels.voxels.dtype == dtype
    np.testing.assert_array_equal(labels.voxels, real)


@pytest.mark.parametrize("value", [0.5, np.nan, 1e12])
def test_probability_maps_are_not_labels(write, voxels, value):
    scan = read_scan(write("a.nii.gz", voxels), "a")
    with pytest.raises(ScanRefused, match="whole numbers"):
        read_labels(write("s.nii.gz", np.where(voxels > 0, value, 0).astype(np.float32)), scan, {})
