"""Exact search equals brute force, whatever the numbers, the blocks and the filter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from isimed_index.errors import UsageError
from isimed_index.index.exact import ExactIndex, unit_length
from isimed_index.index.protocol import Block, Hits, Metric
from isimed_index.testing.conformance import brute_force

# Far from the origin and close to each other, tied, tiny: where |q|² + |v|² - 2 q·v cancels.
NUMBERS = st.one_of(
    st.integers(-3, 3).map(float),
    st.floats(-300, 300, width=32, allow_subnormal=False),
    st.sampled_from([250.0, 250.001, 250.002, -119.99, -120.0, 1e-3, 0.0]),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Block], np.ndarray, int, list[int] | None]:
    dim = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    blocks: list[Block] = []
    next_id = draw(st.integers(0, 50))
    for size in draw(st.lists(st.integers(0, 12), max_size=4)):
        steps = draw(hnp.arrays(np.int64, size, elements=st.integers(1, 3)))
        row_ids = next_id + np.cumsum(steps)
        vectors = draw(hnp.arrays(np.float32, (size, dim), elements=NUMBERS)).astype(dtype)
        blocks.append((row_ids, vectors))
        next_id = int(row_ids[-1]) + 1 if size else next_id
    queries = draw(hnp.arrays(np.float32, (draw(st.integers(0, 4)), dim), elements=NUMBERS))
    every = [int(row_id) for row_ids, _ in blocks for row_id in row_ids]
    among = draw(st.none() | st.lists(st.sampled_from([*every, 10_000]), max_size=20))
    return draw(st.permutations(blocks)), queries, draw(st.integers(1, 8)), among


@settings(max_examples=300, deadline=None)
@given(case=cases(), metric=st.sampled_from(["l2", "cosine"]), at_once=st.sampled_from([1, 7, 40, 1 << 20]))
def test_equals_brute_force(
    case: tuple[list[Block], np.ndarray, int, list[int] | None], metric: Metric, at_once: int
) -> None:
    blocks, queries, k, among = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isimed_index.index.exact._FLOATS_AT_ONCE", at_once)
        hits = ExactIndex(blocks, metric).search(queries, k, among)
    truth = brute_force(blocks, metric, queries, k, among)
    np.testing.assert_allclose(hits.distances, truth.distances, rtol=1e-6, atol=1e-7)
    if metric == "l2":
        assert hits.row_ids.tolist() == truth.row_ids.tolist()
    assert hits.found.tolist() == truth.found.tolist()


def test_near_rows_far_from_the_origin_keep_their_order() -> None:
    """In float32 products these rows, 0.01 mm apart at 300 mm, cannot be told apart."""
    rng = np.random.default_rng(0)
    vectors = np.full((4_000, 3), 300, dtype=np.float32)
    vectors[:, 0] += 0.01 * rng.permutation(4_000).astype(np.float32)
    hits = ExactIndex([(np.arange(4_000), vectors)], "l2").search([[300, 300, 300]], 50)
    assert hits.row_ids[0].tolist() == np.argsort(vectors[:, 0], kind="stable")[:50].tolist()


def test_reads_memory_mapped_half_precision(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float16)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    row_ids = np.arange(300) + 7
    hits = ExactIndex([(row_ids, mapped)], "cosine").search(vectors[:20], 5)
    truth = brute_force([(row_ids, vectors)], "cosine", vectors[:20], 5)
    assert hits.row_ids[:, 0].tolist() == truth.row_ids[:, 0].tolist()
    np.testing.assert_allclose(hits.distances, truth.distances, atol=1e-6)


def test_rerank_drops_rows_it_does_not_know() -> None:
    row_ids = np.array([2, 4, 6])
    index = ExactIndex([(row_ids, np.array([[2.0], [4.0], [6.0]]))], "l2")
    rough = Hits(np.array([[6, 3, 1, 4, 99, -1]]), np.zeros((1, 6), dtype=np.float32))
    hits = index.rerank([[4.5]], rough, 3)
    assert hits.row_ids.tolist() == [[4, 6, -1]]
    assert hits.distances.tolist() == [[0.5, 1.5, np.inf]]


@given(case=cases())
def test_ranking_rows_again_equals_a_search_among_them(
    case: tuple[list[Block], np.ndarray, int, list[int] | None],
) -> None:
    """Of blocks with gaps and without, by names of which some are no rows."""
    blocks, queries, k, _ = case
    index = ExactIndex(blocks, "l2")
    rough = np.tile(np.arange(120), (len(queries), 1))
    hits = index.rerank(queries, Hits(rough, np.zeros(rough.shape, np.float32)), k)
    truth = index.search(queries, k, np.arange(120))
    assert hits.row_ids.tolist() == truth.row_ids.tolist()
    assert hits.distances.tolist() == truth.distances.tolist()


def test_vectors_come_in_row_order() -> None:
    index = ExactIndex([(np.array([8, 9]), np.eye(2)), (np.array([1, 5]), 2 * np.eye(2))], "l2")
    assert index.vectors([9, 1]).tolist() == [[2, 0], [0, 1]]
    assert (len(index), index.count(np.array([5, 6, 8]))) == (4, 2)


def test_an_empty_index_finds_nothing() -> None:
    hits = ExactIndex([], "l2").search(np.zeros((2, 9)), 3)
    assert (hits.found.any(), hits.row_ids.shape) == (False, (2, 3))


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ([(np.array([1, 1]), np.zeros((2, 3)))], "ascend"),
        ([(np.array([-4, 1]), np.zeros((2, 3)))], "ascend"),
        ([(np.array([1, 5]), np.zeros((2, 3))), (np.array([5]), np.zeros((1, 3)))], "overlap"),
        ([(np.array([1]), np.zeros((1, 3))), (np.array([2]), np.zeros((1, 4)))], "one dimension"),
        ([(np.array([1]), np.zeros((2, 3)))], "row ids"),
    ],
)
def test_refuses_blocks_that_cannot_be(blocks: list[Block], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ExactIndex(blocks, "l2")


def test_refuses_an_unknown_metric() -> None:
    with pytest.raises(UsageError, match="cosine"):
        ExactIndex([], "manhattan")  # type: ignore[arg-type]


def test_unit_length_of_tiny_vectors() -> None:
    lengths = np.linalg.norm(unit_length(np.array([[3e-30, 4e-30], [0, 0]], dtype=np.float32)), axis=1)
    np.testing.assert_allclose(lengths, [1, 0])
