"""The whole room on real heads and on files that break readers."""

import nibabel as nib
import numpy as np
import pytest

from isimed_index.errors import ScanRefused
from isimed_index.grid import PatchGrid
from isimed_index.scans.chunks import open_chunks, write_chunks
from isimed_index.scans.discover import find_files, label_path, stem, subject_and_session
from isimed_index.scans.label_names import read_label_names
from isimed_index.scans.prepare import Intensity, prepare
from isimed_index.scans.read import read_labels, read_scan
from isimed_index.space import apply_affine, inverse

pytestmark = pytest.mark.real


def test_ixi_heads_from_file_to_patches(real_data, tmp_path):
    rng = np.random.default_rng(0)
    names = read_label_names(real_data / "ixi" / "labels.tsv")
    assert len(names) == 28
    for image in find_files([real_data / "ixi" / "t1"])[::60]:
        scan = read_scan(image, stem(image))
        assert scan.attributes["source_orientation"] == "PSR"
        assert scan.voxels.dtype == np.uint8
        assert subject_and_session(image, None, r"(.*)_T1")[0] == image.name.removesuffix("_T1.nii.gz")
        labels = read_labels(label_path(image, "../seg/{stem}_DLMUSE.nii.gz"), scan, names)

        # 100 random voxels lie where nibabel says, with nibabel's value
        judge = nib.load(image)
        index = rng.integers(0, judge.shape, (100, 3))
        ours = np.rint(apply_affine(inverse(scan.affine) @ judge.affine, index)).astype(int)
        places = apply_affine(scan.affine, ours), nib.affines.apply_affine(judge.affine, index)
        np.testing.assert_allclose(*places, atol=1e-3)
        theirs = judge.get_fdata()[tuple(index.T)]
        np.testing.assert_allclose(scan.values()[tuple(ours.T)], theirs, rtol=1e-5)

        # left structures are on the left of right ones
        sides = {names[k].split()[0]: [] for k in names}
        for number, name in names.items():
            side, _, structure = name.partition(" ")
            found = np.argwhere(labels.voxels == number)
            if len(found) and side in ("left", "right"):
                sides[side].append((structure, apply_affine(scan.affine, found.mean(axis=0))[0]))
        left, right = dict(sides["left"]), dict(sides["right"])
        assert len(left) > 5
        assert all(left[structure] < right[structure] for structure in left)

        write_chunks(scan, labels, tmp_path / f"{scan.id}.zarr")
        stored = open_chunks(tmp_path / f"{scan.id}.zarr")
        np.testing.assert_array_equal(stored.voxels(), scan.voxels)
        np.testing.assert_array_equal(stored.labels(), labels.voxels)

        volume = prepare(stored.values(), stored.affine, 2.0, Intensity())
        assert volume.values.shape == scan.shape
        assert 0.1 < volume.foreground.mean() < 0.7
        grid = PatchGrid(volume.values.shape, 32, 8, volume.affine)
        inside = grid.foreground_fraction(volume.foreground) > 0.15
        brain = apply_affine(scan.affine, np.argwhere(labels.voxels > 0).mean(axis=0))
        numbers, distances = grid.nearest([brain])
        assert inside[numbers[0]]
        assert distances[0] <= np.sqrt(3) * 8
        assert 0.1 < inside.mean() < 0.9


def test_ct_with_labels_keeps_its_units(real_data):
    scan = read_scan(real_data / "ct" / "example_ct_sm.nii.gz", "ct")
    assert scan.voxels.dtype == np.int16
    assert scan.values().min() < -900
    labels = read_labels(real_data / "ct" / "example_seg.nii.gz", scan, {})
    assert len(np.unique(labels.voxels)) > 10
    with pytest.raises(ScanRefused, match="not on the grid"):
        read_labels(real_data / "ct" / "example_seg_mr.nii.gz", scan, {})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("complex.nii.gz", "complex64"),
        ("ct_perfusion.nii.gz", "RGB"),
        ("mpld_asl.nii.gz", "4-D"),
    ],
)
def test_odd_files_are_refused_with_their_reason(real_data, name, says):
    with pytest.raises(ScanRefused, match=says):
        read_scan(real_data / "odd" / name, "odd")


@pytest.mark.parametrize(("name", "codes"), [("AIL.nii.gz", "AIL"), ("low_res.nii.gz", "RAS")])
def test_odd_files_that_are_sound_are_read(real_data, name, codes):
    scan = read_scan(real_data / "odd" / name, "odd")
    judge = nib.as_closest_canonical(nib.load(real_data / "odd" / name))
    assert scan.attributes["source_orientation"] == codes
    np.testing.assert_allclose(scan.affine, judge.affine, atol=1e-6)
    np.testing.assert_allclose(scan.values(), judge.get_fdata(), rtol=1e-5)
