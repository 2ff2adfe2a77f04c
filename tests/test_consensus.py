"""Robust fits find the truth among gross errors, and matching is that of brute force."""

from __future__ import annotations

import numpy as np
import pytest
from affines import affine_of
from hypothesis import given, settings
from hypothesis import strategies as st

from isimed_index.consensus import fit_pair, local_affine, mutual_matches, robust_affine, window_matches, window_offsets
from isimed_index.lattice import Lattice
from isimed_index.space import apply_affine, inverse


def some_affine(seed: int) -> np.ndarray:
    """A pose with a stretch and a shear, as bodies differ."""
    rng = np.random.default_rng(seed)
    return affine_of(
        rng.uniform(-15, 15, 3), rng.uniform(0.9, 1.1, 3), (1, 1, 1), (0, 1, 2), rng.uniform(-30, 30, 3), 0.05
    )


def smooth_field(points: np.ndarray, dim: int = 24, length_mm: float = 9.0, seed: int = 0) -> np.ndarray:
    """Unit vectors (…, dim) that vary smoothly with the place: random Fourier features."""
    rng = np.random.default_rng(seed)
    waves, phases = rng.normal(0, 1 / length_mm, (3, dim)), rng.uniform(0, 2 * np.pi, dim)
    features = np.cos(points @ waves + phases).astype(np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def field_lattice(shape=(14, 15, 13), step_mm=8.0, to_field=None, mask=None, affine=None, **field) -> Lattice:
    """A lattice that samples the smooth field, seen through `to_field` (lattice mm → field mm)."""
    if affine is None:
        affine = np.diag([step_mm, step_mm, step_mm, 1.0])
        affine[:3, 3] = -step_mm * (np.array(shape) - 1) / 2
    places = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    vectors = smooth_field(places if to_field is None else apply_affine(to_field, places), **field)
    mask = np.ones(shape, bool) if mask is None else mask
    return Lattice(vectors * mask[..., None], mask, affine)


class TestRobustAffine:
    @settings(max_examples=20)
    @given(seed=st.integers(0, 1000))
    def test_exact_pairs_give_the_exact_affine(self, seed: int):
        x = np.random.default_rng(seed).uniform(-80, 80, (40, 3))
        truth = some_affine(seed)
        np.testing.assert_allclose(robust_affine(x, apply_affine(truth, x), np.ones(40)), truth, atol=1e-4)

    @pytest.mark.parametrize("seed", range(4))
    def test_forty_per_cent_gross_errors(self, seed: int):
        rng = np.random.default_rng(seed)
        x = rng.uniform(-80, 80, (500, 3))
        truth = some_affine(seed)
        y = apply_affine(truth, x) + rng.normal(0, 0.5, x.shape)
        wrong = rng.random(500) < 0.4
        y[wrong] = rng.uniform(-120, 120, (wrong.sum(), 3))
        fitted = robust_affine(x, y, np.ones(500))
        error = np.linalg.norm(apply_affine(fitted, x) - apply_affine(truth, x), axis=1)
        assert error.max() < 0.5
        plain = np.linalg.lstsq(np.c_[x, np.ones(500)], y, rcond=None)[0]
        assert np.linalg.norm(np.c_[x, np.ones(500)] @ plain - apply_affine(truth, x), axis=1).max() > 10

    def test_pairs_without_trust_do_not_count(self):
        x = np.random.default_rng(0).uniform(-80, 80, (60, 3))
        y = apply_affine(some_affine(1), x)
        y[:20] += 15.0
        weight = np.r_[np.zeros(20), np.ones(40)]
        np.testing.assert_allclose(robust_affine(x, y, weight), some_affine(1), atol=1e-4)

    def test_the_scale_of_the_weights_does_not_matter(self):
        x = np.random.default_rng(0).uniform(-80, 80, (60, 3))
        y = apply_affine(some_affine(1), x)
        np.testing.assert_allclose(robust_affine(x, y, np.full(60, 1e-9)), some_affine(1), atol=1e-4)
        np.testing.assert_allclose(robust_affine(x, y, np.zeros(60)), some_affine(1), atol=1e-4)

    def test_a_ridge_pulls_the_linear_part_to_the_prior_but_not_the_place(self):
        x = np.random.default_rng(0).uniform(-20, 20, (50, 3))
        truth, prior = some_affine(2), np.eye(4)
        y = apply_affine(truth, x)
        weight, middle = np.ones(50), x.mean(axis=0)
        fits = [robust_affine(x, y, weight, prior=prior, ridge=ridge) for ridge in (0.0, 1e4, 1e12)]
        off = [np.abs(fit[:3, :3] - prior[:3, :3]).max() for fit in fits]
        np.testing.assert_allclose(fits[0], truth, atol=1e-3)
        assert off[0] > off[1] > off[2]
        np.testing.assert_allclose(fits[2][:3, :3], np.eye(3), atol=1e-6)
        for fit in fits:
            np.testing.assert_allclose(apply_affine(fit, middle), apply_affine(truth, middle), atol=1.0)

    @pytest.mark.parametrize("flat", [[0], [0, 1], [0, 1, 2]])
    def test_points_of_a_plane_a_line_or_one_place_leave_the_rest_a_translation(self, flat: list[int]):
        x = np.random.default_rng(0).uniform(-50, 50, (30, 3))
        x[:, flat] = 7.0
        fitted = robust_affine(x, x + np.array([5.0, -3.0, 2.0]), np.ones(30))
        expected = np.eye(4)
        expected[:3, 3] = [5.0, -3.0, 2.0]
        np.testing.assert_allclose(fitted, expected, atol=1e-4)


class TestMutualMatches:
    @settings(max_examples=25)
    @given(n=st.integers(1, 40), m=st.integers(1, 40), block=st.integers(1, 50), seed=st.integers(0, 99))
    def test_is_that_of_brute_force(self, n: int, m: int, block: int, seed: int):
        rng = np.random.default_rng(seed)
        xa = rng.uniform(0, 50, (n, 3))
        a, b = rng.normal(size=(n, 5)).astype(np.float32), rng.normal(size=(m, 5)).astype(np.float32)
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        best, weight = mutual_matches(xa, a, b, spread_mm=10.0, block=block)
        for i in range(n):
            j = max(range(m), key=lambda j: a[i] @ b[j])
            back = max(range(n), key=lambda k: a[k] @ b[j])
            assert a[i] @ b[best[i]] == pytest.approx(a[i] @ b[j], abs=1e-6)
            assert weight[i] == pytest.approx(np.exp(-((np.linalg.norm(xa[back] - xa[i]) / 10) ** 2)), abs=1e-6)


class TestWindowMatches:
    def brute(self, vectors, expected, target, reach=2, temperature=0.05, spread_mm=40.0):
        """The docstring, one point at a time."""
        matched, best = expected.copy(), np.full(len(expected), -np.inf)
        for n, (vector, place) in enumerate(zip(vectors, expected, strict=True)):
            middle = np.rint(apply_affine(inverse(target.affine), place)).astype(int)
            scores, places = [], []
            for offset in window_offsets(reach):
                index = middle + offset
                if (index < 0).any() or (index >= target.mask.shape).any() or not target.mask[tuple(index)]:
                    continue
                at = apply_affine(target.affine, index)
                similarity = float(target.vectors[tuple(index)].astype(np.float64) @ vector)
                best[n] = max(best[n], similarity)
                scores.append((similarity - (np.linalg.norm(at - place) / spread_mm) ** 2) / temperature)
                places.append(at)
            if scores:
                vote = np.exp(np.array(scores) - max(scores))
                matched[n] = vote @ np.array(places) / vote.sum()
        return matched, best

    @settings(max_examples=10)
    @given(seed=st.integers(0, 99), reach=st.integers(1, 2))
    def test_is_that_of_brute_force_on_any_lattice(self, seed: int, reach: int):
        rng = np.random.default_rng(seed)
        affine = affine_of(rng.uniform(-30, 30, 3), rng.uniform(4, 9, 3), (1, -1, 1), (1, 0, 2), rng.normal(0, 9, 3))
        target = field_lattice((6, 5, 7), affine=affine, mask=rng.random((6, 5, 7)) < 0.6, seed=seed)
        expected = apply_affine(affine, rng.uniform(-3, 9, (300, 3)))  # some far outside; more than one block
        vectors = smooth_field(expected, seed=seed)
        got, want = window_matches(vectors, expected, target, reach=reach), self.brute(vectors, expected, target, reach)
        np.testing.assert_allclose(got[0], want[0], atol=1e-3)
        np.testing.assert_allclose(got[1], want[1], atol=1e-5)

    def test_is_finer_than_the_lattice(self):
        target = field_lattice((16, 16, 16), 8.0)
        rng = np.random.default_rng(3)
        truth = rng.uniform(-30, 30, (200, 3))
        expected = truth + rng.uniform(-6, 6, truth.shape)
        matched, similarity = window_matches(smooth_field(truth), expected, target, spread_mm=1e6)
        error = np.linalg.norm(matched - truth, axis=1)
        nearest = apply_affine(target.affine, np.rint(apply_affine(inverse(target.affine), truth)))
        assert np.median(error) < 0.65 * np.median(np.linalg.norm(nearest - truth, axis=1))
        assert similarity.min() > 0.7

    def test_where_nothing_is_stored_the_expectation_stays(self):
        target = field_lattice((5, 5, 5), mask=np.zeros((5, 5, 5), bool))
        expected = np.array([[1.0, 2.0, 3.0], [900.0, 0.0, 0.0]])
        matched, similarity = window_matches(smooth_field(expected), expected, target)
        np.testing.assert_array_equal(matched, expected)
        assert np.isneginf(similarity).all()


class TestFits:
    @pytest.mark.parametrize("seed", range(3))
    def test_fit_pair_finds_the_map_between_two_lattices(self, seed: int):
        truth = some_affine(seed)  # source mm → target mm
        target = field_lattice((20, 20, 20))
        source = field_lattice((12, 12, 12), to_field=truth)
        fit = fit_pair(source, target)
        corners = apply_affine(source.affine, np.argwhere(np.ones((2, 2, 2))) * 11)
        assert np.linalg.norm(apply_affine(fit.affine, corners) - apply_affine(truth, corners), axis=1).max() < 3.0
        assert fit.residual_mm < 3.0
        assert fit.matches > 0.9 * 12**3

    def test_fit_pair_of_one_layer(self):
        shift = np.eye(4)
        shift[:3, 3] = [5.0, -4.0, 3.0]
        fit = fit_pair(field_lattice((12, 12, 1), to_field=shift), field_lattice((20, 20, 20)))
        assert np.linalg.norm((fit.affine - shift)[:3, 3]) < 0.7 * np.linalg.norm(shift[:3, 3])
        assert np.linalg.det(fit.affine[:3, :3]) > 0.3

    def test_local_affine_follows_a_bend_that_the_start_misses(self):
        def bent(points):
            return points + 8.0 * np.stack(
                [np.sin(points[..., 1] / 40), np.sin(points[..., 2] / 40), 0 * points[..., 0]], -1
            )

        target = field_lattice((22, 22, 22), 8.0)
        source = field_lattice((16, 16, 16), 8.0)
        places = apply_affine(source.affine, np.moveaxis(np.indices((16, 16, 16)), 0, -1))
        source = Lattice(smooth_field(bent(places)), source.mask, source.affine)
        before, after = [], []
        for point in np.random.default_rng(0).uniform(-35, 35, (12, 3)):
            affine, residual = local_affine(source, target, point, np.eye(4))
            before.append(np.linalg.norm(point - bent(point)))
            after.append(np.linalg.norm(apply_affine(affine, point) - bent(point)))
            assert residual < 5.0
        assert np.median(after) < 0.5 * np.median(before)
        assert max(after) < 0.6 * max(before)

    def test_local_affine_without_neighbours_returns_the_start(self):
        lattice = field_lattice()
        start = some_affine(1)
        affine, residual = local_affine(lattice, lattice, np.array([4000.0, 0, 0]), start)
        np.testing.assert_array_equal(affine, start)
        assert residual == np.inf
        empty = field_lattice(mask=np.zeros((14, 15, 13), bool))
        affine, residual = local_affine(lattice, empty, np.zeros(3), start)
        np.testing.assert_array_equal(affine, start)
        assert residual == np.inf

    def test_the_neighbourhood_is_a_whole_sphere_on_sheared_axes(self, monkeypatch: pytest.MonkeyPatch):
        affine = np.diag([8.0, 8.0, 8.0, 1.0])
        affine[0, 1] = 9.0  # more than 45 degrees
        lattice = field_lattice((25, 25, 25), affine=affine)
        point = apply_affine(affine, [12.0, 12.0, 12.0])
        seen = []

        def spy(vectors, expected, *args, **kwargs):
            seen.append(expected)
            return window_matches(vectors, expected, *args, **kwargs)

        monkeypatch.setattr("isimed_index.consensus.window_matches", spy)
        local_affine(lattice, lattice, point, np.eye(4))
        every = apply_affine(affine, np.argwhere(lattice.mask))
        assert len(seen[0]) == (np.linalg.norm(every - point, axis=1) < 36.0).sum()
