"""DICOM: SimpleITK is the judge of geometry and values; what is no volume is refused with its reason."""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from affines import affines
from dicoms import (
    CT,
    GDCM,
    PHI,
    PT,
    ROOT,
    SYNTAXES,
    grid,
    noise,
    smooth,
    write_enhanced,
    write_series,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judges import agrees_with, itk_image, itk_series
from pydicom.uid import generate_uid
from scipy import ndimage

from isimed_index.errors import ScanRefused, UsageError
from isimed_index.scans.dicom.files import is_dicom
from isimed_index.scans.dicom.pixels import code_stream_shape
from isimed_index.scans.dicom.series import Leftover, Series, group
from isimed_index.scans.read import read_series
from isimed_index.scans.scan import Scan
from isimed_index.scans.surrogate import Surrogates, key_file, read_surrogates
from isimed_index.space import apply_affine, inverse

KEY = Surrogates(b"\x07" * 32)
RNG = np.random.default_rng(0)


def sorted_out(folder: Path) -> tuple[list[Series], list[Leftover]]:
    return group(sorted(path for path in folder.rglob("*") if path.is_file()), KEY)


def read(folder: Path) -> Scan:
    """The one series of a folder."""
    found, left = sorted_out(folder)
    assert [item.reason.line() for item in left] == []
    (series,) = found
    return read_series(series, "scan")


def refusals(folder: Path) -> list[str]:
    """Why the series of a folder are not read, as a person sees it."""
    found, left = sorted_out(folder)
    lines = [f"{item.name}: {item.reason.line()}" for item in left]
    for series in found:
        with pytest.raises(ScanRefused) as caught:
            read_series(series, "scan")
        assert caught.value.next_step
        lines.append(caught.value.line())
    for line in lines:
        assert str(folder) not in line
        assert ROOT not in line
        assert not any(value in line for value in PHI.values())
    return lines


def refused(folder: Path) -> str:
    (line,) = refusals(folder)
    return line


def edit(path: Path, **tags) -> None:
    """Change tags of a file in place; None deletes one."""
    dataset = pydicom.dcmread(path)
    for tag, value in tags.items():
        if value is None:
            delattr(dataset, tag)
        else:
            setattr(dataset, tag, value)
    dataset.save_as(path)


class TestSyntaxes:
    @pytest.mark.parametrize("syntax", SYNTAXES)
    def test_voxels_and_places_are_those_of_simpleitk(self, tmp_path, syntax):
        voxels = smooth(dtype=np.uint8 if syntax == "jpeg-baseline" else np.int16)
        paths = write_series(tmp_path, voxels, syntax=syntax)
        scan = read(tmp_path)
        assert agrees_with(scan, itk_series(paths), np.random.default_rng(1), 1000) < 1e-6
        assert scan.voxels.dtype == voxels.dtype
        turned = inverse(scan.affine) @ np.diag([-1, -1, 1, 1]) @ grid()
        where = np.rint(apply_affine(turned, np.argwhere(voxels < 99999))).astype(int)
        back = scan.voxels[tuple(where.T)].reshape(voxels.shape)
        if syntax in GDCM and not GDCM[syntax][1]:
            assert not np.array_equal(back, voxels) or syntax == "jpeg-2000"
            np.testing.assert_allclose(back.astype(int), voxels, atol=8)
        else:
            np.testing.assert_array_equal(back, voxels)

    @pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg-lossless-sv1", "jpeg-ls", "jpeg-2000-lossless"])
    @pytest.mark.parametrize(("dtype", "stored"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16), (np.int16, 16)])
    def test_stored_types(self, tmp_path, syntax, dtype, stored):
        voxels = smooth(dtype=dtype, stored=stored)
        paths = write_series(tmp_path, voxels, syntax=syntax, stored=stored)
        scan = read(tmp_path)
        assert scan.voxels.dtype == dtype
        agrees_with(scan, itk_series(paths), RNG)
        np.testing.assert_array_equal(np.sort(scan.voxels, axis=None), np.sort(voxels, axis=None))

    @pytest.mark.parametrize(("allocated", "stored"), [(8, 5), (8, 8), (16, 12), (16, 16), (32, 24), (32, 32)])
    @pytest.mark.parametrize("signed", [False, True])
    def test_bits_that_hold_no_value_are_what_pydicom_makes_of_them(self, tmp_path, allocated, stored, signed):
        paths = write_series(tmp_path, noise((7, 5, 3)), np.eye(4))
        for path in paths:
            dataset = pydicom.dcmread(path)
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
            dataset.PixelRepresentation = int(signed)
            dataset.PixelData = RNG.bytes(36 * allocated // 8)  # 35 values and some padding
            dataset.save_as(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the padding
            judge = np.stack([pydicom.dcmread(path).pixel_array.T for path in paths], axis=-1)
        scan = read(tmp_path)
        np.testing.assert_array_equal(scan.voxels, judge[::-1, ::-1])
        assert scan.voxels.dtype == judge.dtype

    def test_signed_values_of_twelve_bits_are_extended(self, tmp_path):
        voxels = noise((12, 10, 4), low=-2048, high=2047)
        for path in write_series(tmp_path, voxels, stored=12):
            dataset = pydicom.dcmread(path)
            dataset.PixelData = (np.frombuffer(dataset.PixelData, "<u2") & 0x0FFF).tobytes()  # rubbish-free upper bits
            dataset.save_as(path)
        assert read(tmp_path).voxels.min() == voxels.min()

    def test_the_size_in_a_compressed_image_must_be_that_of_its_header(self, tmp_path):
        for syntax in ("jpeg-lossless-sv1", "jpeg-ls", "jpeg-2000-lossless"):
            folder = tmp_path / syntax
            for path in write_series(folder, smooth(), syntax=syntax):
                frame = pydicom.encaps.get_frame(pydicom.dcmread(path).PixelData, 0, number_of_frames=1)
                assert code_stream_shape(frame) == (40, 48)
                edit(path, Rows=4)
            assert "not of the size that its header says" in refused(folder)
        assert code_stream_shape(b"\xff\xd8\xff") is None

    @pytest.mark.parametrize("scaling", [None, [(1.0, 0.0), (2.0, 1.0)]])
    def test_negative_values_under_a_header_that_knows_none_are_refused(self, tmp_path, scaling):
        voxels = smooth(dtype=np.int16, stored=12)
        for path in write_series(tmp_path / "refused", voxels, syntax="jpeg-2000-lossless", stored=12, scaling=scaling):
            edit(path, PixelRepresentation=0)
        assert voxels.min() < 0
        with pytest.raises(ScanRefused, match=r"that its values are not negative.*found -\d+") as caught:
            read(tmp_path / "refused")
        assert "PixelRepresentation" in caught.value.message
        least = min(int(voxels[:, :, k].min()) for k in range(voxels.shape[2]))
        assert int(re.search(r"found (-\d+)", caught.value.message)[1]) >= least

    def test_a_signed_stream_without_negative_values_is_read_under_an_unsigned_header(self, tmp_path):
        voxels = smooth(dtype=np.int16, stored=12)
        voxels = (voxels - voxels.min()) // 2
        paths = write_series(tmp_path, voxels, syntax="jpeg-2000-lossless", stored=12)
        for path in paths:
            edit(path, PixelRepresentation=0)
        scan = read(tmp_path)
        assert scan.voxels.dtype == np.uint16
        np.testing.assert_array_equal(np.sort(scan.voxels, axis=None), np.sort(voxels, axis=None))

    def test_a_method_that_is_not_read_is_named(self, tmp_path):
        for path in write_series(tmp_path, noise()):
            path.write_bytes(path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.102"[:20]))
        assert "compressed by a method that is not read" in refused(tmp_path)


class TestGeometry:
    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(affine=affines(), shuffle=st.integers(0, 99))
    def test_any_orientation_and_either_slice_order(self, tmp_path, affine, shuffle):
        folder = tmp_path / "series"
        shutil.rmtree(folder, ignore_errors=True)
        paths = write_series(folder, noise(), affine, shuffle=shuffle)
        scan = read(folder)
        assert agrees_with(scan, itk_series(paths), RNG) < 1e-3
        truth = np.diag([-1, -1, 1, 1]) @ affine
        ours = np.rint(apply_affine(inverse(scan.affine) @ truth, np.argwhere(noise() < 9999))).astype(int)
        np.testing.assert_array_equal(scan.voxels[tuple(ours.T)], noise().ravel())

    def test_the_first_voxel_lies_at_the_position_of_its_image(self, tmp_path):
        voxels = noise()
        voxels[0, 0, 0] = 30000
        write_series(tmp_path, voxels, grid(origin=(11, 22, 33)))
        scan = read(tmp_path)
        np.testing.assert_allclose(apply_affine(scan.affine, np.argwhere(scan.voxels == 30000)), [[-11, -22, 33]])

    def test_pixel_spacing_is_between_rows_first(self, tmp_path):
        write_series(tmp_path, noise(), grid((0, 0, 0), (0.5, 2.0, 3.0)))
        assert read(tmp_path).spacing_mm.tolist() == pytest.approx([0.5, 2.0, 3.0])

    def test_a_tilted_gantry_is_straightened_and_recorded(self, tmp_path):
        lps = grid((0, 0, 0), (1.0, 1.0, 2.0), (0, 0, 0))
        tilted = lps.copy()
        tilted[1, 2] = 2 * np.tan(np.radians(15))
        index = np.stack(np.meshgrid(*map(np.arange, (16, 20, 9)), indexing="ij"), -1)
        ramp = np.rint(apply_affine(tilted, index) @ [10, 20, 30]).astype(np.int16)  # a value that says its place
        write_series(tmp_path, ramp, tilted, sop_class=CT)
        scan = read(tmp_path)
        assert scan.attributes["gantry_tilt_degrees"] == pytest.approx(15, abs=1e-3)
        edges = scan.affine[:3, :3] / scan.spacing_mm
        np.testing.assert_allclose(edges.T @ edges, np.eye(3), atol=1e-9)
        assert scan.shape == (16, 25, 9)  # 8 slices · 0.536 rows more
        inside = scan.voxels > scan.voxels.min()
        assert inside.mean() > 0.7
        places = apply_affine(scan.affine, np.argwhere(inside)) * [-1, -1, 1]
        core = ndimage.binary_erosion(inside, np.ones((1, 3, 1)))[inside]  # not the rim, mixed with the outside
        assert core.mean() > 0.8
        np.testing.assert_allclose(scan.voxels[inside][core], (places @ [10, 20, 30])[core], atol=1.01)

    def test_a_hair_of_shear_stays_in_the_affine(self, tmp_path):
        lps = grid((0, 0, 0))
        lps[0, 2] = 2.5 * np.tan(np.radians(0.05))
        write_series(tmp_path, noise(), lps)
        scan = read(tmp_path)
        assert scan.voxels.dtype == np.int16
        assert "gantry_tilt_degrees" not in scan.attributes
        np.testing.assert_allclose(np.abs(scan.affine[:3, 2]), np.abs(lps[:3, 2]), atol=1e-8)

    def test_positions_may_be_rounded_but_not_wrong(self, tmp_path):
        paths = write_series(tmp_path, noise(), grid((0, 0, 0)))
        edit(paths[2], ImagePositionPatient=[-40, 95, -54.985])
        assert read(tmp_path).attributes["slices_off_line_mm"] == pytest.approx(0.015)
        edit(paths[2], ImagePositionPatient=[-39.9, 95, -55])
        assert "do not lie on one straight line: slice 3 of 6 is 0.1 mm off it" in refused(tmp_path)


class TestRefusedGeometry:
    def test_a_missing_slice(self, tmp_path):
        write_series(tmp_path, noise((7, 9, 10)))[3].unlink()
        line = refused(tmp_path)
        assert "1 slice is missing: expected 2.5 mm between slices, found 5 mm between slices 3 and 4 of 9" in line
        assert line.startswith("error[scan_refused]: series-")
        assert "(9 files)" in line

    def test_uneven_spacing(self, tmp_path):
        paths = write_series(tmp_path, noise(), grid((0, 0, 0)))
        edit(paths[-1], ImagePositionPatient=[-40, 95, -46])
        assert "unevenly spaced: expected 2.5 mm between slices, found 4 mm between slices 5 and 6" in refused(tmp_path)

    def test_two_images_at_one_place(self, tmp_path):
        uid = generate_uid(ROOT)
        study = generate_uid(ROOT)
        for seed in (1, 2):
            write_series(tmp_path / str(seed), noise(seed=seed), series=uid, study=study)
        for path in tmp_path.rglob("1.*"):
            edit(path, FrameOfReferenceUID="1.2.3")
        assert "12 images at 6 places; nothing in their headers tells them apart" in refused(tmp_path)
        for path in (tmp_path / "2").iterdir():
            edit(path, EchoTime="4.92")
        for path in (tmp_path / "1").iterdir():
            edit(path, EchoTime="2.46")
        line = refused(tmp_path)
        assert "12 images at 6 places; they differ in EchoTime (2.46, 4.92)" in line
        assert "2 volumes. Next: take one of them with isimed add --volume N, where N is 0 to 1" in line

    @pytest.mark.parametrize(
        ("tags", "says"),
        [
            ({"PixelSpacing": [0.9, 0.8]}, "different pixel spacings: 0.9×0.7 mm and 0.9×0.8 mm, 1 of 6"),
            ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "different directions"),
            ({"FrameOfReferenceUID": "1.2.3"}, "two frames of reference"),
            ({"PatientID": "somebody else"}, "two patients or two studies"),
            ({"PixelRepresentation": 0}, "store their values in different ways"),
            ({"SOPClassUID": CT}, "two modalities"),
        ],
    )
    def test_images_that_do_not_fit_together(self, tmp_path, tags, says):
        edit(write_series(tmp_path, noise())[2], **tags)
        assert says in refused(tmp_path)

    def test_images_of_different_size(self, tmp_path):
        uid, study = generate_uid(ROOT), generate_uid(ROOT)
        write_series(tmp_path / "a", noise((7, 9, 3)), series=uid, study=study)
        write_series(tmp_path / "b", noise((8, 9, 2)), grid(origin=(0, 0, 40)), series=uid, study=study)
        for path in tmp_path.rglob("1.*"):
            edit(path, FrameOfReferenceUID="1.2.3")
        assert "different sizes: 9×7 and 9×8, 2 of 5" in refused(tmp_path)

    def test_a_single_image(self, tmp_path):
        write_series(tmp_path, noise((7, 9, 1)))
        assert "found a single image" in refused(tmp_path)

    @pytest.mark.parametrize(
        ("tags", "says"),
        [
            ({"ImagePositionPatient": None}, "(ImagePositionPatient)"),
            ({"ImageOrientationPatient": [1, 0, 0, 0, 0.9, 0]}, "right angles"),
            ({"PixelSpacing": None}, "(PixelSpacing)"),
            ({"PixelSpacing": [0, 0]}, "pixel spacing is 0 × 0 mm"),
            ({"RescaleSlope": 0, "RescaleIntercept": 0}, "slope is 0"),
            ({"NumberOfFrames": 3}, "3 frames that do not say where they lie"),
            ({"HighBit": 12}, "highest being bit 12"),
            ({"BitsAllocated": 64}, "are not read"),
            ({"PixelData": None}, "no integer pixel data"),
            ({"PixelData": b"\0" * 20}, "truncated"),
            ({"PixelData": b"\0" * 126}, "same value"),
        ],
    )
    def test_what_a_header_must_say(self, tmp_path, tags, says):
        for path in write_series(tmp_path, noise()):
            edit(path, **tags)
        assert says in refused(tmp_path)


class TestValues:
    def test_one_scaling_is_kept_beside_the_integers(self, tmp_path):
        paths = write_series(tmp_path, noise(), sop_class=CT, scaling=[(2, -1024)])
        scan = read(tmp_path)
        assert (scan.voxels.dtype, scan.slope, scan.intercept) == (np.int16, 2, -1024)
        agrees_with(scan, itk_series(paths), RNG)

    def test_scalings_that_differ_become_float32(self, tmp_path):
        paths = write_series(tmp_path, noise(), sop_class=PT, scaling=[(0.125, 0), (0.5, 1), (0.25, -3)])
        scan = read(tmp_path)
        assert (scan.voxels.dtype, scan.slope, scan.intercept) == (np.float32, 1, 0)
        agrees_with(scan, itk_series(paths, SimpleITK.sitkFloat64), RNG)
        assert scan.attributes["modality"] == "PT"

    @pytest.mark.parametrize(("dtype", "stored"), [(np.uint16, 12), (np.uint8, 8)])
    def test_monochrome1_is_inverted_and_recorded(self, tmp_path, dtype, stored):
        voxels = noise(dtype=dtype, high=2**stored)
        paths = write_series(tmp_path, voxels, stored=stored, PhotometricInterpretation="MONOCHROME1")
        scan = read(tmp_path)
        assert scan.attributes["photometric"] == "MONOCHROME1, inverted"
        assert scan.voxels.max() == 2**stored - 1 - voxels.min()
        agrees_with(scan, itk_series(paths), RNG)

    def test_monochrome1_is_refused_where_values_have_a_unit(self, tmp_path):
        write_series(tmp_path, noise(), sop_class=CT, PhotometricInterpretation="MONOCHROME1")
        assert "its 6 files: MONOCHROME1 in a CT image" in refused(tmp_path).replace("6 of its 6", "its 6")


class TestEnhanced:
    @pytest.mark.parametrize("syntax", ["explicit", "rle", "jpeg-ls", "jpeg-2000-lossless"])
    def test_frames_are_placed_by_their_groups(self, tmp_path, syntax):
        voxels = smooth(dtype=np.int16)
        write_enhanced(tmp_path / "a", voxels, syntax=syntax)
        write_series(tmp_path / "b", voxels)
        scans = [read_series(series, "x") for series in sorted_out(tmp_path)[0]]
        assert len(scans) == 2
        np.testing.assert_allclose(scans[0].affine, scans[1].affine, atol=1e-9)
        np.testing.assert_array_equal(scans[0].voxels, scans[1].voxels)

    def test_scalings_of_frames(self, tmp_path):
        write_enhanced(tmp_path / "a", noise(), scaling=[(1, 0), (2, 5)])
        assert read(tmp_path).voxels.dtype == np.float32

    @pytest.mark.parametrize(
        ("tags", "says"),
        [
            ([{"FrameContentSequence": {"StackID": str(k // 3)}} for k in range(6)], "StackID (0, 1)"),
            (
                [{"MREchoSequence": {"EffectiveEchoTime": [5.0, 9.5][k // 3]}} for k in range(6)],
                "EffectiveEchoTime (5, 9.5)",
            ),
            ([{"FrameContentSequence": {"TemporalPositionIndex": k // 3}} for k in range(6)], "TemporalPositionIndex"),
            (
                [{"MRImageFrameTypeSequence": {"FrameType": ["A", "MP"[k // 3]]}} for k in range(6)],
                "FrameType (2 values)",
            ),
        ],
    )
    def test_several_volumes_in_one_file_are_refused_by_what_varies(self, tmp_path, tags, says):
        write_enhanced(tmp_path / "a", noise(), frame_tags=tags, places=[0, 1, 2] * 2)
        line = refused(tmp_path)
        assert "6 images at 3 places; they differ in" in line
        assert says in line

    def test_groups_for_other_frames(self, tmp_path):
        edit(write_enhanced(tmp_path / "a", noise()), NumberOfFrames=5)
        assert "5 frames, but functional groups for 6" in refused(tmp_path)


class TestGrouping:
    def test_mixed_series_are_split_and_names_mean_nothing(self, tmp_path):
        for seed in range(3):
            write_series(tmp_path, noise(seed=seed), series=f"{ROOT}{seed}")
        found, left = sorted_out(tmp_path)
        assert left == []
        assert [series.name for series in found] == sorted(KEY.of("series", f"{ROOT}{seed}") for seed in range(3))
        digests = {read_series(series, "x").digest for series in found}
        shutil.rmtree(tmp_path)
        for seed in range(3):  # other names in another order, in another syntax: the same content
            write_series(tmp_path / str(seed), noise(seed=seed), shuffle=9, series=f"{ROOT}{seed}", syntax="rle")
        assert {read_series(series, "x").digest for series in sorted_out(tmp_path)[0]} == digests

    def test_what_is_no_slice_is_counted_by_series_and_the_rest_is_read(self, tmp_path):
        paths = write_series(tmp_path, noise((7, 9, 9)))
        edit(paths[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        edit(paths[8], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
        edit(paths[1], SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
        found, left = sorted_out(tmp_path)
        assert read_series(found[0], "x").shape == (7, 9, 6)
        assert sorted(item.reason.message for item in left) == [
            "1 of its 9 files: secondary capture, a picture of a screen or a report",
            "2 of its 9 files: localizer (scout), not a slice of a volume",
        ]

    @pytest.mark.parametrize(
        ("tags", "says"),
        [
            ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.11.1"}, "Grayscale Softcopy Presentation State"),
            ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.22"}, "Enhanced SR Storage"),
            ({"SOPClassUID": "1.3.12.2.1107.5.9.1"}, "'unknown'"),
            ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "secondary capture"),
            ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "mosaic"),
            ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, "colour image (RGB)"),
            ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour image (PALETTE COLOR)"),
        ],
    )
    def test_what_is_no_image_of_a_volume(self, tmp_path, tags, says):
        for path in write_series(tmp_path, noise()):
            edit(path, **tags)
        assert says in refused(tmp_path)

    def test_one_burned_in_annotation_refuses_the_whole_series(self, tmp_path):
        edit(write_series(tmp_path, noise())[-1], BurnedInAnnotation="YES")
        assert "BurnedInAnnotation" in refused(tmp_path)

    def test_exact_copies_are_read_once(self, tmp_path):
        write_series(tmp_path / "a", noise())
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert read(tmp_path).shape == (7, 9, 6)

    def test_files_without_preamble_and_files_that_are_not_dicom(self, tmp_path):
        paths = write_series(tmp_path / "old", noise(), preamble=False)
        assert all(map(is_dicom, paths))
        assert read(tmp_path).shape == (7, 9, 6)
        for content in (b"", b"notes" * 99, b"\x08\x00" + b"\xff" * 200):
            (tmp_path / "other").write_bytes(content)
            assert not is_dicom(tmp_path / "other")
        assert not is_dicom(tmp_path)

    def test_damaged_files_are_named_by_number(self, tmp_path):
        write_series(tmp_path / "good", noise())
        (tmp_path / "Mustermann.dcm").write_bytes(b"notes" * 99)
        (tmp_path / "a").write_bytes(bytes(128) + b"DICM")
        found, left = sorted_out(tmp_path)
        assert len(found) == 1
        assert [item.name for item in left] == ["DICOM file 1 of 8", "DICOM file 2 of 8"]
        assert not any("Mustermann" in item.reason.line() for item in left)

    def test_every_cut_of_a_file_is_refused_or_read(self, tmp_path):
        (path,) = write_series(tmp_path, noise((7, 9, 1)))
        whole = path.read_bytes()
        for cut in range(140, len(whole), 37):
            path.write_bytes(whole[:cut])
            refused(tmp_path)

    @pytest.mark.parametrize("syntax", ["implicit", "deflated", *GDCM])
    def test_changed_bytes_are_read_or_refused_and_end_no_process(self, tmp_path, syntax):
        rng = np.random.default_rng(3)
        shape, dtype = (48, 40, 2), np.uint8 if syntax == "jpeg-baseline" else np.int16
        path = write_series(tmp_path, smooth(shape, dtype), syntax=syntax)[0]
        raw = path.read_bytes()
        for _ in range(60):
            changed = bytearray(raw)
            for place in rng.integers(132, len(raw), rng.integers(1, 8)):
                changed[place] = rng.integers(256)
            path.write_bytes(changed)
            for series in sorted_out(tmp_path)[0]:
                with contextlib.suppress(ScanRefused):
                    read_series(series, "scan")

    def test_an_index_file_is_passed_over(self, tmp_path):
        path = write_series(tmp_path, noise((7, 9, 1)))[0]
        dataset = pydicom.dcmread(path)
        dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
        dataset.save_as(path)
        assert sorted_out(tmp_path) == ([], [])

    def test_a_deflated_bomb_is_stopped(self, tmp_path, monkeypatch):
        from isimed_index.scans.dicom import files

        (path,) = write_series(tmp_path, noise((7, 9, 1)), syntax="deflated")
        raw = path.read_bytes()
        start = 144 + int.from_bytes(raw[140:144], "little")
        squeeze = zlib.compressobj(wbits=-15)
        path.write_bytes(raw[:start] + squeeze.compress(bytes(2**22)) + squeeze.flush())
        monkeypatch.setattr(files, "_MOST_INFLATED_BYTES", 2**20)
        assert "inflates to more than" in refused(tmp_path)

    def test_facts_of_the_image_are_kept_and_those_of_the_patient_are_not(self, tmp_path):
        write_series(tmp_path / "a", noise(), sop_class=CT, KVP=120, SliceThickness=2.5, RepetitionTime="", EchoTime=3)
        assert set(read(tmp_path).attributes) == {
            *("source_format", "source_orientation", "affine_source", "modality", "kvp", "slice_thickness_mm"),
            *("echo_time_ms", "image_type", "age"),
        }
        for number, path in enumerate(sorted((tmp_path / "a").iterdir())):
            edit(path, BodyPartExamined="CHEST", ManufacturerModelName="SOMATOM Force", EchoTime=number)
        attributes = read(tmp_path).attributes
        assert (attributes["body_part"], attributes["scanner_model"]) == ("CHEST", "SOMATOM Force")
        assert "echo_time_ms" not in attributes  # not the same in all files

    def test_reading_warns_of_nothing(self, tmp_path, caplog):
        for path in write_series(tmp_path, noise()):
            dataset = pydicom.dcmread(path)
            raw = path.read_bytes().replace(dataset.PatientBirthDate.encode(), b"12 Aug64")
            path.write_bytes(raw + b"\xfc\xff")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sorted_out(tmp_path)
        assert (caught, caplog.records) == ([], [])


class TestSurrogates:
    def test_depend_on_kind_identifier_and_key(self):
        one = KEY.of("series", "1.2.3")
        assert one == Surrogates(b"\x07" * 32).of("series", "1.2.3")
        others = {KEY.of("series", "1.2.4"), KEY.of("study", "1.2.3"), Surrogates(b"8" * 32).of("series", "1.2.3"), one}
        assert len({name.split("-")[1] for name in others}) == 4
        assert "1.2.3" not in one
        assert len(one) == len("series-") + 12
        assert "\\x07" not in repr(KEY)

    def test_the_key_is_made_once_for_its_owner_only(self, tmp_path):
        path = tmp_path / "config" / "isimed" / "surrogate.key"
        first = read_surrogates(path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_surrogates(path) == first
        assert read_surrogates(tmp_path / "other.key") != first
        assert [item.name for item in path.parent.iterdir()] == ["surrogate.key"]

    def test_where_the_key_lies(self, tmp_path, monkeypatch):
        monkeypatch.delenv("ISIMED_SURROGATE_KEY", raising=False)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert key_file() == tmp_path / "isimed" / "surrogate.key"
        monkeypatch.delenv("XDG_CONFIG_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert key_file() == tmp_path / ".config" / "isimed" / "surrogate.key"
        monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "mine"))
        assert key_file() == tmp_path / "mine"

    @pytest.mark.parametrize("content", ["", "abc", "zz" * 32, "00" * 16])
    def test_what_is_no_key(self, tmp_path, content):
        (tmp_path / "key").write_text(content)
        with pytest.raises(UsageError, match="the surrogate key key"):
            read_surrogates(tmp_path / "key")

    def test_a_key_inside_the_store_or_no_place_for_one(self, tmp_path):
        with pytest.raises(UsageError, match="inside the store"):
            read_surrogates(tmp_path / "store" / "key", tmp_path / "store")
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="cannot be read or made"):
            read_surrogates(tmp_path / "file" / "key")


@pytest.mark.real
class TestRealSeries:
    @pytest.mark.parametrize(
        "where",
        [
            "prostate-t2/07-07-2011/3.000000-t2tsesag-87368",
            "prostate-t2/07-07-2011/4.000000-t2tsetra-00702",
            "prostate-t2/07-07-2011/5.000000-t2tsecor-03471",
            "prostate-t2/07-07-2011/7.000000-ep2ddifftraDYNDISTADC-48780",
            "vendor-ge/anatomical/001",
            "vendor-generic/anatomical/002_non_isotropic",
            "vendor-generic/compressed_j2k/001",
            "vendor-generic/compressed_jpegls/001",
            "vendor-generic/compressed_rle/001",
        ],
    )
    def test_series_of_vendors(self, real_data, where):
        folder = real_data / "dicom" / where
        image = itk_series(sorted(folder.iterdir()), SimpleITK.sitkFloat64)
        assert agrees_with(read(folder), image, RNG) < 1e-3

    @pytest.mark.parametrize("where", ["dicom/vendor-siemens_multiframe", "dicom/vendor-philips_enhanced", "odd"])
    def test_enhanced_files_of_vendors(self, real_data, tmp_path, where):
        (found,) = (real_data / where).rglob("*.dcm")
        path = Path(shutil.copy(found, tmp_path))
        image = itk_image(path, SimpleITK.sitkFloat64)
        assert agrees_with(read(path.parent), image, RNG) < 1e-3

    def test_a_missing_slice_and_a_colour_series(self, real_data):
        assert "1 slice is missing" in refused(real_data / "dicom" / "prostate-missing-slice")
        assert "secondary capture" in refused(real_data / "dicom" / "vendor-generic" / "rgb")
