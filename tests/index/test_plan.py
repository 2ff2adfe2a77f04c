"""From recall and memory to a layout that was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from isimed_index.errors import Incompatible, RecallBelowTarget, StoreDamaged, UsageError
from isimed_index.index.card import IndexCard, covered, row_ranges
from isimed_index.index.exact import ExactIndex
from isimed_index.index.plan import FLAT_BELOW, build_index, choose, ram_bytes
from isimed_index.index.protocol import Block, Hits
from isimed_index.index.recall import RecallTest
from isimed_index.index.search import LiveIndex

MIB = 2**20


def position_like(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    """A smooth image of points in a box, nearly of rank 3, with noise; the seed draws the points, not the map."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (n, 3)) @ np.random.default_rng(99).normal(size=(3, dim))
    return (np.tanh(points) + 0.02 * rng.normal(size=(n, dim))).astype(np.float32)


def blocks_of(vectors: np.ndarray, parts: int = 3) -> list[Block]:
    row_ids = np.arange(len(vectors)) + 100
    return list(zip(np.array_split(row_ids, parts), np.array_split(vectors, parts), strict=True))


def test_few_rows_are_flat() -> None:
    assert [recipe.factory for recipe in choose(FLAT_BELOW - 1, 64)] == ["Flat"]


@pytest.mark.parametrize("n", [50_000, 1_000_000, 100_000_000])
def test_many_rows_get_lists_that_can_be_trained(n: int) -> None:
    recipes = choose(n, 64)
    assert [recipe.factory.split(",")[-1] for recipe in recipes] == ["SQ8", "Flat", "Flat"]
    assert np.sqrt(n) < recipes[0].lists < n / 39


def test_memory_limits_the_choice() -> None:
    n, dim = 1_000_000, 1024
    coded, *floats = choose(n, dim)
    limit = ram_bytes(coded, n, dim)
    assert choose(n, dim, limit) == [coded]
    assert choose(n, dim, limit - 1) == []
    assert 3 < min(ram_bytes(recipe, n, dim) for recipe in floats) / limit < 4


def test_builds_a_flat_index_that_proves_its_recall(tmp_path: Path) -> None:
    vectors = position_like(800)
    card = build_index(tmp_path, blocks_of(vectors), "cosine", min_recall=1.0)
    assert (card.recipe.factory, card.recall_at_10, card.recall_at_10_filtered) == ("Flat", 1.0, 1.0)
    assert (card.rows, card.dim, card.row_ranges, card.recall_queries) == (800, 24, ((100, 900),), 500)
    assert card.bytes == (tmp_path / "index.faiss").stat().st_size
    assert IndexCard.read(tmp_path) == card


@pytest.fixture
def lists_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isimed_index.index.plan.FLAT_BELOW", 5_000)
    monkeypatch.setattr("isimed_index.index.search._ALWAYS_EXACT", 0)


@pytest.mark.usefixtures("lists_for_few")
def test_lists_are_probed_until_the_target_is_met(tmp_path: Path) -> None:
    blocks = blocks_of(position_like(8_000))
    low = build_index(tmp_path / "low", blocks, "l2", min_recall=0.7)
    high = build_index(tmp_path / "high", blocks, "l2", min_recall=0.98)
    assert low.recipe.factory == high.recipe.factory == "IVF128,SQ8"
    assert 1 <= low.recipe.probes < high.recipe.probes < 128
    assert 0.7 <= low.recall_at_10 < 0.98 <= high.recall_at_10
    assert high.recall_at_10_filtered >= 0.98

    fresh = position_like(200, seed=1)  # rows that neither training nor tuning saw
    live = LiveIndex.open(blocks, "l2", tmp_path / "high")
    truth = ExactIndex(blocks, "l2").search(fresh, 10)
    found = live.search(fresh, 10)
    assert np.mean(found.distances <= truth.distances[:, -1:]) >= 0.97


@pytest.mark.usefixtures("lists_for_few")
def test_says_what_would_reach_the_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecallTest, "recall", lambda *_: 0.9)
    vectors = position_like(6_000)
    coded = choose(6_000, 24)[0]
    with pytest.raises(RecallBelowTarget) as caught:
        build_index(tmp_path / "i", blocks_of(vectors), "l2", 0.95, ram_bytes(coded, 6_000, 24))
    flat = ram_bytes(choose(10, 24)[0], 6_000, 24) / MIB
    assert "0.9000" in str(caught.value)
    assert f"raise max_ram to {flat:.1f} MiB" in caught.value.next_step
    assert not (tmp_path / "i").exists()
    with pytest.raises(RecallBelowTarget, match=r"0\.9000") as caught:
        build_index(tmp_path / "i", blocks_of(vectors), "l2", 0.95)
    assert "min_recall" in caught.value.next_step


def test_says_when_no_index_fits(tmp_path: Path) -> None:
    with pytest.raises(RecallBelowTarget, match="no index fits") as caught:
        build_index(tmp_path, blocks_of(position_like(300)), "l2", max_ram_bytes=1_000)
    assert "max_ram" in caught.value.next_step


def test_equal_vectors_cost_no_recall(tmp_path: Path) -> None:
    card = build_index(tmp_path, blocks_of(np.ones((200, 4), dtype=np.float32)), "l2", min_recall=1.0)
    assert card.recall_at_10 == 1.0


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_handful_of_rows(tmp_path: Path, n: int) -> None:
    assert build_index(tmp_path, blocks_of(position_like(n), 1), "l2").recall_at_10 == 1.0


def test_refuses_no_rows_and_impossible_recalls(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no rows"):
        build_index(tmp_path, [], "l2")
    for recall in (0.0, 1.5):
        with pytest.raises(UsageError, match="min_recall"):
            build_index(tmp_path, blocks_of(position_like(10)), "l2", recall)


class Partial:
    """Exact search that misses the farther half of what it should find."""

    def __init__(self, exact: ExactIndex) -> None:
        self.exact = exact

    def search(self, queries: object, k: int, among: object = None) -> Hits:
        hits = self.exact.search(queries, k, among)  # type: ignore[arg-type]
        hits.row_ids[:, 6:], hits.distances[:, 6:] = -1, np.inf
        return hits


def test_recall_counts_others_only() -> None:
    """Six of eleven, itself among them, are five of the ten that were to be found."""
    exact = ExactIndex(blocks_of(position_like(400)), "l2")
    held_out = np.arange(100, 500, 7)
    assert RecallTest.prepare(exact, held_out).recall(exact) == 1.0
    assert RecallTest.prepare(exact, held_out).recall(Partial(exact)) == pytest.approx(0.5)
    others = np.setdiff1d(np.arange(100, 500), held_out)
    assert RecallTest.prepare(exact, held_out, others).recall(exact) == 1.0
    assert RecallTest.prepare(exact, held_out, others).recall(Partial(exact)) == pytest.approx(0.6)
    assert RecallTest.prepare(exact, held_out, others[:0]).recall(exact) == 1.0


def test_ranges_of_rows() -> None:
    ranges = row_ranges([np.array([1, 2, 3]), np.array([], dtype=np.int64), np.array([4, 7]), np.array([9])])
    assert ranges == ((1, 5), (7, 8), (9, 10))
    assert covered(np.arange(12), ranges).tolist() == [1, 2, 3, 4, 7, 9]
    assert covered(np.arange(12), ()).size == 0


def test_a_changed_card_is_refused(tmp_path: Path) -> None:
    build_index(tmp_path, blocks_of(position_like(50)), "l2")
    path = tmp_path / "index.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "row_ranges": [[0, 99_999]]}))
    with pytest.raises(StoreDamaged, match="hash"):
        IndexCard.read(tmp_path)
    path.write_text("{")
    with pytest.raises(StoreDamaged, match="cannot be read"):
        IndexCard.read(tmp_path)
    path.unlink()
    with pytest.raises(StoreDamaged, match="missing"):
        IndexCard.read(tmp_path)


def test_a_newer_card_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("isimed_index.index.card.FORMAT_VERSION", 2)
        build_index(tmp_path, blocks_of(position_like(50)), "l2")
    with pytest.raises(Incompatible, match="format 2"):
        IndexCard.read(tmp_path)
