"""A scan that goes in comes out: bit for bit from NIfTI, and in the same place in the patient from every format."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from affines import affine_of
from dicoms import write_series
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

import isimed_index
from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.exchange.volume import SUFFIXES, export_scan
from isimed_index.scans.chunks import open_chunks, write_chunks
from isimed_index.scans.read import read_labels, read_scan
from isimed_index.scans.scan import Scan

ORIENTATIONS = [
    "".join(codes) for order in itertools.permutations(("RL", "AP", "SI")) for codes in itertools.product(*order)
]
GEOMETRY = ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
TEXTS = ("descrip", "aux_file", "db_name", "intent_name")


def raw(path: Path):
    """The stored numbers of a NIfTI file, without its scaling, as nibabel reads them."""
    return nib.load(path).dataobj.get_unscaled()


def scaling_in(path: Path) -> str:
    """Slope and intercept as they stand in a file; nibabel takes them out of the header of an image."""
    content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    kind = nib.Nifti1Header if b"n+1" in content[:348] else nib.Nifti2Header
    header = kind.from_fileobj(io.BytesIO(content), check=False)
    return str((float(header["scl_slope"]), float(header["scl_inter"])))  # as text, so that NaN equals itself


def write_nifti(path: Path, voxels, affine, codes, kind=nib.Nifti1Image, endianness="<", scaling=None, unit="mm"):
    """A file whose stored numbers are `voxels`: nibabel itself would scale them."""
    header = kind.header_class(endianness=endianness)
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_qform(affine, codes[0])
    header.set_sform(affine if codes[1] else None, codes[1])
    header.set_xyzt_units(unit)
    header["descrip"] = b"DOE^JANE 1970"
    header["scl_slope"], header["scl_inter"] = (np.nan, np.nan) if scaling is None else scaling
    header["magic"] = header.single_magic
    header["vox_offset"] = header.sizeof_hdr + 4
    content = header.binaryblock + bytes(4) + voxels.astype(header.get_data_dtype()).tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def through_chunks(source: Path, folder: Path, **how):
    """Read, store and export one file; returns the export's path and report."""
    scan = read_scan(source, "a")
    write_chunks(scan, None, folder / "a.zarr")
    out = folder / "out.nii.gz"
    return out, export_scan(open_chunks(folder / "a.zarr", "a"), "a", out, **how)


def test_there_are_48_orientations():
    assert len(set(ORIENTATIONS)) == 48


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), codes=st.sampled_from(ORIENTATIONS))
def test_nifti_comes_back_bit_for_bit(tmp_path_factory, data, codes):
    folder = tmp_path_factory.mktemp("scan")
    kind = data.draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    dtype = data.draw(st.sampled_from(["u1", "i1", "i2", "u2", "i4", "u4", "f4", "f8"]))
    shape = data.draw(st.tuples(*[st.integers(2, 9)] * 3))
    angle, edge, place = st.floats(-44, 44), st.floats(0.2, 7), st.floats(-400, 400)
    affine = affine_of(
        data.draw(st.tuples(angle, angle, angle)),
        data.draw(st.tuples(edge, edge, edge)),
        (1, 1, 1),
        (0, 1, 2),
        data.draw(st.tuples(place, place, place)),
        shear=data.draw(st.sampled_from([0.0, 0.2])),
    )
    affine = affine @ inv_ornt_aff(axcodes2ornt(tuple(codes)), shape)
    forms = data.draw(st.sampled_from([(1, 0), (0, 2), (1, 1), (3, 4)]))
    scaling = data.draw(st.sampled_from([None, (0, 7), (1, 0), (0.5, -1024), (-2.25, 3), (1 / 3, 0.1)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    limits = (-1000, 1000) if dtype[0] == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    voxels = rng.uniform(*limits, shape).astype(dtype)
    source = write_nifti(
        folder / data.draw(st.sampled_from(["in.nii", "in.nii.gz"])),
        voxels,
        affine,
        forms,
        kind,
        data.draw(st.sampled_from("<>")),
        scaling,
        data.draw(st.sampled_from(["mm", "mm", "unknown", "meter", "micron"])) if forms != (1, 1) else "mm",
    )
    out, report = through_chunks(source, folder)
    ours, theirs = nib.load(out), nib.load(source)
    assert type(ours) is type(theirs)
    assert raw(out).dtype == raw(source).dtype.newbyteorder("=")
    np.testing.assert_array_equal(raw(out), raw(source))
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert scaling_in(out) == scaling_in(source)
    np.testing.assert_array_equal(ours.get_fdata(), theirs.get_fdata())
    assert ours.header.get_xyzt_units()[0] == theirs.header.get_xyzt_units()[0]
    assert all(ours.header[field] == theirs.header[field] for field in GEOMETRY)
    np.testing.assert_array_equal(ours.header["pixdim"][:4], theirs.header["pixdim"][:4])
    assert report.changed == ()
    assert report.shape == shape
    assert not any(bytes(ours.header[field]).strip(b"\0") for field in TEXTS if field in ours.header)
    again = read_scan(out, "a")
    assert again.digest == read_scan(source, "a").digest


def itk_agrees(one: Path | SimpleITK.Image, other: Path, atol_mm: float = 1e-3):
    """SimpleITK finds the same values at the same places of the patient in two files."""
    first = one if isinstance(one, SimpleITK.Image) else SimpleITK.ReadImage(str(one), SimpleITK.sitkFloat64)
    second = SimpleITK.ReadImage(str(other), SimpleITK.sitkFloat64)
    first = SimpleITK.Cast(first, SimpleITK.sitkFloat64)
    rng = np.random.default_rng(0)
    values = SimpleITK.GetArrayViewFromImage(first).transpose(2, 1, 0)
    found = SimpleITK.GetArrayViewFromImage(second).transpose(2, 1, 0)
    assert sorted(values.shape) == sorted(found.shape)
    for index in rng.integers(0, values.shape, (100, 3)).tolist():
        place = first.TransformIndexToPhysicalPoint(index)
        there = np.array(second.TransformPhysicalPointToContinuousIndex(place))
        nearest = np.rint(there).astype(int)
        back = second.TransformIndexToPhysicalPoint(nearest.tolist())
        assert np.linalg.norm(np.subtract(back, place)) <= atol_mm
        assert found[tuple(nearest)] == values[tuple(index)]


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
@pytest.mark.parametrize("codes", ORIENTATIONS[::5])
def test_simpleitk_finds_every_voxel_where_it_was(tmp_path, suffix, codes):
    voxels = np.random.default_rng(2).integers(-1000, 2000, (5, 6, 7)).astype(np.int16)
    turned = affine_of((8, -12, 15), (0.7, 1.1, 2.5), (1, 1, 1), (0, 1, 2), (40, 95, -60))
    affine = turned @ inv_ornt_aff(axcodes2ornt(tuple(codes)), voxels.shape)
    nifti = write_nifti(tmp_path / "in.nii.gz", voxels, affine, (1, 1))
    source = tmp_path / f"same{suffix}"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(nifti)), str(source))
    out, report = through_chunks(source, tmp_path)
    itk_agrees(source, out)
    assert raw(out).dtype == np.int16
    assert report.changed == ()
    np.testing.assert_allclose(nib.load(out).affine, affine, atol=1e-4)
    np.testing.assert_array_equal(raw(out), voxels)


def test_mgh_comes_back_in_its_own_order(tmp_path, oblique_affine):
    voxels = np.random.default_rng(2).integers(0, 200, (5, 6, 7)).astype(np.uint8)
    nib.save(nib.MGHImage(voxels, oblique_affine), tmp_path / "in.mgz")
    out, _ = through_chunks(tmp_path / "in.mgz", tmp_path)
    np.testing.assert_array_equal(raw(out), voxels)
    np.testing.assert_allclose(nib.load(out).affine, nib.load(tmp_path / "in.mgz").affine, atol=1e-4)


@pytest.fixture
def oblique_affine():
    """Oblique, anisotropic, PSR as many heads are stored."""
    return affine_of((8, -12, 15), (0.9, 1.1, 2.5), (-1, 1, 1), (1, 2, 0), (40, 95, -60))


def test_a_dicom_series_keeps_its_numbers_and_places(tmp_path, monkeypatch):
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "key"))
    voxels = np.random.default_rng(0).integers(-1000, 3000, (6, 7, 5)).astype(np.int16)
    write_series(tmp_path / "series", voxels, scaling=[(1.5, -7)])
    with isimed_index.create(tmp_path / "s.isimed") as store:
        (scan,) = store.add(tmp_path / "series").added
        report = store.export_scan(scan, tmp_path / "out.nii")
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path / "series")))
    itk_agrees(reader.Execute(), tmp_path / "out.nii")
    assert (raw(tmp_path / "out.nii").dtype, report.changed) == (np.int16, ())
    assert scaling_in(tmp_path / "out.nii") == "(1.5, -7.0)"


@pytest.fixture
def source(tmp_path, oblique_affine):
    """A scan with labels beside it, scaled, so that labels could be scaled wrongly."""
    voxels = np.random.default_rng(4).integers(-900, 2000, (9, 8, 7)).astype(np.int16)
    write_nifti(tmp_path / "a.nii.gz", voxels, oblique_affine, (1, 1), scaling=(2, -1024))
    write_nifti(tmp_path / "a_seg.nii.gz", (voxels > 0).astype(np.uint8) * 7, oblique_affine, (1, 1))
    return tmp_path / "a.nii.gz"


@pytest.fixture
def store(tmp_path, source):
    with isimed_index.create(tmp_path / "s.isimed") as made:
        assert made.add(source, labels="{stem}_seg.nii.gz").added == ["a"]
        yield made


def test_labels_come_back_on_the_grid_of_their_scan(tmp_path, store, source):
    report = store.export_scan("a", tmp_path / "x.nii.gz", labels=tmp_path / "x_seg.nii")
    given = tmp_path / "a_seg.nii.gz"
    np.testing.assert_array_equal(raw(tmp_path / "x_seg.nii"), raw(given))
    np.testing.assert_array_equal(nib.load(tmp_path / "x_seg.nii").get_fdata(), nib.load(given).get_fdata())
    np.testing.assert_array_equal(nib.load(tmp_path / "x_seg.nii").affine, nib.load(source).affine)
    assert raw(tmp_path / "x_seg.nii").dtype == np.uint8
    np.testing.assert_array_equal(nib.load(tmp_path / "x.nii.gz").get_fdata(), nib.load(source).get_fdata())
    assert (report.scan, report.out, report.labels, report.orientation) == ("a", "x.nii.gz", "x_seg.nii", "PSR")
    labels = read_labels(tmp_path / "x_seg.nii", read_scan(tmp_path / "x.nii.gz", "a"), {})
    np.testing.assert_array_equal(np.unique(labels.voxels), [0, 7])


def test_labels_alone(tmp_path, store):
    assert store.export_scan("a", labels=tmp_path / "only.nii.gz").out is None
    assert {path.name for path in tmp_path.glob("only*")} == {"only.nii.gz"}


def test_a_zipped_export_holds_no_name_and_no_time(tmp_path, store):
    store.export_scan("a", tmp_path / "secret.nii.gz")
    content = (tmp_path / "secret.nii.gz").read_bytes()
    assert content[3] == 0  # flags: no name, no comment
    assert content[4:8] == b"\0\0\0\0"
    store.export_scan("a", tmp_path / "other.nii.gz")
    assert (tmp_path / "other.nii.gz").read_bytes() == content
    assert b"DOE" not in gzip.decompress(content)


def test_a_resampled_scan_is_exported_as_it_is_stored_and_says_so(tmp_path, source):
    with isimed_index.create(tmp_path / "s.isimed") as store:
        store.add(source, spacing_mm=1.5)
        report = store.export_scan("a", tmp_path / "x.nii.gz")
        stored = open_chunks(store.snapshot.chunks_path("a"))
    assert any("resampled" in change for change in report.changed)
    image = nib.load(tmp_path / "x.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(image.affine, stored.affine, atol=1e-4)
    np.testing.assert_array_equal(raw(tmp_path / "x.nii.gz"), stored.voxels())


def test_voxels_that_were_mended_are_said(tmp_path):
    voxels = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    voxels[1, 2, 3] = np.nan
    _, report = through_chunks(write_nifti(tmp_path / "in.nii", voxels, np.eye(4), (1, 1)), tmp_path)
    assert report.changed == ("1 voxels that were no finite numbers hold the least value",)


@pytest.mark.parametrize("forms", [(1, 0), (0, 1)])
def test_a_scan_of_an_earlier_version_comes_back_too(tmp_path, forms, oblique_affine):
    voxels = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.uint16)
    source = write_nifti(tmp_path / "in.nii", voxels, oblique_affine, forms, scaling=(0.5, 1))
    scan = read_scan(source, "a")
    attributes = {key: value for key, value in scan.attributes.items() if key != "source_header"}
    write_chunks(Scan("a", scan.voxels, scan.affine, 0.5, 1.0, attributes), None, tmp_path / "a.zarr")
    report = export_scan(open_chunks(tmp_path / "a.zarr"), "a", tmp_path / "out.nii")
    np.testing.assert_array_equal(raw(tmp_path / "out.nii"), voxels)
    np.testing.assert_allclose(nib.load(tmp_path / "out.nii").affine, nib.load(source).affine, atol=1e-5)
    assert "earlier version" in report.changed[0]


@pytest.mark.parametrize(
    "said",
    ["{", '{"sform_code": "x"}', '{"no_such_field": 1}', '{"sform_code": 1, "srow_x": [2, 0, 0, 0]}', "[]"],
)
def test_a_kept_header_that_does_not_fit_is_damage_and_no_export(tmp_path, said):
    voxels = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.uint16)
    scan = read_scan(write_nifti(tmp_path / "in.nii", voxels, np.eye(4), (0, 1)), "a")
    changed = Scan("a", scan.voxels, scan.affine, attributes={**scan.attributes, "source_header": said})
    write_chunks(changed, None, tmp_path / "a.zarr")
    with pytest.raises(StoreDamaged, match="geometry that was kept"):
        export_scan(open_chunks(tmp_path / "a.zarr"), "a", tmp_path / "out.nii")
    assert not list(tmp_path.glob("*out*"))


def test_a_changed_scaling_is_damage_too(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.uint16)
    scan = read_scan(write_nifti(tmp_path / "in.nii", voxels, np.eye(4), (0, 1), scaling=(2, 0)), "a")
    write_chunks(Scan("a", scan.voxels, scan.affine, 3.0, 0.0, scan.attributes), None, tmp_path / "a.zarr")
    with pytest.raises(StoreDamaged):
        export_scan(open_chunks(tmp_path / "a.zarr"), "a", tmp_path / "out.nii")


@pytest.mark.parametrize("name", ["x.nrrd", "x.mha", "x", "x.nii.bz2", "x.img", "nii.gz.tmp"])
def test_other_suffixes_are_refused_by_name(tmp_path, store, name):
    with pytest.raises(UsageError, match=f"{name} is no name of a NIfTI file"):
        store.export_scan("a", tmp_path / name)
    assert not (tmp_path / name).exists()


def test_what_is_there_stays_unless_forced(tmp_path, store, source):
    out = tmp_path / "x.nii.gz"
    out.write_text("mine")
    with pytest.raises(UsageError, match="is there already"):
        store.export_scan("a", out)
    assert out.read_text() == "mine"
    store.export_scan("a", out, force=True)
    np.testing.assert_array_equal(raw(out), raw(source))
    (tmp_path / "folder.nii").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        store.export_scan("a", tmp_path / "folder.nii", force=True)


def test_what_cannot_be_exported_leaves_nothing(tmp_path, store, source):
    out = tmp_path / "new" / "x.nii.gz"
    out.parent.mkdir()
    with pytest.raises(NotFound):
        store.export_scan("b", out)
    with pytest.raises(UsageError, match="found none"):
        store.export_scan("a")
    with pytest.raises(UsageError, match="cannot be one file"):
        store.export_scan("a", out, labels=out)
    with pytest.raises(UsageError, match="inside the store"):
        store.export_scan("a", store.path / "x.nii.gz")
    with pytest.raises(UsageError, match="does not exist"):
        store.export_scan("a", out.parent / "none" / "x.nii")
    shard = next(store.snapshot.chunks_path("a").glob("0/c/*/*/*"))
    shard.write_bytes(shard.read_bytes()[:-9] + b"123456789")
    with pytest.raises(StoreDamaged):
        store.export_scan("a", out)
    assert list(out.parent.iterdir()) == []


def test_a_scan_without_labels_has_none_to_export(tmp_path, source):
    with isimed_index.create(tmp_path / "t.isimed") as store:
        store.add(source)
        with pytest.raises(NotFound, match="has no label map"):
            store.export_scan("a", tmp_path / "x.nii.gz", labels=tmp_path / "y.nii.gz")
    assert not list(tmp_path.glob("[xy].*"))
    assert not list(tmp_path.glob(".*partial"))


def test_kept_headers_are_plain_json(source):
    said = json.loads(str(read_scan(source, "a").attributes["source_header"]))
    assert said["scl_slope"] == 2
    assert "DOE" not in json.dumps(said)


@pytest.mark.real
def test_real_files_come_back(real_data, tmp_path):
    """Every file that stands alone, and a sample of those that are many of a kind; all with ISIMED_REAL=all."""
    from isimed_index.errors import ScanRefused

    found = sorted(path for path in real_data.rglob("*") if path.name.endswith((*SUFFIXES, ".mha", ".mgz", ".nrrd")))
    beside = Counter(path.parent for path in found)
    step = 1 if os.environ.get("ISIMED_REAL") == "all" else 40
    files = [path for number, path in enumerate(found) if beside[path.parent] < 40 or number % step == 0]
    exported = 0
    for number, source in enumerate(files):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            out, report = through_chunks(source, folder)
        except ScanRefused:  # 4-D, colour, …: other tests say which
            continue
        exported += 1
        if source.name.endswith(SUFFIXES):
            assert not report.changed, source.name
            np.testing.assert_array_equal(raw(out), raw(source).squeeze())
            np.testing.assert_array_equal(nib.load(out).affine, nib.load(source).affine)
            assert scaling_in(out) == scaling_in(source)
        elif source.name.endswith(".mgz"):
            np.testing.assert_array_equal(raw(out), np.asanyarray(nib.load(source).dataobj))
            np.testing.assert_allclose(nib.load(out).affine, nib.load(source).affine, atol=1e-3)
        else:
            itk_agrees(source, out)
        shutil.rmtree(folder)
    assert exported > 10
    print(f"{exported} of {len(files)} files exported")
