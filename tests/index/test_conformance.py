"""The implementations of `Index` against the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from isimed_index.index.card import row_ranges
from isimed_index.index.costs import NEVER_EXACT
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.protocol import Block, Index, Metric
from isimed_index.index.recipe import Recipe
from isimed_index.index.search import LiveIndex
from isimed_index.testing.conformance import IndexConformance


def flat(blocks: Sequence[Block], metric: Metric) -> FaissIndex:
    return FaissIndex.build(blocks, metric, Recipe("Flat"), blocks[0][1].shape[1])


class TestExact(IndexConformance):
    tolerance = 1e-5

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        return ExactIndex(blocks, metric)


class TestExactInSmallPieces(IndexConformance):
    tolerance = 1e-5

    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("isimed_index.index.exact._FLOATS_AT_ONCE", 100)
        monkeypatch.setattr("isimed_index.index.exact._QUERIES_AT_ONCE", 4)

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        return ExactIndex(blocks, metric)


class TestFlatFaiss(IndexConformance):
    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        return flat(blocks, metric)


class TestListsAllVisited(IndexConformance):
    """Inverted lists of float32 with every list visited are exact."""

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        sample = np.concatenate([vectors for _, vectors in blocks])
        lists = 4 if len(sample) > 300 else 1
        return FaissIndex.build(blocks, metric, Recipe(f"IVF{lists},Flat", lists, lists), sample.shape[1], sample)


class TestProjected(IndexConformance):
    """All principal axes, turned, centred and with every list visited: distances stay, cosine included."""

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        sample = np.concatenate([vectors for _, vectors in blocks])
        lists = 4 if len(sample) > 300 else 1
        recipe = Recipe(f"PCAR{sample.shape[1]},IVF{lists},Flat", lists, lists)
        return FaissIndex.build(blocks, metric, recipe, sample.shape[1], sample)

    def test_a_zero_vector_has_no_direction(self) -> None:
        """Here it lies at half of its distance: never farther, and what is found is ranked again."""
        vectors = np.array([[0, 0], [0, 3], [4, 0]], dtype=np.float32)
        hits = self.make([(np.arange(3), vectors)], "cosine").search([[1, 0]], 3)
        assert hits.row_ids.tolist() == [[2, 0, 1]]
        np.testing.assert_allclose(hits.distances, [[0, 0.5, 1]], atol=1e-6)


class TestLive(IndexConformance):
    """FAISS over the first two blocks and the beginning of nothing else; the rest is a fresh tail."""

    tolerance = 1e-5

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        old = blocks[:2]
        return LiveIndex(blocks, metric, flat(old, metric), row_ranges([row_ids for row_ids, _ in old]), NEVER_EXACT)
