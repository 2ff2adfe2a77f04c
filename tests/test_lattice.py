"""Lattices of vectors: sampling between points, standards that rank like the metric, and the way to disk and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from affines import affines
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import isimed_index.lattice as module
from isimed_index.errors import StoreDamaged
from isimed_index.grid import PatchGrid
from isimed_index.lattice import (
    FILE,
    Lattice,
    ScanGeometry,
    Standard,
    build_lattice,
    lattice_affine,
    read_geometry,
    read_lattice,
    thinned,
    write_geometry,
)
from isimed_index.space import Affine, apply_affine
from isimed_index.store.files import tree_digest
from isimed_index.store.manifest import Artefact
from isimed_index.store.place.storage import LocalStorage
from isimed_index.store.segment import Segment, write_segment

OBLIQUE = np.array([[3.8, -0.6, 0.2, -80.0], [0.8, 3.9, -0.4, 24.0], [0.0, 0.6, 4.1, 14.0], [0.0, 0.0, 0.0, 1.0]])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def full(affine: Affine, shape: tuple[int, int, int] = (5, 4, 6), dim: int = 3) -> Lattice:
    vectors = normal(0, *shape, dim)
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return Lattice(unit, np.ones(shape, bool), affine)


# -- standards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_l2_round_trip(dtype: type) -> None:
    vectors = (normal(1, 200, 6) * 40 + 300).astype(dtype)
    standard = Standard.of("l2", vectors)
    unit = standard.unit(vectors)
    assert unit.shape == (200, 7)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(standard.raw(unit), vectors, atol=2e-3)
    np.testing.assert_allclose(standard.raw(2.5 * unit), vectors, atol=2e-3)  # sums of unit vectors need no length


def test_half_precision_samples_do_not_overflow() -> None:
    """A thousand dimensions of a hundred: their squares add up to more than float16 can hold."""
    vectors = (normal(1, 50, 1024) * 100).astype(np.float16)
    standard = Standard.of("l2", vectors)
    assert standard.scale == pytest.approx(3200, rel=0.1)
    assert standard.centre.dtype == np.float32


def test_l2_distance_is_euclidean_in_the_encoders_units() -> None:
    a, b = normal(1, 30, 6) * 40, normal(2, 30, 6) * 40
    standard = Standard.of("l2", np.concatenate([a, b]))
    found = standard.distance(standard.unit(a), standard.unit(b))
    np.testing.assert_allclose(found, np.linalg.norm(a - b, axis=1), rtol=1e-4)


def test_l2_ranks_like_euclidean_distance_near_the_centre() -> None:
    """Up to half the typical length from the centre the angle grows with the distance, nearly without exception."""
    sample = normal(3, 2000, 6)
    standard = Standard.of("l2", sample)
    near = sample[np.linalg.norm(sample - standard.centre, axis=1) < 0.5 * standard.scale]
    assert len(near) > 40
    unit = standard.unit(near)
    for query in range(5):
        angle = np.arccos(np.clip(unit @ unit[query], -1, 1))
        assert spearmanr(angle, np.linalg.norm(near - near[query], axis=1)).statistic > 0.97


def test_l2_ranks_exactly_around_the_centre() -> None:
    sample = normal(3, 300, 6)
    standard = Standard.of("l2", sample)
    similarity = standard.unit(sample) @ standard.unit(standard.centre)
    distance = np.linalg.norm(sample - standard.centre, axis=1)
    assert np.array_equal(np.argsort(-similarity), np.argsort(distance))


def test_cosine_is_normalised_and_nothing_else() -> None:
    vectors = normal(1, 20, 6) * 7 + 3
    standard = Standard.of("cosine", vectors)
    expected = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(standard.unit(vectors.reshape(4, 5, 6)), expected.reshape(4, 5, 6), atol=1e-6)
    np.testing.assert_allclose(standard.raw(expected), expected)
    distance = standard.distance(expected[:10], expected[10:])
    np.testing.assert_allclose(distance, 1 - (expected[:10] * expected[10:]).sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("sample", [np.zeros((0, 4)), np.zeros((3, 4)), np.ones((1, 4))], ids=["none", "zeros", "one"])
def test_a_standard_of_little_is_finite(metric: str, sample: np.ndarray) -> None:
    standard = Standard.of(metric, sample.astype(np.float32))
    assert np.isfinite(standard.unit(np.ones((2, 4), np.float32))).all()
    assert np.isfinite(standard.unit(np.zeros((2, 4), np.float32))).all()


# -- sampling -------------------------------------------------------------------------------------------------------


@given(affine=affines(shear=0.3))
def test_sampling_at_stored_points_is_exact(affine: Affine) -> None:
    lattice = full(affine)
    places, vectors = lattice.stored()
    found, weight = lattice.sample(places)
    np.testing.assert_allclose(found, vectors, atol=1e-5)
    np.testing.assert_allclose(weight, 1, atol=1e-6)


@settings(max_examples=25)
@given(affine=affines(), part=st.tuples(*[st.floats(0, 1)] * 3), at=st.tuples(*[st.integers(0, 2)] * 3))
def test_sampling_between_points_is_linear(affine: Affine, part: tuple[float, ...], at: tuple[int, ...]) -> None:
    lattice = full(affine)
    index = np.array(at, dtype=float) + part
    found, weight = lattice.sample(apply_affine(affine, index[None]))
    expected = np.zeros(3)
    for corner in np.ndindex(2, 2, 2):
        share = np.prod([p if c else 1 - p for p, c in zip(part, corner, strict=True)])
        expected += share * lattice.vectors[tuple(np.add(at, corner))]
    assert weight[0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found[0] * np.linalg.norm(expected), expected, atol=1e-4)


def test_points_that_are_not_stored_have_no_weight() -> None:
    lattice = full(OBLIQUE)
    lattice.mask[2, 2, 2] = False
    lattice.vectors[2, 2, 2] = 99
    found, weight = lattice.sample(
        apply_affine(OBLIQUE, [[2, 2, 2], [2.25, 2, 2], [-1, 0, 0], [-0.5, 0, 0], [99, 9, 9]])
    )
    np.testing.assert_allclose(weight, [0, 0.25, 0, 0.5, 0], atol=1e-9)
    np.testing.assert_allclose(found[[0, 2, 4]], 0)
    np.testing.assert_allclose(found[1], lattice.vectors[3, 2, 2], atol=1e-6)
    np.testing.assert_allclose(found[3], lattice.vectors[0, 0, 0], atol=1e-6)


def test_no_points() -> None:
    found, weight = full(OBLIQUE).sample(np.zeros((0, 3)))
    assert (found.shape, weight.shape) == ((0, 3), (0,))


def test_the_step_is_the_smallest() -> None:
    assert full(np.diag([4.0, 3.0, 5.0, 1.0])).step_mm == 3.0


def test_building_puts_vectors_at_their_indices() -> None:
    ijk = np.array([[0, 1, 2], [1, 0, 0]])
    lattice = build_lattice(normal(0, 2, 3), ijk, (2, 2, 3), OBLIQUE)
    assert lattice.mask.sum() == 2
    places, vectors = lattice.stored()
    np.testing.assert_allclose(places, apply_affine(OBLIQUE, ijk))
    np.testing.assert_allclose(vectors, normal(0, 2, 3))


# -- on disk --------------------------------------------------------------------------------------------------------

GRID = PatchGrid((20, 17, 30), 8, 4, OBLIQUE)
SCAN = ScanGeometry.of((20, 17, 30), OBLIQUE, {"source_orientation": "PSR"})
NUMBERS = np.array([0, 7, 31, len(GRID) - 1])


def segment(root: Path, mangle: str | None = None, ijk: np.ndarray | None = None) -> Segment:
    """A stored segment of four patches; `mangle` takes the place of its lattice.json."""
    directory = root / "segments" / "one"
    directory.mkdir(parents=True)
    at = GRID.ijk(NUMBERS) if ijk is None else ijk
    columns = {axis: at[:, n].astype(np.int32) for n, axis in enumerate("ijk")}
    columns |= {f"{axis}_mm": GRID.centres_mm(NUMBERS)[:, n].astype(np.float32) for n, axis in enumerate("xyz")}
    patches = pa.table({"scan": ["a"] * 4, **columns, "foreground": np.ones(4, np.float32)})
    fields = write_segment(directory, patches, {"descriptor": normal(0, 4, 5).astype(np.float16)})
    write_geometry(directory, GRID, SCAN)
    if mangle is not None:
        (directory / FILE).write_text(mangle)
    digest = tree_digest(directory)
    sealed = Artefact("segment", "segments/one", digest.bytes, digest.files, digest.sha256, fields)
    return Segment(LocalStorage(root), sealed, {"first_row_id": 0})


def test_a_lattice_index_maps_to_the_patchs_centre() -> None:
    np.testing.assert_allclose(
        apply_affine(lattice_affine(GRID), GRID.ijk(np.arange(len(GRID)))), GRID.centres_mm(), atol=1e-9
    )


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_reading_back_what_was_stored(tmp_path: Path, metric: str) -> None:
    stored = normal(0, 4, 5).astype(np.float16)
    standard = Standard.of(metric, stored)
    lattice = read_lattice(segment(tmp_path), "descriptor", standard)
    assert lattice.mask.shape == GRID.lattice_shape
    places, vectors = lattice.stored()
    np.testing.assert_allclose(places, GRID.centres_mm(NUMBERS), atol=1e-6)
    np.testing.assert_allclose(vectors, standard.unit(stored), atol=1e-6)


def test_the_scans_geometry_is_read_without_the_scan(tmp_path: Path) -> None:
    found = read_geometry(segment(tmp_path))
    assert found.shape == SCAN.shape
    np.testing.assert_array_equal(found.affine, OBLIQUE)
    np.testing.assert_array_equal(found.source_affine, SCAN.source_affine)
    corners = found.corners_mm()
    assert corners.shape == (8, 3)
    middle = corners.mean(axis=0)
    np.testing.assert_allclose(middle, apply_affine(OBLIQUE, (np.array(SCAN.shape) - 1) / 2), atol=1e-9)
    assert found.holds(middle)
    assert all(found.holds(corner) for corner in corners)
    assert not any(found.holds(middle + 1.001 * (corner - middle)) for corner in corners)
    assert not found.holds(corners.min(axis=0) - 100)


def test_a_segment_without_the_scans_geometry_is_damage(tmp_path: Path) -> None:
    content = json.dumps({"shape": list(GRID.lattice_shape), "affine": lattice_affine(GRID).tolist()})
    with pytest.raises(StoreDamaged, match=FILE):
        read_geometry(segment(tmp_path, content))


def test_the_geometry_is_plain_json(tmp_path: Path) -> None:
    write_geometry(tmp_path, GRID, SCAN)
    content = json.loads((tmp_path / FILE).read_text())
    assert content["shape"] == list(GRID.lattice_shape)
    assert (content["patch_vox"], content["stride_vox"]) == (8, 4)


@pytest.mark.parametrize(
    "mangled",
    [
        "{",
        "[1]",
        "{}",
        '{"shape": [2, 2], "affine": [[1]]}',
        json.dumps({"shape": [9, 9, 9], "affine": [[1, 0, 0, 0]] * 3}),
        json.dumps({"shape": [1, 1, 1], "affine": np.eye(4).tolist()}),
    ],
)
def test_a_geometry_that_does_not_fit_is_damage(tmp_path: Path, mangled: str) -> None:
    with pytest.raises(StoreDamaged, match=FILE):
        read_lattice(segment(tmp_path, mangled), "descriptor", Standard.of("cosine", normal(0, 4, 5)))


def test_indices_before_the_lattice_do_not_wrap_around(tmp_path: Path) -> None:
    before = GRID.ijk(NUMBERS) - np.array([1, 0, 0])
    with pytest.raises(StoreDamaged, match=FILE):
        read_lattice(segment(tmp_path, ijk=before), "descriptor", Standard.of("cosine", normal(0, 4, 5)))


# -- thinning -------------------------------------------------------------------------------------------------------


def random_lattice(seed: int, shape: tuple[int, int, int], affine: Affine, share: float = 0.7) -> Lattice:
    mask = np.random.default_rng(seed).random(shape) < share
    return Lattice(normal(seed, *shape, 3) * mask[..., None], mask, affine)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.tuples(*[st.integers(1, 9)] * 3),
    spacing=st.floats(1.0, 40.0),
    affine=affines(),
    least=st.integers(1, 40),
)
def test_a_thinned_lattice_has_the_same_vectors_at_the_same_places(
    seed: int, shape: tuple[int, int, int], spacing: float, affine: Affine, least: int
) -> None:
    lattice = random_lattice(seed, shape, affine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_POINTS", least)
        thin = thinned(lattice, spacing)
    there = {tuple(np.round(place, 3)): vector.tobytes() for place, vector in zip(*lattice.stored(), strict=True)}
    places, vectors = thin.stored()
    assert len(places) >= min(least, len(there))
    for place, vector in zip(places, vectors, strict=True):
        assert there[tuple(np.round(place, 3))] == vector.tobytes()


@pytest.mark.parametrize(
    ("step", "thin_step"), [(16, 16), (8, 8), (7, 7), (6, 6), (5, 10), (4, 8), (3, 9), (2, 8), (1, 8)]
)
def test_points_are_about_as_far_apart_as_was_asked(step: float, thin_step: float) -> None:
    lattice = random_lattice(0, (33, 30, 31), np.diag([step, step, step, 1.0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LEAST_POINTS", 1)
        thin = thinned(lattice, 8.0)
    assert thin.step_mm == thin_step
    assert (thin is lattice) == (step == thin_step)


def test_small_bodies_keep_their_points() -> None:
    mouse = random_lattice(0, (20, 20, 20), np.diag([0.5, 0.5, 0.5, 1.0]))
    assert thinned(mouse, 8.0) is mouse  # every second point along each axis would be 700
    larger = random_lattice(0, (40, 40, 40), np.diag([0.5, 0.5, 0.5, 1.0]))
    assert thinned(larger, 8.0).step_mm == 1.0


def test_a_slab_between_the_points_of_the_coarse_lattice_is_kept() -> None:
    lattice = random_lattice(0, (100, 100, 4), np.diag([4.0, 4.0, 4.0, 1.0]), share=1.0)
    lattice.mask[:, :, [0, 2, 3]] = False
    thin = thinned(lattice, 8.0)
    assert thin.mask.sum() == 2500
    assert set(thin.stored()[0][:, 2]) == {4.0}


def test_what_is_left_out_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_POINTS", 1)
    standard = Standard.of("cosine", normal(0, 4, 5))
    stored = segment(tmp_path)
    whole = read_lattice(stored, "descriptor", standard)
    thin = read_lattice(stored, "descriptor", standard, 2 * whole.step_mm)
    other = thinned(whole, 2 * whole.step_mm)
    assert 0 < thin.mask.sum() < whole.mask.sum()
    for name in ("vectors", "mask", "affine"):
        np.testing.assert_array_equal(getattr(thin, name), getattr(other, name))
