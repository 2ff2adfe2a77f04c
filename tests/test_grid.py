"""The patch lattice against brute force."""

import numpy as np
import pytest
from affines import affine_of, affines
from hypothesis import given
from hypothesis import strategies as st

from isimed_index.errors import UsageError
from isimed_index.grid import Box, PatchGrid, extract_patches

OBLIQUE = affine_of((12, -20, 33), (1.0, 2.0, 3.5), (1, -1, 1), (1, 0, 2), (-90, 40, 12))


@st.composite
def grids(draw, shear=0.0):
    shape = draw(st.tuples(*[st.integers(1, 14)] * 3))
    return PatchGrid(shape, draw(st.integers(1, 7)), draw(st.integers(1, 6)), draw(affines(shear)))


@given(grid=grids())
def test_numbers_indices_and_boxes_agree(grid):
    numbers = np.arange(len(grid))
    ijk = grid.ijk(numbers)
    assert ijk.shape == (len(grid), 3)
    np.testing.assert_array_equal(ijk, np.argwhere(np.ones(grid.lattice_shape)))
    np.testing.assert_array_equal(grid.number(ijk), numbers)
    for number in numbers[:: max(1, len(grid) // 5)]:
        box = grid.box(int(number))
        assert box.shape == (grid.patch,) * 3
        assert box.start == tuple(np.add(grid.first_start, ijk[number] * grid.stride))
        np.testing.assert_allclose(grid.centres_vox([number])[0], np.add(box.start, np.subtract(box.stop, 1)) / 2)


@given(grid=grids())
def test_the_lattice_is_the_stated_one(grid):
    for n, count, first in zip(grid.shape, grid.lattice_shape, grid.first_start, strict=True):
        assert count == max(1, int(np.ceil(n / grid.stride)))
        assert first == int(np.floor((n - 1 - (count - 1) * grid.stride - (grid.patch - 1)) / 2))


@given(grid=grids())
def test_the_lattice_is_centred_and_leaves_no_voxel_far_from_a_centre(grid):
    for axis, n in enumerate(grid.shape):
        centres = np.unique(grid.centres_vox()[:, axis])
        assert abs((centres[0] + centres[-1]) / 2 - (n - 1) / 2) <= 0.5
        gaps = np.abs(np.arange(n)[:, None] - centres).min(axis=1)
        assert gaps.max() <= grid.stride / 2 + 0.5


def test_patches_as_long_as_the_stride_cover_every_voxel_once():
    grid = PatchGrid((12, 8, 20), 4, 4, np.eye(4))
    covered = np.zeros(grid.shape, dtype=int)
    for number in range(len(grid)):
        source, _ = grid.box(number).slices(grid.shape)
        covered[source] += 1
    assert (covered == 1).all()


@given(grid=grids(shear=0.4))
def test_centres_in_millimetres_come_from_the_affine(grid):
    column = np.c_[grid.centres_vox(), np.ones(len(grid))]
    np.testing.assert_allclose(grid.centres_mm(), (grid.affine @ column.T).T[:, :3], atol=1e-9)


@given(grid=st.one_of(grids(), grids(shear=0.6)), seed=st.integers(0, 2**32 - 1))
def test_nearest_is_exact(grid, seed):
    rng = np.random.default_rng(seed)
    middle = grid.centres_mm().mean(axis=0)
    points = middle + rng.uniform(-1, 1, (20, 3)) * rng.choice([5, 50, 500], (20, 1))
    numbers, distances = grid.nearest(points)
    brute = np.linalg.norm(points[:, None] - grid.centres_mm(), axis=2)
    np.testing.assert_allclose(distances, brute.min(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(distances, brute[np.arange(20), numbers], rtol=1e-9, atol=1e-9)


@given(grid=st.one_of(grids(), grids(shear=0.6)))
def test_a_centre_is_its_own_nearest(grid):
    numbers, distances = grid.nearest(grid.centres_mm())
    np.testing.assert_array_equal(numbers, np.arange(len(grid)))
    assert distances.max() < 1e-6


@given(grid=grids(), seed=st.integers(0, 2**32 - 1))
def test_extract_and_foreground_agree_with_a_padded_volume(grid, seed):
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=grid.shape).astype(np.float32)
    mask = rng.random(grid.shape) < 0.5
    margin = grid.patch + grid.stride
    padded = np.pad(volume, margin, constant_values=-7.0)
    padded_mask = np.pad(mask, margin)
    patches = grid.extract(volume, np.arange(len(grid)), fill=-7.0)
    fractions = grid.foreground_fraction(mask)
    assert patches.dtype == np.float32
    assert fractions.dtype == np.float32
    assert len(fractions) == len(grid)
    for number, start in enumerate(grid.starts_vox() + margin):
        window = tuple(slice(s, s + grid.patch) for s in start)
        np.testing.assert_array_equal(patches[number], padded[window])
        assert fractions[number] == np.float32(padded_mask[window].mean())


def test_patches_may_start_anywhere_even_outside():
    volume = np.arange(27, dtype=np.int16).reshape(3, 3, 3)
    patches = extract_patches(volume, [[1, 1, 1], [-50, 0, 0], [2, 2, 2]], patch=2, fill=9)
    np.testing.assert_array_equal(patches[0], volume[1:, 1:, 1:])
    assert (patches[1] == 9).all()
    assert patches[2, 0, 0, 0] == 26
    assert (patches[2].ravel()[1:] == 9).all()


def test_patches_far_outside_take_no_memory():
    volume = np.arange(27, dtype=np.float32).reshape(3, 3, 3)
    patches = extract_patches(volume, [[10**9, 0, 0], [0, -(10**9), 10**9], [0, 0, 0], [1, -2, 2]], patch=3, fill=9)
    assert (patches[:2] == 9).all()
    np.testing.assert_array_equal(patches[2], volume)
    np.testing.assert_array_equal(patches[3, :2, 2:, :1], volume[1:, :1, 2:])
    assert len(extract_patches(volume, np.empty((0, 3)), patch=3, fill=9)) == 0


def test_a_box_tells_where_it_meets_an_array():
    source, target = Box((-2, 1, 4), (2, 3, 9)).slices((3, 3, 5))
    assert source == (slice(0, 2), slice(1, 3), slice(4, 5))
    assert target == (slice(2, 4), slice(0, 2), slice(0, 1))


@pytest.mark.parametrize("bad", [-1, 8])
def test_numbers_outside_the_grid_are_refused(bad):
    with pytest.raises(UsageError, match="0 to 7"):
        PatchGrid((4, 4, 4), 2, 2, np.eye(4)).ijk([bad])


@pytest.mark.parametrize("bad", [(-1, 0, 0), (0, 2, 0)])
def test_indices_outside_the_lattice_are_refused(bad):
    with pytest.raises(UsageError, match="lattice"):
        PatchGrid((4, 4, 4), 2, 2, np.eye(4)).number([bad])


@pytest.mark.parametrize(("shape", "patch", "stride"), [((0, 4, 4), 2, 2), ((4, 4, 4), 0, 2), ((4, 4, 4), 2, 0)])
def test_a_grid_without_extent_is_refused(shape, patch, stride):
    with pytest.raises(UsageError, match="positive"):
        PatchGrid(shape, patch, stride, np.eye(4))


def test_a_volume_of_another_shape_is_refused():
    grid = PatchGrid((4, 4, 4), 2, 2, OBLIQUE)
    with pytest.raises(UsageError, match=r"\(4, 4, 5\)"):
        grid.extract(np.zeros((4, 4, 5)), [0], 0)
    with pytest.raises(UsageError, match=r"\(3, 4, 4\)"):
        grid.foreground_fraction(np.zeros((3, 4, 4), dtype=bool))


@given(grids(), st.integers(0, 1000))
def test_label_fractions_are_those_of_a_padded_volume(grid, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 0, 0, 3, 7, 500], grid.shape).astype(np.int16)
    labels[: grid.shape[0] // 2] = 0  # a label need not be everywhere
    chosen = np.flatnonzero(rng.random(len(grid)) < 0.7)
    expected = []
    for place, number in enumerate(chosen):
        window = extract_patches(labels, grid.starts_vox([number]), grid.patch, fill=0)[0]
        for label in np.unique(window[window > 0]):
            expected.append((place, int(label), float(np.float32((window == label).mean()))))
    found = grid.label_fractions(labels, chosen)
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected
