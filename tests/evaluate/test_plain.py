"""The plain consensus on descriptors whose truth is known, and beside the fast one."""

from __future__ import annotations

import numpy as np
import pytest

from isimed_index.consensus import fit_pair, local_affine
from isimed_index.evaluate.plain import Described, plain_consensus
from isimed_index.lattice import build_lattice
from isimed_index.space import apply_affine, inverse

STEP_MM = 8.0
TRUTH = np.array([[1.05, 0.1, 0.0, 14.0], [-0.08, 0.97, 0.05, -9.0], [0.02, -0.04, 1.1, 22.0], [0, 0, 0, 1.0]])


def field(places: np.ndarray, seed: int = 0) -> np.ndarray:
    """A smooth descriptor (n, 24) of every place: random waves of 20 to 60 mm."""
    rng = np.random.default_rng(seed)
    waves = rng.normal(0, 2 * np.pi / 90, (24, 3))
    vectors = np.cos(places @ waves.T + rng.uniform(0, 2 * np.pi, 24))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def lattice(n: int = 14) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(n) * STEP_MM] * 3, indexing="ij"), -1).reshape(-1, 3)


@pytest.fixture
def pair() -> tuple[Described, Described]:
    """The same anatomy twice, the second one moved, sheared and stretched by `TRUTH`, each on a lattice of its own."""
    a, b = lattice(), lattice(16) + np.array([3.0, 5.0, 1.0])
    return Described(a, field(a)), Described(b, field(apply_affine(inverse(TRUTH), b)))


POINTS = np.array([[40.0, 52.0, 61.0], [33.0, 30.0, 70.0], [66.0, 71.0, 35.0]])


def test_it_finds_the_point_finer_than_the_lattice(pair):
    answers = plain_consensus(*pair, POINTS)
    error = {
        name: np.linalg.norm(getattr(answers, name) - apply_affine(TRUTH, POINTS), axis=1)
        for name in ("nearest", "affine", "local")
    }
    assert error["affine"].max() < 1.0
    assert error["local"].max() < STEP_MM / 4
    assert STEP_MM / 4 < error["nearest"].max() < 2 * STEP_MM
    assert error["local"].mean() < error["nearest"].mean() / 2


def test_a_third_of_wrong_descriptors_does_not_move_it(pair):
    source, target = pair
    rng = np.random.default_rng(1)
    wrong = rng.random(len(source.places_mm)) < 1 / 3
    vectors = source.vectors.copy()
    vectors[wrong] = rng.permutation(vectors[wrong])
    answers = plain_consensus(Described(source.places_mm, vectors), target, POINTS)
    assert np.linalg.norm(answers.local - apply_affine(TRUTH, POINTS), axis=1).max() < STEP_MM / 4


def test_what_bends_is_followed_locally_only():
    def bent(places: np.ndarray) -> np.ndarray:
        return places + 6.0 * np.sin(places[:, [1, 2, 0]] / 30)

    a = lattice()
    forward = bent(a)
    source = Described(a, field(a))
    target = Described(forward, field(a))  # the target's places are the bent ones
    answers = plain_consensus(source, target, POINTS)
    truth = bent(POINTS)
    local, affine = (np.linalg.norm(found - truth, axis=1).mean() for found in (answers.local, answers.affine))
    assert local < affine / 2


def test_scale_of_vectors_that_have_one_matters_and_rotation_does_not(pair):
    source, target = pair
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(24, 24)))[0].astype(np.float32)
    turned = plain_consensus(*(Described(side.places_mm, 7 * side.vectors @ turn) for side in pair), POINTS)
    np.testing.assert_allclose(turned.local, plain_consensus(source, target, POINTS).local, atol=1e-3)
    longer = Described(target.places_mm, target.vectors * np.linspace(1, 4, len(target.vectors))[:, None])
    assert np.abs(plain_consensus(source, longer, POINTS).nearest - plain_consensus(*pair, POINTS).nearest).max() > 10


def test_the_fast_path_agrees_with_it(pair):
    source, target = pair
    fast = []
    lattices = []
    for side, n, offset in ((source, 14, 0.0), (target, 16, [3.0, 5.0, 1.0])):
        affine = np.diag([STEP_MM] * 3 + [1.0])
        affine[:3, 3] = offset
        lattices.append(build_lattice(side.vectors, np.argwhere(np.ones((n, n, n))), (n, n, n), affine))
    start = fit_pair(*lattices).affine
    for point in POINTS:
        fast.append(apply_affine(local_affine(*lattices, point, start)[0], point))
    np.testing.assert_allclose(fast, plain_consensus(source, target, POINTS).local, atol=STEP_MM / 4)
