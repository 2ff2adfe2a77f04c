"""Geometry against nibabel as an independent judge."""

import nibabel as nib
import numpy as np
import pytest
from affines import affine_of, affines
from hypothesis import given
from hypothesis import strategies as st

from isimed_index import space
from isimed_index.errors import ScanRefused, UsageError

SHAPES = st.tuples(*[st.integers(2, 6)] * 3)


@given(affine=affines(shear=0.3), shape=SHAPES)
def test_to_ras_agrees_with_nibabel(affine, shape):
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    turned, moved = space.to_ras(voxels, affine)
    judge = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine))
    np.testing.assert_array_equal(turned, np.asarray(judge.dataobj))
    np.testing.assert_allclose(moved, judge.affine, atol=1e-9)
    assert space.orientation(moved) == "RAS"


@given(affine=affines(shear=0.3), shape=SHAPES)
def test_to_ras_leaves_every_voxel_at_its_place(affine, shape):
    voxels = np.arange(np.prod(shape)).reshape(shape)
    turned, moved = space.to_ras(voxels, affine)
    before = space.apply_affine(affine, np.argwhere(voxels >= 0))
    index = np.argwhere(turned >= 0)
    after = space.apply_affine(moved, index)
    np.testing.assert_allclose(after[np.argsort(turned[tuple(index.T)])], before, atol=1e-6)


@given(affine=affines(shear=0.3), shape=SHAPES)
def test_the_source_orientation_brings_the_source_affine_back(affine, shape):
    turned, moved = space.to_ras(np.zeros(shape), affine)
    again = space.affine_in_orientation(moved, turned.shape, space.orientation(affine))
    np.testing.assert_allclose(again, affine, atol=1e-6)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PSR", "AIL", "IRP"])
def test_orientation_names_the_axes(codes):
    axes = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    affine[:3, :3] = np.array([axes[code] for code in codes]).T
    assert space.orientation(affine) == codes


@given(affine=affines(shear=0.3), point=st.tuples(*[st.floats(-500, 500)] * 3))
def test_apply_affine_agrees_with_nibabel_and_its_inverse_undoes_it(affine, point):
    mm = space.apply_affine(affine, point)
    np.testing.assert_allclose(mm, nib.affines.apply_affine(affine, point), atol=1e-9)
    np.testing.assert_allclose(space.apply_affine(space.inverse(affine), mm), point, atol=1e-6)


@given(affine=affines())
def test_spacing_agrees_with_nibabel(affine):
    np.testing.assert_allclose(space.spacing_mm(affine), nib.affines.voxel_sizes(affine))


@given(affine=affines(), point=st.tuples(*[st.floats(-500, 500)] * 3), name=st.sampled_from(["ras", "lps", "voxel"]))
def test_spaces_round_trip(affine, point, name):
    there = space.from_ras_mm(point, name, affine)
    np.testing.assert_allclose(space.to_ras_mm(there, name, affine), point, atol=1e-6)


def test_lps_turns_the_first_two_axes():
    np.testing.assert_array_equal(space.to_ras_mm([[1, 2, 3]], "lps", np.eye(4)), [[-1, -2, 3]])
    np.testing.assert_array_equal(space.flip_lps([4, -5, 6]), [-4, 5, 6])


def test_voxel_zero_is_the_centre_of_the_first_voxel():
    affine = affine_of((10, 20, 30), (1, 2, 3), (1, -1, 1), (0, 1, 2), (7, 8, 9))
    np.testing.assert_array_equal(space.to_ras_mm([0, 0, 0], "voxel", affine), [7, 8, 9])


@pytest.mark.parametrize("convert", [space.to_ras_mm, space.from_ras_mm])
def test_an_unknown_space_is_a_usage_error(convert):
    with pytest.raises(UsageError, match="'mni'"):
        convert([0, 0, 0], "mni", np.eye(4))


@given(affine=affines(shear=0.3))
def test_sound_affines_are_accepted_as_they_are(affine):
    np.testing.assert_array_equal(space.checked_affine(affine.tolist()), affine)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (np.eye(3), "shape"),
        (np.diag([1, 1, 0, 1]), "singular"),
        (np.diag([1, np.nan, 1, 1]), "NaN"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "singular"),
        (np.diag([1, 1, 1, 2]), "last row"),
    ],
)
def test_affines_that_place_nothing_are_refused(broken, says):
    with pytest.raises(ScanRefused, match=says):
        space.checked_affine(broken)
