"""The proof of geometry: what is stored lies where SimpleITK and nibabel say, with the values they read."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from dicoms import GDCM, SYNTAXES, grid, noise, smooth, write_enhanced, write_series
from judges import agrees_with, agrees_with_nibabel, itk_image, itk_series, stored_scan

from isimed_index.api import Store, create
from isimed_index.scans.discover import find_files
from isimed_index.scans.read import read_scan
from isimed_index.space import apply_affine, inverse

TOLERANCE_MM = 1e-3
RAS = np.diag([-1.0, -1, 1, 1]) @ grid()
NOT_NIBABEL = (".nrrd", ".mha")
NOT_ITK = (".mgz",)


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    monkeypatch.setenv("ISIMED_SURROGATE_KEY", str(tmp_path / "surrogate.key"))
    return create(tmp_path / "s.isimed")


def say(what: str, worst: dict[str, float], record_property) -> None:
    """Keep the largest deviation with the test's result (and show it under -rP)."""
    name = max(worst, key=worst.__getitem__)
    record_property("largest_deviation_mm", worst[name])
    print(f"{what}: {len(worst)} judged, largest deviation {worst[name]:.3g} mm ({name})")


@pytest.mark.real
@pytest.mark.parametrize("folder", ["ct", "odd", "hippocampus", "ixi"])
def test_real_files_from_the_store(store, real_data, folder, record_property):
    """Every file: 100 random voxels by both judges, and all voxels bit for bit."""
    rng = np.random.default_rng(1)
    report = store.add(real_data / folder, layout="files", workers=2)
    refused = {item.name for item in report.refused}
    assert refused <= {"complex.nii.gz", "ct_perfusion.nii.gz", "mpld_asl.nii.gz"}
    if "mpld_asl.nii.gz" in refused:
        assert store.add(real_data / folder / "mpld_asl.nii.gz", volume=7).added == ["mpld_asl_vol-7"]
        refused.remove("mpld_asl.nii.gz")
    rows = store.sql("SELECT digest, scan FROM scans")
    by_digest = dict(zip(*[column.to_pylist() for column in rows.columns], strict=True))
    itk, nibabel = {}, {}
    for path in find_files([real_data / folder]):
        if path.name in refused or path.suffix == ".dcm":
            continue
        four = path.name == "mpld_asl.nii.gz"
        scan = stored_scan(store, by_digest[read_scan(path, "a", 7 if four else None).digest])
        if not path.name.endswith(NOT_NIBABEL):
            image = nib.load(path)
            nibabel[path.name] = agrees_with_nibabel(scan, image.slicer[..., 7] if four else image, rng)
        if not path.name.endswith(NOT_ITK):
            image = itk_image(path)
            if four:
                image = SimpleITK.Extract(image, [*image.GetSize()[:3], 0], [0, 0, 0, 7])
            itk[path.name] = agrees_with(scan, image, rng)
    assert len(itk) + len(nibabel) > 10
    say(f"{folder}, SimpleITK", itk, record_property)
    say(f"{folder}, nibabel", nibabel, record_property)
    assert max(*itk.values(), *nibabel.values()) < TOLERANCE_MM


@pytest.mark.real
def test_real_series_from_the_store(store, real_data, tmp_path, record_property):
    """Every series that is a volume, each added by itself; SimpleITK reads it as float64."""
    rng = np.random.default_rng(2)
    folders = sorted({path.parent for path in (real_data / "dicom").rglob("*") if path.is_file()})
    worst, refused = {}, []
    for number, folder in enumerate(folders):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        report = store.add(folder)
        refused += [item.reason for item in report.refused]
        if not (ids := report.added + report.unchanged):  # the same images in another syntax are one scan
            continue
        (scan,) = ids
        if len(files) == 1:
            image = itk_image(files[0], SimpleITK.sitkFloat64)
        else:
            image = itk_series(files, SimpleITK.sitkFloat64)
        worst[f"{number} {folder.name}"] = agrees_with(stored_scan(store, scan), image, rng)
    say("series", worst, record_property)
    assert len(worst) >= 10
    assert max(worst.values()) < TOLERANCE_MM
    assert any("1 slice is missing" in reason for reason in refused)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_generated_series_in_each_transfer_syntax(store, tmp_path, syntax, record_property):
    """From the store: SimpleITK's places and values at 100 voxels, and every voxel that was written, bit for bit."""
    voxels = smooth(dtype=np.uint8 if syntax == "jpeg-baseline" else np.int16)
    paths = write_series(tmp_path / "in", voxels, syntax=syntax)
    (added,) = store.add(tmp_path / "in").added
    scan = stored_scan(store, added)
    worst = agrees_with(scan, itk_series(paths), np.random.default_rng(3))
    say(syntax, {syntax: worst}, record_property)
    assert worst < TOLERANCE_MM
    assert scan.voxels.dtype == voxels.dtype
    index = np.argwhere(np.ones(voxels.shape, bool))
    at = np.rint(apply_affine(inverse(scan.affine) @ RAS, index)).astype(int)
    back = scan.voxels[tuple(at.T)].reshape(voxels.shape)
    if syntax in GDCM and not GDCM[syntax][1]:
        np.testing.assert_allclose(back.astype(int), voxels, atol=8)
    else:
        np.testing.assert_array_equal(back, voxels)


@pytest.mark.parametrize("syntax", ["explicit", "implicit", "deflated", "rle", "jpeg-ls", "jpeg-2000-lossless"])
def test_generated_enhanced_files(store, tmp_path, syntax, record_property):
    voxels = smooth(dtype=np.int16)
    path = write_enhanced(tmp_path / "in" / "e.dcm", voxels, syntax=syntax)
    (added,) = store.add(path.parent).added
    scan = stored_scan(store, added)
    index = np.random.default_rng(4).integers(0, voxels.shape, (100, 3))
    places = apply_affine(RAS, index)
    at = np.rint(apply_affine(inverse(scan.affine), places)).astype(int)
    worst = float(np.linalg.norm(apply_affine(scan.affine, at) - places, axis=1).max())
    say(syntax, {syntax: worst}, record_property)
    assert worst < TOLERANCE_MM
    np.testing.assert_array_equal(scan.voxels[tuple(at.T)], voxels[tuple(index.T)])


@pytest.mark.parametrize("codes", [(1, 1), (1, 2), (2, 1), (1, 4), (4, 1), (0, 1), (1, 0)])
def test_where_the_two_transforms_of_a_header_disagree_the_sform_decides(store, tmp_path, codes):
    """The rule is nibabel's: the sform when its code is set, else the qform; SimpleITK may choose the other one."""
    qform, sform = RAS.copy(), RAS.copy()
    qform[:3, 3] += 40
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image(noise(), sform)
    image.set_sform(sform if codes[1] else None, codes[1])
    image.set_qform(qform, codes[0])
    nib.save(image, path)
    scan = stored_scan(store, store.add(path).added[0])
    assert agrees_with_nibabel(scan, nib.load(path), np.random.default_rng(5)) < TOLERANCE_MM
    assert scan.attributes["affine_source"] == ("sform" if codes[1] else "qform")
    apart = scan.attributes.get("other_transform_apart_mm")
    assert apart == (pytest.approx(np.sqrt(3) * 40, abs=1e-3) if all(codes) else None)
    first = apply_affine(scan.affine, np.argwhere(scan.voxels == noise()[0, 0, 0]))
    wanted = (sform if codes[1] else qform)[:3, 3]
    assert np.linalg.norm(first - wanted, axis=1).min() < TOLERANCE_MM
    itk = np.array(itk_image(path).GetOrigin()) * [-1, -1, 1]
    assert min(np.linalg.norm(itk - form[:3, 3]) for form in (sform, qform)) < TOLERANCE_MM


def test_transforms_that_agree_say_nothing(store, tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(noise(), RAS)
    image.set_sform(RAS, 1)
    image.set_qform(RAS, 1)
    nib.save(image, path)
    assert "other_transform_apart_mm" not in stored_scan(store, store.add(path).added[0]).attributes
