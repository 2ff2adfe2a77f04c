"""Views: coordinates exact under any pose and at borders, never mirrored, and contrast that leaves geometry alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from affines import affines
from hypothesis import given, settings
from hypothesis import strategies as st
from pretraining import STILL
from scipy.ndimage import find_objects, label, map_coordinates

from isimed_index.config import Augmentation
from isimed_index.pretrain.holes import disturbed
from isimed_index.pretrain.views import Window, cut, random_pose, reach, recolour, view_affine
from isimed_index.space import Affine, apply_affine

SHAPE = (48, 40, 44)
HALF = 2e-3  # float16 near 1 rounds to 5e-4; interpolation adds a little


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


poses = st.integers(0, 10**6).map(
    lambda seed: random_pose(np.random.default_rng(seed), Augmentation(rotation_deg=40.0, scale=0.3))
)


def test_the_view_is_centred() -> None:
    pose = random_pose(np.random.default_rng(0), Augmentation())
    middle = apply_affine(view_affine(np.array([3.0, 4.0, 5.5]), pose, 36), [17.5, 17.5, 17.5])
    np.testing.assert_allclose(middle, [3.0, 4.0, 5.5])


@settings(max_examples=25)
@given(affine=affines(shear=0.3), pose=poses, seed=st.integers(0, 999))
def test_a_voxel_of_a_view_lies_where_its_affine_says(affine: Affine, pose: np.ndarray, seed: int) -> None:
    """The volume shows one RAS coordinate of itself, so that every view voxel tells its own place in millimetres."""
    centre = np.random.default_rng(seed).uniform(14, 26, 3)
    mm = apply_affine(affine, np.moveaxis(np.indices(SHAPE), 0, -1))
    to_mm = affine @ view_affine(centre, pose, 12)
    for axis in range(3):
        low, span = mm[..., axis].min(), np.ptp(mm[..., axis])
        shown = cut(
            Window.of(((mm[..., axis] - low) / span).astype(np.float32), 0.0), view_affine(centre, pose, 12), 12
        )
        expected = (apply_affine(to_mm, np.moveaxis(np.indices((12,) * 3), 0, -1))[..., axis] - low) / span
        np.testing.assert_allclose(shown, expected, atol=HALF)


def followed(padded: np.ndarray, to_padded: Affine, side: int) -> np.ndarray:
    """A view whose voxels lie between the two voxels where its line meets the planes before and behind, point by point.

    Lines run along the axis of the view, and planes across the axis of the volume, that come closest to each other.
    """
    across, along = divmod(int(np.abs(to_padded[:3, :3]).argmax()), 3)
    step = to_padded[:3, along] / to_padded[across, along]  # from one plane to the next
    at = apply_affine(to_padded, np.moveaxis(np.indices((side,) * 3), 0, -1))
    deep = at[..., across] - np.floor(at[..., across])
    ends = (np.moveaxis(at + shift[..., None] * step, -1, 0) for shift in (-deep, 1 - deep))
    before, behind = (map_coordinates(padded, end, order=1) for end in ends)
    return np.asarray(before * (1 - deep) + behind * deep)


@settings(max_examples=25)
@given(pose=poses, seed=st.integers(0, 999), spread=st.sampled_from([0, 20, 60]))
def test_beyond_the_border_lies_background(pose: np.ndarray, seed: int, spread: int) -> None:
    """Any centre, also far outside: SciPy's interpolation of a generously padded volume is the oracle."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (14, 11, 12)).astype(np.float32)
    made = Window.of(values, -1.25)
    centre = rng.uniform(-spread, np.array(values.shape) - 1 + spread)
    padded = np.pad(made.values.float().numpy(), 100, constant_values=-1.25)
    expected = followed(padded, view_affine(centre + 100, pose, 10), 10)
    np.testing.assert_allclose(cut(made, view_affine(centre, pose, 10), 10), expected, atol=1e-4)


def test_a_value_too_large_for_half_precision_is_no_infinity() -> None:
    values = np.full((4, 4, 4), 1.0, np.float32)
    values[1, 1, 1], values[2, 2, 2] = 1e9, -1e9
    kept = Window.of(values, -1.0).values
    assert (float(kept[1, 1, 1]), float(kept[2, 2, 2]), float(kept[0, 0, 0])) == (65504, -65504, 1)


@settings(max_examples=25)
@given(seed=st.integers(0, 999), axes=st.permutations(range(3)), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
def test_a_view_without_oblique_lines_is_interpolated_as_anywhere(
    seed: int, axes: list[int], signs: tuple[int, ...]
) -> None:
    """Quarter turns at any place: trilinear interpolation, by SciPy."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (24, 20, 22)).astype(np.float32)
    made, pose = Window.of(values, 0.0), (np.eye(3)[axes] * signs) * rng.uniform(0.8, 1.2)
    to_volume = view_affine(rng.uniform(8, 12, 3), pose, 10)
    at = np.moveaxis(apply_affine(to_volume, np.moveaxis(np.indices((10,) * 3), 0, -1)), -1, 0)
    expected = map_coordinates(made.values.float().numpy(), at, order=1, mode="grid-constant")
    np.testing.assert_allclose(cut(made, to_volume, 10), expected, atol=1e-4)


def test_a_still_view_on_whole_voxels_is_a_block_of_the_volume() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
    made = Window.of(values, -1.0)
    shown = cut(made, view_affine(np.array([20.5, 18.5, 19.5]), np.eye(3), 32), 32)
    np.testing.assert_allclose(shown, made.values.float()[5:37, 3:35, 4:36], atol=1e-6)


@given(seed=st.integers(0, 10**6), degrees=st.floats(0, 180), scale=st.floats(0, 0.5))
def test_no_view_is_mirrored(seed: int, degrees: float, scale: float) -> None:
    pose = random_pose(np.random.default_rng(seed), Augmentation(rotation_deg=degrees, scale=scale))
    size = np.cbrt(np.linalg.det(pose))
    assert np.exp(-scale) - 1e-9 <= size <= np.exp(scale) + 1e-9
    np.testing.assert_allclose(pose @ pose.T, size**2 * np.eye(3), atol=1e-9)


def test_rotations_stay_within_their_bound() -> None:
    rng = np.random.default_rng(0)
    turns = [random_pose(rng, Augmentation(rotation_deg=10.0, scale=0.0)) for _ in range(200)]
    angles = [np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))) for turn in turns]
    assert 8 < max(angles) < 10 * np.sqrt(3) + 1


# -- contrast -------------------------------------------------------------------------------------------------------


def ramp() -> torch.Tensor:
    return torch.linspace(-1, 1, 8**3).reshape(8, 8, 8)


def only(**kept: float) -> Augmentation:
    return Augmentation(**{"curve_probability": 0.0, "bias": 0.0, "noise": 0.0, **kept})


def test_a_still_augmentation_changes_nothing() -> None:
    torch.testing.assert_close(recolour(ramp(), np.random.default_rng(0), STILL), ramp(), rtol=0, atol=0)


def test_the_same_generator_draws_the_same_colours() -> None:
    looks = [recolour(ramp(), np.random.default_rng(seed), Augmentation()) for seed in (1, 1, 2)]
    assert torch.equal(looks[0], looks[1])
    assert not torch.equal(looks[0], looks[2])


def test_a_curve_is_a_function_of_the_value_alone() -> None:
    values = ramp().repeat(2, 1, 1)
    for seed in range(10):
        seen = recolour(values, np.random.default_rng(seed), only(curve_probability=1.0))
        assert torch.equal(seen[:8], seen[8:])


def test_monotone_curves_keep_the_order_and_the_range() -> None:
    curves = only(curve_probability=1.0, arbitrary_curve_probability=0.0, invert_probability=0.0)
    for seed in range(10):
        seen = recolour(ramp(), np.random.default_rng(seed), curves).flatten()
        assert (seen.diff() >= -1e-6).all()
        assert float(seen[0]) == pytest.approx(-1, abs=1e-3)
        assert float(seen[-1]) == pytest.approx(1, abs=1e-3)


def test_inverted_curves_turn_tissue_over_and_leave_air_dark() -> None:
    curves = only(curve_probability=1.0, arbitrary_curve_probability=0.0, invert_probability=1.0)
    for seed in range(10):
        seen = recolour(ramp(), np.random.default_rng(seed), curves).flatten()
        assert float(seen[0]) == pytest.approx(-1, abs=1e-3)
        tissue = seen[len(seen) // 7 + 1 :]
        assert (tissue.diff() <= 1e-6).all()


def test_probabilities_are_those_of_all_views() -> None:
    """`arbitrary_…` and `invert_…` are shares of the curves, so both are rarer among the views."""
    rng = np.random.default_rng(0)
    curves = only(curve_probability=0.5, arbitrary_curve_probability=0.0, invert_probability=0.4)
    looks = [recolour(ramp(), rng, curves).flatten() for _ in range(400)]
    changed = [look for look in looks if not torch.equal(look, ramp().flatten())]
    inverted = [look for look in changed if look[-1] < look[len(look) // 2]]
    assert len(changed) / 400 == pytest.approx(0.5, abs=0.08)
    assert len(inverted) / len(changed) == pytest.approx(0.4, abs=0.1)


def test_shading_is_smooth_and_keeps_air_dark() -> None:
    flat = torch.zeros(24, 24, 24)
    seen = recolour(flat, np.random.default_rng(0), only(bias=0.3))
    assert float(seen.std()) > 0.02
    assert float(seen.diff(dim=0).abs().max()) < 0.15
    torch.testing.assert_close(recolour(flat - 1, np.random.default_rng(0), only(bias=0.3)), flat - 1)


def test_noise_stays_below_its_bound() -> None:
    flat = torch.zeros(16, 16, 16)
    rng = np.random.default_rng(0)
    spreads = [float(recolour(flat, rng, only(noise=0.2)).std()) for _ in range(40)]
    assert 0.15 < max(spreads) < 0.21
    assert min(spreads) < 0.05


# -- resolution -----------------------------------------------------------------------------------------------------

SLICES = only(slices_probability=1.0, thickest_vox=4.0)


def test_thick_slices_leave_places_where_they_are() -> None:
    """A ramp along any axis stays, away from the ends: resolution is lost, not position."""
    at = torch.arange(40, dtype=torch.float32)
    for axis in range(3):
        line = at / 20 - 1
        values = line.reshape([-1 if n == axis else 1 for n in range(3)]).expand(40, 40, 40).contiguous()
        for seed in range(12):
            seen = recolour(values, np.random.default_rng(seed), SLICES)
            inner = (slice(10, -10),) * 3
            torch.testing.assert_close(seen[inner], values[inner], atol=2e-3, rtol=0)


def test_thick_slices_blur_one_axis_alone() -> None:
    spot = torch.zeros(33, 33, 33)
    spot[16, 16, 16] = 1
    blurred = set()
    for seed in range(24):
        seen = recolour(spot, np.random.default_rng(seed), SLICES)
        extents = [int((seen.sum(dim=tuple({0, 1, 2} - {axis})).abs() > 1e-4).sum()) for axis in range(3)]
        assert sorted(extents)[:2] == [1, 1]
        if max(extents) > 1:
            blurred.add(int(np.argmax(extents)))
    assert blurred == {0, 1, 2}


def test_thick_slices_are_as_rare_as_said() -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=(12, 12, 12)).astype(np.float32))
    changed = [not torch.equal(recolour(noise, rng, only(slices_probability=0.3)), noise) for _ in range(300)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.08)


# -- holes ----------------------------------------------------------------------------------------------------------

BACKGROUND = -7.0


def told_apart(side: int = 32) -> torch.Tensor:
    """A view whose voxels all differ."""
    return torch.arange(side**3, dtype=torch.float32).reshape((side,) * 3)


def holes(seed: int) -> torch.Tensor:
    return disturbed(told_apart(), np.random.default_rng(seed), only(holes=True), BACKGROUND)


def test_six_holes_or_all_but_six_windows_are_dropped() -> None:
    kinds = []
    for seed in range(60):
        seen = holes(seed)
        dropped = seen == BACKGROUND
        assert torch.equal(seen[~dropped], told_apart()[~dropped])
        few = int(dropped.sum()) <= 6 * 10**3
        kinds.append(few)
        piece = dropped if few else ~dropped
        assert int(piece.sum()) >= 3**3
        assert int(piece.sum()) <= 6 * (10**3 if few else 21**3)
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.2)


def test_holes_have_three_to_ten_voxels_an_edge_all_as_often() -> None:
    """Where no two holes touch, every piece is a box."""
    edges, windows = [], []
    for seed in range(300):
        dropped = (holes(seed) == BACKGROUND).numpy()
        few = dropped.mean() < 0.5
        pieces, count = label(dropped if few else ~dropped)
        if count == 6:
            for box in find_objects(pieces):
                (edges if few else windows).extend(part.stop - part.start for part in box)
    counts = np.bincount(edges, minlength=11)
    assert counts.sum() > 500
    assert set(edges) == set(range(3, 11))
    assert counts[3:].min() > 0.4 * counts[3:].mean()  # but for small ones, which touch less often
    assert set(windows) <= set(range(3, 22))


def test_shuffling_moves_voxels_within_two_cubes() -> None:
    moved = 0
    for seed in range(60):
        seen = disturbed(told_apart(), np.random.default_rng(seed), only(shuffle_probability=0.8), BACKGROUND)
        assert torch.equal(seen.flatten().sort().values, told_apart().flatten())
        changed = torch.nonzero(seen != told_apart())
        assert len(changed) <= 2 * 6**3
        moved += len(changed) > 0
    assert moved / 60 == pytest.approx(0.8, abs=0.15)


def test_holes_are_drawn_by_the_generator_alone_and_the_view_stays() -> None:
    view, both = told_apart(), only(holes=True, shuffle_probability=1.0)
    first, again, other = (disturbed(view, np.random.default_rng(seed), both, BACKGROUND) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(view, told_apart())
    assert type(first) is torch.Tensor
    assert disturbed(view, np.random.default_rng(3), STILL, BACKGROUND) is view


# -- windows --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(pose=poses, seed=st.integers(0, 999), still=st.booleans())
def test_the_reach_of_a_view_is_all_that_it_needs(pose: np.ndarray, seed: int, still: bool) -> None:
    """A window of just the reach gives the view of the whole volume, to the bit."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (24, 20, 22)).astype(np.float32)
    centre = rng.uniform(-12, np.array(values.shape) + 12)
    to_volume = view_affine(np.rint(centre) + 0.5, np.eye(3), 10) if still else view_affine(centre, pose, 10)
    box = reach(to_volume, 10, values.shape)
    part = values[tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))]
    whole = cut(Window.of(values, -1.5), to_volume, 10)
    assert torch.equal(cut(Window.of(part, -1.5, box.start, values.shape), to_volume, 10), whole)
