"""The three implementations of `Index` against the contract."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from isimed_index.index.card import row_ranges
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex, Recipe
from isimed_index.index.protocol import Block, Index, Metric
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


class TestLive(IndexConformance):
    """FAISS over the first two blocks and the beginning of nothing else; the rest is a fresh tail."""

    tolerance = 1e-5

    @pytest.fixture(autouse=True)
    def never_exact_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("isimed_index.index.search._ALWAYS_EXACT", 0)
        monkeypatch.setattr("isimed_index.index.search._EXACT_SHARE", 0.0)

    def make(self, blocks: Sequence[Block], metric: Metric) -> Index:
        old = blocks[:2]
        return LiveIndex(blocks, metric, flat(old, metric), row_ranges([row_ids for row_ids, _ in old]))
