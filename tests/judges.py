"""SimpleITK and nibabel as independent judges of where voxels lie and what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK

from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.scan import Scan
from isimed_index.space import apply_affine, flip_lps, inverse


def itk_image(path: Path | Sequence[Path], pixel=None):
    """An image as SimpleITK reads it; a series from its files in the order given."""
    named = str(path) if isinstance(path, Path) else [str(one) for one in path]
    return SimpleITK.ReadImage(named) if pixel is None else SimpleITK.ReadImage(named, pixel)


def itk_series(files: Sequence[Path], pixel=None):
    """One DICOM series, its files sorted by SimpleITK; they lie in one folder."""
    reader = SimpleITK.ImageSeriesReader()
    ids = set(reader.GetGDCMSeriesIDs(str(files[0].parent)))
    names = [reader.GetGDCMSeriesFileNames(str(files[0].parent), one) for one in ids]
    (ordered,) = [some for some in names if {Path(name) for name in some} == set(files)]
    return itk_image([Path(name) for name in ordered], pixel)


def agrees_with(scan: Scan, image, rng: np.random.Generator, count: int = 100) -> float:
    """The largest distance in mm between our and the judge's place of random voxels; their values must be equal.

    Values are compared bit for bit, in the narrower of the two types where one has applied a scaling.
    """
    judged = SimpleITK.GetArrayViewFromImage(image).transpose(2, 1, 0)
    assert sorted(judged.shape) == sorted(scan.shape)
    index = rng.integers(0, judged.shape, (count, 3))
    places = np.array([image.TransformIndexToPhysicalPoint([int(i) for i in one]) for one in index])
    ours = apply_affine(inverse(scan.affine), flip_lps(places))
    nearest = np.rint(ours).astype(int)
    assert (nearest >= 0).all()
    assert (nearest < scan.shape).all()
    apart = np.linalg.norm(apply_affine(scan.affine, nearest) - flip_lps(places), axis=1)
    values = scan.voxels[tuple(nearest.T)]
    if (scan.slope, scan.intercept) != (1, 0):
        values = values * scan.slope + scan.intercept
    narrower = min(values.dtype, judged.dtype, key=lambda dtype: dtype.itemsize)
    np.testing.assert_array_equal(values.astype(narrower), judged[tuple(index.T)].astype(narrower))
    return float(apart.max())


def agrees_with_nibabel(scan: Scan, image, rng: np.random.Generator, count: int = 100) -> float:
    """The largest distance in mm between our and nibabel's place of random voxels.

    All stored voxels must be nibabel's unscaled ones, bit for bit, and the scaling must be the same.
    """
    index = rng.integers(0, image.shape, (count, 3))
    places = nib.affines.apply_affine(image.affine, index)
    nearest = np.rint(apply_affine(inverse(scan.affine), places)).astype(int)
    assert ((nearest >= 0) & (nearest < scan.shape)).all()
    apart = np.linalg.norm(apply_affine(scan.affine, nearest) - places, axis=1)
    unscaled = image.dataobj.get_unscaled() if nib.is_proxy(image.dataobj) else np.asarray(image.dataobj)
    np.testing.assert_array_equal(scan.voxels[tuple(nearest.T)], unscaled[tuple(index.T)])
    turn = nib.orientations.io_orientation(image.affine)
    np.testing.assert_array_equal(scan.voxels, nib.orientations.apply_orientation(unscaled, turn))
    if nib.is_proxy(image.dataobj):
        assert (scan.slope, scan.intercept) == (image.dataobj.slope, image.dataobj.inter)
    return float(apart.max())


def stored_scan(store, scan: str) -> Scan:
    """A scan as it lies in a store, in the form that the judges take."""
    stored = open_chunks(store.snapshot.chunks_path(scan), scan)
    return Scan(scan, stored.voxels(), stored.affine, stored.slope, stored.intercept, stored.attributes)
