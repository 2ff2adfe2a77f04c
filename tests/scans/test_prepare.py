"""Resampling keeps physical points in place; scaling follows the percentiles."""

import numpy as np
import pytest
from affines import affines
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from isimed_index import space
from isimed_index.errors import UsageError
from isimed_index.grid import Box
from isimed_index.scans.prepare import Intensity, WorkingGrid, prepare, resample, thick_slices

SHAPES = st.tuples(*[st.integers(5, 14)] * 3)


def extent_centre_mm(shape, affine):
    return space.apply_affine(affine, (np.array(shape) - 1) / 2)


@given(affine=affines(shear=0.3), shape=SHAPES, spacing=st.floats(0.8, 4))
def test_the_new_grid_is_isotropic_along_the_same_axes_and_centred(affine, shape, spacing):
    values, moved = resample(np.zeros(shape, np.float32), affine, spacing)
    if moved is affine:
        assert np.abs(space.spacing_mm(affine) / spacing - 1).max() <= 0.01
        return
    np.testing.assert_allclose(space.spacing_mm(moved), spacing)
    directions = [matrix[:3, :3] / space.spacing_mm(matrix) for matrix in (affine, moved)]
    np.testing.assert_allclose(*directions, atol=1e-9)
    np.testing.assert_allclose(extent_centre_mm(values.shape, moved), extent_centre_mm(shape, affine), atol=1e-6)
    extents = np.array(shape) * space.spacing_mm(affine), np.array(values.shape) * spacing
    assert (np.abs(extents[0] - extents[1]) <= np.maximum(spacing / 2, spacing - extents[0]) + 1e-6).all()


@given(affine=affines(), spacing=st.floats(0.8, 4))
def test_a_physical_point_keeps_its_value(affine, spacing):
    """A field that is linear in millimetres is the same function of millimetres after resampling."""
    shape = (24, 22, 23)
    slope = np.array([0.5, -1.0, 2.0])
    field = (space.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)) @ slope).astype(np.float32)
    values, moved = resample(field, affine, spacing)
    expected = space.apply_affine(moved, np.moveaxis(np.indices(values.shape), 0, -1)) @ slope
    source = space.apply_affine(space.inverse(affine) @ moved, np.moveaxis(np.indices(values.shape), 0, -1))
    reach = 2 + 2 * np.maximum(spacing / space.spacing_mm(affine), 1)  # voxels that the smoothing can see past an edge
    inner = ((source >= reach) & (source <= np.array(shape) - 1 - reach)).all(axis=-1)
    np.testing.assert_allclose(values[inner], expected[inner], atol=2e-3 * max(1.0, np.abs(expected).max() / 100))


def test_a_bright_spot_stays_where_it_is(oblique):
    values = np.zeros((30, 28, 12), np.float32)
    values[17, 9, 6] = 1
    for spacing in (0.7, 1.5, 3.0):
        moved_values, moved = resample(values, oblique, spacing)
        centre = np.array(ndimage.center_of_mass(moved_values))
        apart = space.apply_affine(moved, centre) - space.apply_affine(oblique, [17, 9, 6])
        assert np.linalg.norm(apart) < 0.35 * spacing + 0.1


def test_enlarging_is_linear_interpolation():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 7, 8)).astype(np.float32)
    resampled, moved = resample(values, np.diag([2.0, 3.0, 2.5, 1]), 1.0)
    index = space.apply_affine(np.linalg.inv(np.diag([2.0, 3.0, 2.5, 1])) @ moved, np.argwhere(resampled < np.inf))
    oracle = ndimage.map_coordinates(values, index.T, order=1, mode="nearest")
    np.testing.assert_allclose(resampled.ravel(), oracle, atol=1e-5)


def test_shrinking_smooths_before_it_interpolates():
    values = np.random.default_rng(0).normal(size=(24, 25, 26)).astype(np.float32)
    resampled, moved = resample(values, np.eye(4), 2.0)
    sigma = np.sqrt(2.0**2 - 1) / (2 * np.sqrt(2 * np.log(2)))
    smooth = ndimage.gaussian_filter(values, sigma, mode="nearest", truncate=4.9)
    index = space.apply_affine(moved, np.argwhere(resampled < np.inf))
    oracle = ndimage.map_coordinates(smooth, index.T, order=1, mode="nearest")
    np.testing.assert_allclose(resampled.ravel(), oracle, atol=1e-3)


def test_aliasing_is_suppressed():
    stripes = np.zeros((64, 8, 8), np.float32)
    stripes[::2] = 1
    resampled, _ = resample(stripes, np.diag([1.0, 4.0, 4.0, 1]), 4.0)
    assert np.ptp(resampled[2:-2]) < 0.02


@pytest.mark.parametrize("spacing", [1.0, 1.009, 0.991])
def test_within_one_percent_nothing_is_touched(spacing):
    values = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    same, affine = resample(values, np.eye(4), spacing)
    assert same is values
    np.testing.assert_array_equal(affine, np.eye(4))


@pytest.mark.parametrize("spacing", [0.0, -1.0, np.nan, np.inf])
def test_a_spacing_that_is_none_is_a_usage_error(spacing):
    with pytest.raises(UsageError, match="positive spacing"):
        resample(np.zeros((2, 2, 2), np.float32), np.eye(4), spacing)


def test_one_slab_can_become_one_voxel():
    values, affine = resample(np.ones((9, 9, 2), np.float32), np.diag([1.0, 1, 0.5, 1]), 4.0)
    assert values.shape == (2, 2, 1)
    np.testing.assert_allclose(values, 1, rtol=1e-6)
    np.testing.assert_allclose(space.apply_affine(affine, [0.5, 0.5, 0]), [4, 4, 0.25])


def test_percentiles_go_to_their_places_and_beyond_is_cut_off():
    values = np.linspace(100, 300, 20 * 20 * 20, dtype=np.float32).reshape(20, 20, 20)
    scaled = Intensity(10, 90, -1, 1, clip=1.1).scale(values)
    low, high = np.percentile(values, [10, 90])
    np.testing.assert_allclose(np.interp([low, high], values.ravel(), scaled.ravel()), [-1, 1], atol=1e-3)
    assert scaled.min() == np.float32(-1.1)
    assert scaled.max() == np.float32(1.1)
    assert scaled.dtype == np.float32
    assert values.min() == 100


def test_without_a_clip_values_beyond_the_percentiles_go_on_as_monais_do():
    """Held against MONAI's own transform, which the paper names; heavy tails on both sides."""
    from monai.transforms import ScaleIntensityRangePercentiles

    values = np.random.default_rng(3).standard_t(2, (20, 21, 22)).astype(np.float32) * 300 + 80
    judged = ScaleIntensityRangePercentiles(lower=5, upper=95, b_min=-1, b_max=1)(values)
    scaled = Intensity(clip=0).scale(values)
    np.testing.assert_allclose(scaled, np.asarray(judged), rtol=1e-5, atol=1e-5)
    assert scaled.min() < -3
    assert scaled.max() > 3
    volume = prepare(values, np.eye(4), None, Intensity(clip=0))
    np.testing.assert_array_equal(volume.values, scaled)
    np.testing.assert_array_equal(Intensity().scale(values), np.clip(scaled, -1.5, 1.5))
    assert np.array_equal(volume.foreground, prepare(values, np.eye(4), None, Intensity()).foreground)


@given(gain=st.floats(0.01, 100), shift=st.floats(-1000, 1000))
def test_scaling_forgets_gain_and_shift(gain, shift):
    values = np.random.default_rng(0).uniform(0, 100, (6, 6, 6)).astype(np.float32)
    changed = (values * gain + shift).astype(np.float32)
    tolerance = 1e-4 + 1e-6 * abs(shift) / gain
    np.testing.assert_allclose(Intensity().scale(changed), Intensity().scale(values), atol=tolerance)


def test_sparse_content_falls_back_on_the_extremes():
    values = np.zeros((10, 10, 10), np.float32)
    values[4, 4, 4] = 8
    scaled = Intensity().scale(values)
    assert scaled[4, 4, 4] == 1
    assert scaled[0, 0, 0] == -1
    assert (Intensity().scale(np.full((3, 3, 3), 5, np.float32)) == -1).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"low_percentile": 95.0},
        {"high_percentile": 101.0},
        {"low": 1.0},
        {"clip": 0.5},
        {"clip": -1.5},
        {"clip": np.inf},
        {"clip": np.nan},
        {"clip": 0.0, "low": 1.0},
        {"low": -2.0},
        {"window_low": 0.0},
        {"window_low": 5.0, "window_high": 5.0},
        {"window_low": 0.0, "window_high": np.inf},
    ],
)
def test_impossible_scalings_are_usage_errors(fields):
    with pytest.raises(UsageError, match="expected"):
        Intensity(**fields)


def test_a_prepared_head_has_a_background_and_a_body():
    """A ball in air, brighter inside: the foreground is the ball."""
    grid = np.moveaxis(np.indices((40, 40, 20)), 0, -1) * [1, 1, 2]
    ball = np.linalg.norm(grid - 19.5, axis=-1) < 14
    values = np.where(ball, 500 + grid[..., 0] * 10, 3).astype(np.float32)
    volume = prepare(values, np.diag([1.0, 1.0, 2.0, 1]), None, Intensity())
    np.testing.assert_array_equal(volume.foreground, ball)
    assert volume.background == volume.values.min() == volume.values[0, 0, 0]
    np.testing.assert_array_equal(volume.affine, np.diag([1.0, 1.0, 2.0, 1]))
    coarse = prepare(values, np.diag([1.0, 1.0, 2.0, 1]), 2.0, Intensity())
    assert coarse.values.shape == (20, 20, 20)
    assert coarse.foreground.sum() * 8 == pytest.approx(ball.sum() * 2, rel=0.2)


def ball_in_air(air: float, body: float, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Values of a ball in noisy air, and where the ball is."""
    grid = np.moveaxis(np.indices((30, 30, 30)), 0, -1)
    ball = np.linalg.norm(grid - 14.5, axis=-1) < 10
    values = np.where(ball, body, air) + np.random.default_rng(0).normal(scale=noise, size=ball.shape)
    return values.astype(np.float32), ball


@pytest.mark.parametrize("spacing", [None, 2.0])
def test_one_dark_voxel_does_not_make_air_a_body(spacing):
    values, ball = ball_in_air(5, 400, 3)
    sound = prepare(values, np.eye(4), spacing, Intensity())
    values[2, 3, 4] = -30_000
    spoilt = prepare(values, np.eye(4), spacing, Intensity())
    assert spoilt.background == sound.background == Intensity().low
    assert np.array_equal(spoilt.foreground, sound.foreground)
    if spacing is None:
        assert np.array_equal(spoilt.foreground, ball)


def test_padding_of_a_ct_does_not_make_air_a_body():
    values, ball = ball_in_air(-1000, 40, 15)
    values[0] = -3024  # 1 plane of 30, 3 %
    volume = prepare(values, np.eye(4), None, Intensity())
    assert np.array_equal(volume.foreground, ball)
    assert volume.background == -1
    assert volume.values[0].max() == -1.5


def test_a_window_is_the_same_for_every_scan_and_padding_is_air():
    window = Intensity(window_low=-1000.0, window_high=1000.0)
    values, ball = ball_in_air(-1000, 40, 15)
    values[:10] = -3024  # a third of all voxels
    volume = prepare(values, np.eye(4), None, window)
    assert np.array_equal(volume.foreground, ball & (values > -800))
    assert (volume.values[:10] == -1).all()
    np.testing.assert_allclose(volume.values[14, 14, 14], values[14, 14, 14] / 1000, atol=1e-6)
    assert window.scale(np.full((2, 2, 2), 3000, np.float32)).max() == 1
    assert Intensity().fields() == {"low_percentile": 5, "high_percentile": 95, "low": -1, "high": 1, "clip": 1.5}


@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    affine=affines(shear=0.3),
    spacing=st.one_of(st.none(), st.floats(0.5, 6)),
    window=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_a_box_made_alone_is_that_of_the_whole_volume(shape, affine, spacing, window, seed):
    """Whatever the spacing, and at the borders too: the few voxels that are read reach as far as the smoothing sees."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1000, 1000, shape).astype(np.float32)
    intensity = Intensity(window_low=-500.0, window_high=800.0) if window else Intensity()
    whole = prepare(values, affine, spacing, intensity)
    grid = WorkingGrid.of(shape, affine, spacing)
    assert grid.shape == whole.values.shape
    np.testing.assert_array_equal(grid.affine, whole.affine)
    ends = np.sort(rng.integers(0, np.array(grid.shape) + 1, (2, 3)), axis=0)
    start = np.minimum(ends[0], np.array(grid.shape) - 1)
    box = Box(tuple(start), tuple(np.maximum(ends[1], start + 1)))
    needed, within = grid.source_box(box).slices(shape)
    assert all(part == slice(0, n) for part, n in zip(within, grid.source_box(box).shape, strict=True))  # all inside
    part = intensity.scale(grid.part(values[needed], box), whole.ends)
    expected = whole.values[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
    np.testing.assert_allclose(part, expected, atol=1e-4)


def test_a_box_needs_few_voxels_of_the_scan():
    grid = WorkingGrid.of((400, 400, 400), np.eye(4), 2.0)
    assert max(grid.source_box(Box((50, 60, 70), (70, 80, 90))).shape) <= 2 * 20 + 2 * 3 + 1


@given(side=st.integers(8, 60), thickness=st.floats(1, 6), first=st.floats(0, 1))
def test_thick_slices_keep_places(side, thickness, first):
    matrix = thick_slices(side, thickness, first * thickness)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-5)
    line = np.arange(side, dtype=np.float32)
    reach = int(2 * thickness) + 6
    np.testing.assert_allclose((matrix @ line)[reach:-reach], line[reach:-reach], atol=1e-3 * side)


def test_ends_of_an_earlier_preparation_give_the_same_volume():
    values = np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32)
    first = prepare(values, np.eye(4), 2.0, Intensity())
    np.testing.assert_array_equal(prepare(values, np.eye(4), 2.0, Intensity(), first.ends).values, first.values)
    shifted = prepare(values, np.eye(4), 2.0, Intensity(), (-10.0, 10.0)).values
    assert np.abs(shifted).max() < 0.5
