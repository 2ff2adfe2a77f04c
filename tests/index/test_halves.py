"""float16 → float32: every half is what NumPy makes of it."""

from __future__ import annotations

import numpy as np
import pytest

from isimed_index.index.halves import single

EVERY = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_finite_half_comes_out_bit_for_bit() -> None:
    finite = EVERY[np.isfinite(EVERY)].reshape(-1, 2)
    made = single(finite)
    assert made.dtype == np.float32
    np.testing.assert_array_equal(made.view(np.uint32), finite.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so_and_spoils_no_other_row(odd: float) -> None:
    vectors = np.random.default_rng(0).normal(size=(5_000, 64)).astype(np.float16)
    vectors[2_500, 3] = odd
    np.testing.assert_array_equal(single(vectors), vectors.astype(np.float32))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_other_precisions_are_numpys(kind: type) -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 3)).astype(kind)
    made = single(vectors)
    assert np.shares_memory(made, vectors) == (kind is np.float32)
    np.testing.assert_array_equal(made, vectors.astype(np.float32))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (3, 200_000)])
def test_any_shape_and_what_is_read_in_steps(shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(0).normal(size=(2 * shape[0], 2 * shape[1])).astype(np.float16)[::2, ::2]
    np.testing.assert_array_equal(single(vectors), vectors.astype(np.float32))
