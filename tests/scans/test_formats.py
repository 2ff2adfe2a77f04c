"""NRRD, MetaImage, MGH and NIfTI pairs: what SimpleITK and nibabel wrote is read as they read it."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from affines import affines
from dicoms import grid, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import agrees_with, itk_image

from isimed_cli.options import VOLUME_SUFFIXES
from isimed_index.errors import ScanRefused
from isimed_index.scans import formats, volume
from isimed_index.scans.discover import find_files, stem
from isimed_index.scans.read import read_scan
from isimed_index.space import apply_affine, inverse

RNG = np.random.default_rng(0)
ITK_TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


def itk_write(path: Path, voxels: np.ndarray, lps: np.ndarray | None = None, compressed: bool = False) -> Path:
    """Write voxels (x, y, z) with SimpleITK, which wants right angles."""
    lps = grid() if lps is None else lps
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T))
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(path), compressed)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ScanRefused) as caught:
        read_scan(path, "a")
    line = caught.value.line()
    assert line.startswith(f"error[scan_refused]: {path.name}: ")
    assert str(path.parent) not in line
    assert caught.value.next_step
    return line


def changed(path: Path, old: bytes, new: bytes) -> Path:
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new))
    return path


class TestAgainstSimpleITK:
    @pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd", "a.hdr", "a.nii"])
    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("dtype", ITK_TYPES)
    def test_types(self, tmp_path, name, compressed, dtype):
        voxels = noise(high=100).astype(dtype) if dtype[0] != "u" else np.abs(noise(high=100)).astype(dtype)
        path = itk_write(tmp_path / name, voxels, compressed=compressed)
        if name == "a.hdr" and not path.exists():
            path = tmp_path / "a.hdr.gz"
        scan = read_scan(path, "a")
        assert scan.voxels.dtype == np.dtype(dtype)
        assert agrees_with(scan, itk_image(path), RNG, 400) < (1e-4 if name in ("a.hdr", "a.nii") else 1e-9)
        assert scan.orientation == "RAS"

    @settings(max_examples=25)
    @given(affine=affines(), suffix=st.sampled_from([".nrrd", ".mha"]), compressed=st.booleans())
    def test_any_orientation(self, affine, suffix, compressed):
        with tempfile.TemporaryDirectory() as folder:
            path = itk_write(Path(folder) / f"a{suffix}", noise(), affine, compressed)
            assert agrees_with(read_scan(path, "a"), itk_image(path), RNG) < 1e-3

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # nibabel leaves its file open
    @settings(max_examples=25)
    @given(affine=affines(), suffix=st.sampled_from([".mgh", ".mgz"]), dtype=st.sampled_from(["u1", "i2", "i4", "f4"]))
    def test_mgh_against_nibabel(self, affine, suffix, dtype):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"a{suffix}"
            nib.save(nib.MGHImage(np.abs(noise(high=200)).astype(dtype), affine), path)
            scan, judge = read_scan(path, "a"), nib.load(path)
            index = RNG.integers(0, judge.shape, (100, 3))
            places = nib.affines.apply_affine(judge.affine, index)
            ours = np.rint(apply_affine(inverse(scan.affine), places)).astype(int)
            np.testing.assert_allclose(apply_affine(scan.affine, ours), places, atol=1e-3)
            np.testing.assert_array_equal(scan.voxels[tuple(ours.T)], np.asarray(judge.dataobj)[tuple(index.T)])
            assert scan.voxels.dtype == np.dtype(dtype)


class TestNrrd:
    HEADER = (
        "NRRD0005\n# a comment\ntype: short\ndimension: 3\nspace: {space}\nsizes: 7 9 6\nendian: {endian}\n"
        "space directions: (2,0,0) (0,3,0) (0,0,4)\nspace origin: (10,20,30)\n"
        "encoding: {encoding}\nkey:=value\n{more}\n"
    )

    def write(self, path: Path, space="RAS", endian="little", encoding="raw", more="", body=None) -> Path:
        data = noise().ravel(order="F").astype("<i2" if endian == "little" else ">i2").tobytes()
        header = self.HEADER.format(space=space, endian=endian, encoding=encoding, more=more)
        path.write_bytes(header.encode() + (data if body is None else body(data)))
        return path

    @pytest.mark.parametrize(
        ("space", "signs"),
        [
            ("RAS", (1, 1, 1)),
            ("right-anterior-superior", (1, 1, 1)),
            ("left-anterior-superior", (-1, 1, 1)),
            ("LPS", (-1, -1, 1)),
        ],
    )
    @pytest.mark.parametrize("endian", ["little", "big"])
    def test_spaces(self, tmp_path, space, signs, endian):
        scan = read_scan(self.write(tmp_path / "a.nrrd", space, endian), "a")
        place = np.array([10 + 2 * 3, 20 + 3 * 4, 30 + 4 * 5]) * signs
        index = np.rint(apply_affine(inverse(scan.affine), place)).astype(int)
        assert scan.voxels[tuple(index)] == noise()[3, 4, 5]
        np.testing.assert_allclose(apply_affine(scan.affine, index), place)

    @pytest.mark.parametrize(
        ("encoding", "more", "body"),
        [
            ("gz", "", gzip.compress),
            ("bzip2", "", bz2.compress),
            ("raw", "byte skip: -1\n", lambda data: b"junk" * 5 + data),
            ("raw", "line skip: 2\nbyte skip: 3\n", lambda data: b"one\ntwo\nabc" + data),
        ],
    )
    def test_encodings_and_skips(self, tmp_path, encoding, more, body):
        plain = read_scan(self.write(tmp_path / "a.nrrd"), "a")
        other = read_scan(self.write(tmp_path / "b.nrrd", encoding=encoding, more=more, body=body), "a")
        assert other.digest == plain.digest

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            (b"space: RAS\n", b"", "does not say where the voxels lie"),
            (b"space: RAS\n", b"space: scanner-xyz\n", "does not say where the voxels lie"),
            (b"space origin: (10,20,30)\n", b"", "does not say where the voxels lie"),
            (b"space directions: (2,0,0) (0,3,0) (0,0,4)\n", b"", "does not say where"),
            (b"(0,3,0)", b"(0,3)", "damaged"),
            (b"(0,3,0)", b"(0,x,0)", "damaged"),
            (b"(0,3,0)", b"(2,0,0)", "singular"),
            (b"(0,3,0)", b"(0,nan,0)", "NaN"),
            (b"endian: little\n", b"", "byte order"),
            (b"type: short", b"type: block", "block voxels"),
            (b"encoding: raw", b"encoding: ascii", "encoding is 'ascii'"),
            (b"sizes: 7 9 6", b"sizes: 7 9", "damaged"),
            (b"sizes: 7 9 6", b"sizes: 7 x 6", "damaged"),
            (b"sizes: 7 9 6", b"sizes: 7 9 60", "truncated"),
            (b"sizes: 7 9 6", b"sizes: 9999999 999999 99999", "truncated"),
            (b"NRRD0005", b"NRRX0005", "not a NRRD file"),
            (b"key:=value\n", b'space units: "um" "um" "um"\n', "expected mm"),
            (b"key:=value\n", b"kinds: RGB-color space space\n", "several numbers a voxel"),
            (b"key:=value\n", b"byte skip: x\n", "no whole number"),
            (b"key:=value\n", b"byte skip: -2\n", "negative"),
            (b"key:=value\n", b"line skip: 99999\n", "fewer lines"),
            (b"key:=value\n", b"data file: LIST\n", "list of files"),
            (b"key:=value\n", b"data file: slice%03d.raw 1 9 1\n", "list of files"),
            (b"key:=value\n", b"data file: ../a.raw\n", "not beside it"),
            (b"key:=value\n", b"data file: gone.raw\n", "voxels is not beside it"),
        ],
    )
    def test_refusals(self, tmp_path, old, new, says):
        assert says in refused(changed(self.write(tmp_path / "a.nrrd"), old, new))

    def test_four_dimensions_and_vectors(self, tmp_path):
        image = SimpleITK.GetImageFromArray(np.zeros((2, 4, 5, 6), np.int16), isVector=False)
        for name in ("a.nrrd", "a.mha"):
            SimpleITK.WriteImage(image, str(tmp_path / name))
            assert "4-D" in refused(tmp_path / name)
        vectors = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
        for name in ("v.nrrd", "v.mha"):
            SimpleITK.WriteImage(vectors, str(tmp_path / name))
            assert "several numbers a voxel" in refused(tmp_path / name)
        nib.save(nib.MGHImage(np.zeros((4, 5, 6, 2), np.int16), np.eye(4)), tmp_path / "a.mgz")
        assert "4-D" in refused(tmp_path / "a.mgz")

    @pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mgz", "a.nii.gz"])
    def test_a_changed_byte_in_compressed_voxels(self, tmp_path, name):
        if name == "a.mgz":
            nib.save(nib.MGHImage(noise(), np.eye(4)), tmp_path / name)
            path = tmp_path / name
        else:
            path = itk_write(tmp_path / name, noise(), compressed=True)
        raw = bytearray(path.read_bytes())
        raw[-6] ^= 1  # in the check sum
        path.write_bytes(raw)
        if name == "a.mha":  # Adler-32 is the last four bytes
            raw[-6] ^= 1
            raw[-2] ^= 1
            path.write_bytes(raw)
        assert "truncated or damaged" in refused(path)
        path.write_bytes(raw[: len(raw) // 2])
        assert "truncated or damaged" in refused(path)

    @pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
    def test_a_bomb_is_stopped(self, tmp_path, name, monkeypatch):
        monkeypatch.setattr(volume, "_MAX_TRAILING_BYTES", 1000)
        path = itk_write(tmp_path / name, noise(), compressed=True)
        head = path.read_bytes()
        end = head.index(b"\n\n") + 2 if name == "a.nrrd" else head.index(b"LOCAL\n") + 6
        pack = gzip.compress if name == "a.nrrd" else zlib.compress
        path.write_bytes(head[:end] + pack(bytes(noise().nbytes) + bytes(2**20)))
        assert "far more data" in refused(path)


class TestMetaImage:
    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            (b"TransformMatrix", b"NoTransform", "does not say where the voxels lie"),
            (b"Offset", b"NoOffs", "does not say where the voxels lie"),
            (b"ElementSpacing", b"NoSpacing", "does not say where the voxels lie"),
            (b"DimSize = 7 9 6", b"DimSize = 7 9", "damaged"),
            (b"DimSize = 7 9 6", b"DimSize = 7 9 60", "truncated"),
            (b"DimSize = 7 9 6", b"DimSize = 99999999 99999999 6", "truncated"),
            (b"DimSize = 7 9 6", b"DimSize = 7 x 6", "no numbers"),
            (b"MET_SHORT", b"MET_ASCII_CHAR", "MET_ASCII_CHAR voxels"),
            (b"BinaryData = True", b"BinaryData = False", "its voxels are text"),
            (b"ObjectType = Image", b"ElementToIntensityFunctionSlope = 2", "scales the values"),
            (b"ObjectType = Image", b"HeaderSize = -9", "HeaderSize"),
            (b"LOCAL", b"LIST", "list of files"),
            (b"LOCAL", b"a%02d.raw", "list of files"),
            (b"LOCAL", b"/etc/passwd", "not beside it"),
            (b"LOCAL", b"gone.raw", "voxels is not beside it"),
            (b"ElementDataFile", b"Nothing", "not a MetaImage file"),
        ],
    )
    def test_refusals(self, tmp_path, old, new, says):
        assert says in refused(changed(itk_write(tmp_path / "a.mha", noise()), old, new))

    def test_big_endian_and_header_size(self, tmp_path):
        plain = read_scan(itk_write(tmp_path / "a.mhd", noise()), "a")
        raw = (tmp_path / "a.raw").read_bytes()
        (tmp_path / "a.raw").write_bytes(b"junk" + np.frombuffer(raw, "<i2").astype(">i2").tobytes())
        changed(tmp_path / "a.mhd", b"OrderMSB = False", b"OrderMSB = True")
        changed(tmp_path / "a.mhd", b"ObjectType = Image", b"HeaderSize = -1")
        assert read_scan(tmp_path / "a.mhd", "a").digest == plain.digest
        changed(tmp_path / "a.mhd", b"HeaderSize = -1", b"HeaderSize = 4")
        assert read_scan(tmp_path / "a.mhd", "a").digest == plain.digest


class TestMghAndPairs:
    def test_an_mgh_header_without_orientation(self, tmp_path):
        nib.save(nib.MGHImage(noise(), np.eye(4)), tmp_path / "a.mgh")
        raw = bytearray((tmp_path / "a.mgh").read_bytes())
        for content, says in (
            (raw[:28] + b"\0\0" + raw[30:], "goodRASFlag"),
            (raw[:100], "not an MGH"),
            (raw[:400], "truncated"),
        ):
            (tmp_path / "a.mgh").write_bytes(content)
            assert says in refused(tmp_path / "a.mgh")
        (tmp_path / "a.mgh").write_bytes(raw[:20] + b"\0\0\0\x63" + raw[24:])
        assert "damaged" in refused(tmp_path / "a.mgh")

    @pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
    def test_a_pair_by_either_name(self, tmp_path, kind):
        nib.save(kind(noise(), grid()), tmp_path / "a.hdr")
        scans = [read_scan(tmp_path / name, "a") for name in ("a.hdr", "a.img")]
        assert scans[0].digest == scans[1].digest
        np.testing.assert_allclose(scans[0].affine, nib.as_closest_canonical(nib.load(tmp_path / "a.hdr")).affine)
        assert scans[0].attributes["source_format"].endswith("pair")
        (tmp_path / "a.hdr").unlink()
        assert "its header (.hdr) is not beside it" in refused(tmp_path / "a.img")

    def test_a_pair_without_its_voxels(self, tmp_path):
        nib.save(nib.Nifti1Pair(noise(), grid()), tmp_path / "a.hdr")
        (tmp_path / "a.img").unlink()
        assert "(.img) is not beside it" in refused(tmp_path / "a.hdr")

    @pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mgh", "a.hdr"])
    def test_changed_bytes_are_read_or_refused(self, tmp_path, name):
        rng = np.random.default_rng(3)
        path = tmp_path / name
        if name == "a.mgh":
            nib.save(nib.MGHImage(noise(), np.eye(4)), path)
        elif name == "a.hdr":
            nib.save(nib.Nifti1Pair(noise(), grid()), path)
        else:
            itk_write(path, noise())
        raw = path.read_bytes()
        for _ in range(200):
            changed = bytearray(raw)
            for place in rng.integers(0, min(len(raw), 500), rng.integers(1, 5)):
                changed[place : place + 1] = rng.choice([b"\xff", b"9" * 30, b"nan", b"-", b" ", b"\n", b""])
            path.write_bytes(changed)
            with contextlib.suppress(ScanRefused):
                read_scan(path, "a")

    def test_analyze_is_refused_for_its_sides(self, tmp_path):
        nib.save(nib.AnalyzeImage(noise(), np.eye(4)), tmp_path / "a.img")
        for name in ("a.hdr", "a.img"):
            assert "an Analyze 7.5 header, which does not say which side" in refused(tmp_path / name)


def test_folders_hold_each_image_once(tmp_path):
    for name in ("a.nrrd", "b.nhdr", "c.mha", "d.mhd", "e.hdr"):
        itk_write(tmp_path / name, noise())
    nib.save(nib.MGHImage(noise(), np.eye(4)), tmp_path / "f.mgz")
    (tmp_path / "orphan.img").touch()
    (tmp_path / "x.dcm").touch()
    names = [path.name for path in find_files([tmp_path])]
    assert names == ["a.nrrd", "b.nhdr", "c.mha", "d.mhd", "e.hdr", "f.mgz", "orphan.img", "x.dcm"]
    assert [stem(tmp_path / name) for name in ("a.NRRD", "x.hdr.gz", "b.mhd", "s.1.mgz")] == ["a", "x", "b", "s.1"]


def test_the_command_line_knows_the_same_suffixes():
    assert set(VOLUME_SUFFIXES) == set(formats.SUFFIXES)


@pytest.mark.real
class TestRealFiles:
    def test_every_file_lies_where_its_judge_says(self, real_data):
        worst, judged = {}, 0
        for path in find_files([real_data / name for name in ("ct", "odd", "hippocampus", "ixi")]):
            if path.suffix == ".dcm":
                continue
            try:
                scan = read_scan(path, "a")
            except ScanRefused:
                assert path.name in ("complex.nii.gz", "mpld_asl.nii.gz", "ct_perfusion.nii.gz")
                continue
            judged += 1
            if path.suffix == ".mgz":
                judge = nib.load(path)
                index = RNG.integers(0, judge.shape, (100, 3))
                places = nib.affines.apply_affine(judge.affine, index)
                ours = apply_affine(inverse(scan.affine), places)
                nearest = np.rint(ours).astype(int)
                worst[path.name] = np.linalg.norm(apply_affine(scan.affine, nearest) - places, axis=1).max()
                np.testing.assert_array_equal(scan.voxels[tuple(nearest.T)], np.asarray(judge.dataobj)[tuple(index.T)])
            else:
                worst[path.name] = agrees_with(scan, itk_image(path), RNG)
        assert judged > 200
        assert max(worst.values()) < 1e-3
