"""A varied head: every labelled place is where the map says, and only contrast changes with contrast."""

from __future__ import annotations

import numpy as np
import pytest

from isimed_index.space import apply_affine, inverse
from isimed_index.testing.variants import VARIANTS, Head, vary


@pytest.fixture(scope="module")
def head() -> Head:
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (48, 56, 52)], indexing="ij"), -1)
    values = rng.uniform(0, 3, grid.shape[:3]).astype(np.float32)
    labels = np.zeros(grid.shape[:3], np.int16)
    for label, centre in enumerate([(15, 17, 34), (33, 38, 38), (15, 39, 34)], start=1):
        ball = np.linalg.norm(grid - centre, axis=-1) < 8
        labels[ball] = label
        values[ball] = 40.0 * label
    affine = np.diag([2.0, 2.0, 2.5, 1.0])
    affine[:3, 3] = [-50, -60, 12]
    return Head(values, labels, affine)


def centroids(head: Head) -> np.ndarray:
    return np.array([apply_affine(head.affine, np.argwhere(head.labels == label).mean(axis=0)) for label in (1, 2, 3)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_go_where_the_map_says(head: Head, variant):
    varied, to = vary(head, variant)
    np.testing.assert_allclose(centroids(varied), apply_affine(to, centroids(head)), atol=0.3)
    assert varied.values.dtype == np.float32
    assert varied.values.shape == varied.labels.shape


@pytest.mark.parametrize("variant", ["plain", "contrast", "inverted"])
def test_contrast_moves_nothing(head: Head, variant):
    varied, to = vary(head, variant)
    np.testing.assert_array_equal(varied.labels, head.labels)
    np.testing.assert_array_equal(varied.affine, head.affine)
    np.testing.assert_array_equal(to, np.eye(4))
    assert (variant == "plain") == np.array_equal(varied.values, head.values)


def test_inversion_turns_tissue_over_and_leaves_air(head: Head):
    varied, _ = vary(head, "inverted")
    means = [varied.values[head.labels == label].mean() for label in (1, 2, 3)]
    assert means[0] > means[1] > means[2]
    np.testing.assert_array_equal(varied.values[head.labels == 0], head.values[head.labels == 0])


def test_half_the_field_of_view_is_the_upper_part_at_its_place(head: Head):
    varied, _ = vary(head, "halffov")
    cut = head.values.shape[2] - varied.values.shape[2]
    assert cut == int(0.45 * head.values.shape[2])
    np.testing.assert_array_equal(varied.values, head.values[:, :, cut:])
    np.testing.assert_allclose(apply_affine(varied.affine, [0, 0, 0]), apply_affine(head.affine, [0, 0, cut]))


def test_the_turn_is_about_twenty_degrees_and_no_mirror(head: Head):
    _, to = vary(head, "rot20")
    voxel = inverse(head.affine) @ to @ head.affine
    np.testing.assert_allclose(np.linalg.det(voxel[:3, :3]), 1.0)
    angle = np.degrees(np.arccos((np.trace(voxel[:3, :3]) - 1) / 2))
    assert 18 < angle < 24
