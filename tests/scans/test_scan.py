"""Digest, values and background of a scan, and what importing it costs."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from isimed_index.scans import Scan


@pytest.fixture
def scan(voxels, oblique):
    return Scan("a", voxels, oblique, 0.5, -10.0, {"source_format": "NIfTI-1"})


def test_the_digest_is_of_the_content_only(scan):
    same = replace(scan, id="b", voxels=np.asfortranarray(scan.voxels), attributes={})
    assert same.digest == scan.digest
    assert len(scan.digest) == 64
    big_endian = replace(scan, voxels=scan.voxels.astype(">i2"))
    assert big_endian.digest == scan.digest


def test_every_change_of_content_changes_the_digest(scan):
    voxel, affine = scan.voxels.copy(), scan.affine.copy()
    voxel[0, 0, 0] += 1
    affine[0, 3] += 1e-9
    changed = [
        replace(scan, voxels=voxel),
        replace(scan, voxels=scan.voxels.astype(np.int32)),
        replace(scan, voxels=scan.voxels.view(np.uint16)),
        replace(scan, voxels=scan.voxels.reshape(7, 6, 9)),
        replace(scan, affine=affine),
        replace(scan, slope=1.0),
        replace(scan, intercept=0.0),
    ]
    assert len({scan.digest, *(other.digest for other in changed)}) == len(changed) + 1


def test_values_are_scaled_and_new(scan):
    values = scan.values()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, scan.voxels * 0.5 - 10)
    unscaled = replace(scan, voxels=values, slope=1.0, intercept=0.0)
    assert not np.shares_memory(unscaled.values(), values)


def test_the_background_has_the_least_physical_value(scan):
    assert scan.background == scan.voxels.min()
    assert replace(scan, slope=-0.5).background == scan.voxels.max()


def test_scans_import_nothing_heavy():
    code = (
        "import sys, isimed_index.scans, isimed_index.scans.read, isimed_index.scans.discover, isimed_index.grid;"
        "print([m for m in ('zarr', 'scipy', 'nibabel', 'torch', 'monai', 'pyarrow', 'duckdb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
