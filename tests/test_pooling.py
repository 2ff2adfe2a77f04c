"""Pooling against slow, obvious oracles; and what must hold of any way to pool."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array

from isimed_index import pooling
from isimed_index.lattice import Standard
from isimed_index.pooling import pool


def unit(vectors: NDArray[np.floating]) -> NDArray[np.floating]:
    return Standard("cosine", np.zeros(vectors.shape[1], np.float32), 1.0).unit(vectors)


def drawn(seed: int, n: int, groups: int = 3, dim: int = 5) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Vectors (n, dim), and weights (groups, n) about half of which are nothing."""
    random = np.random.default_rng(seed)
    weights = np.maximum(random.normal(size=(groups, n)), 0)
    weights[:, random.integers(n)] += 0.5  # no group is empty
    return random.normal(size=(n, dim)).astype(np.float32), weights


def oracle(vectors: NDArray[np.float32], weights: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Means and standard deviations, group by group and dimension by dimension, the deviation by its definition."""
    u = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = np.zeros((len(weights), u.shape[1]))
    sd = np.zeros_like(mean)
    for group, w in enumerate(weights):
        for axis in range(u.shape[1]):
            mean[group, axis] = sum(w[n] * u[n, axis] for n in range(len(u))) / w.sum()
            away = sum(w[n] * (u[n, axis] - mean[group, axis]) ** 2 for n in range(len(u))) / w.sum()
            sd[group, axis] = np.sqrt(away)
    return mean, sd


@pytest.mark.parametrize("block", [1, 7, 1 << 13])
def test_mean_and_deviation_are_those_of_the_definition(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pooling, "_BLOCK", block)
    vectors, weights = drawn(0, 40)
    found = pool(vectors, csr_array(weights), unit)
    mean, sd = oracle(vectors, weights)
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.sd, sd, atol=1e-6)


@given(st.integers(0, 1 << 30), st.integers(1, 30))
def test_order_does_not_matter_and_neither_do_others_patches(seed: int, n: int):
    vectors, weights = drawn(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    found = pool(vectors, csr_array(weights), unit)
    again = pool(vectors[order], csr_array(weights[:, order]), unit)
    mine = weights[0] > 0
    alone = pool(vectors[mine], csr_array(weights[:1, mine] * 3), unit)
    for name in ("mean", "sd"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name), atol=1e-6)
        np.testing.assert_allclose(getattr(alone, name)[0], getattr(found, name)[0], atol=1e-6)


@given(st.integers(0, 1 << 30), st.integers(1, 30), st.sampled_from(["cosine", "l2"]))
def test_of_equal_patches_it_is_their_vector(seed: int, n: int, metric: str):
    vectors, weights = drawn(seed, n)
    vectors[:] = vectors[0]
    standard = Standard(metric, np.full(5, 0.3, np.float32), 2.0)
    found = pool(vectors, csr_array(weights), standard.unit)
    expected = np.broadcast_to(standard.unit(vectors[0]), found.mean.shape)
    np.testing.assert_allclose(found.mean, expected, atol=1e-6)
    np.testing.assert_allclose(found.sd, 0, atol=1e-6)
    np.testing.assert_allclose(standard.raw(found.mean)[0], standard.raw(standard.unit(vectors[:1]))[0], rtol=1e-4)


@given(st.integers(0, 1 << 30), st.integers(1, 30))
def test_mean_and_deviation_together_are_a_unit_vector(seed: int, n: int):
    vectors, weights = drawn(seed, n)
    np.testing.assert_allclose(np.linalg.norm(pool(vectors, csr_array(weights), unit).both, axis=1), 1, atol=1e-6)
