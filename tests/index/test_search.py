"""Search over live rows: FAISS, fresh tail, dead rows, filters and damage give one right answer."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isimed_index.errors import StoreWarning
from isimed_index.index.card import row_ranges
from isimed_index.index.costs import NEVER_EXACT, Costs
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.plan import build_index
from isimed_index.index.protocol import Block, Metric
from isimed_index.index.recipe import Recipe
from isimed_index.index.search import LiveIndex, search
from isimed_index.testing.conformance import brute_force

RNG = np.random.default_rng(5)
SEGMENTS: list[Block] = [
    (np.arange(start, start + 60), RNG.normal(size=(60, 6)).astype(np.float32)) for start in range(0, 360, 90)
]
QUERIES = RNG.normal(size=(7, 6)).astype(np.float32)


def index_over(blocks: list[Block], metric: Metric, recipe: Recipe) -> FaissIndex:
    sample = np.concatenate([vectors for _, vectors in blocks])
    return FaissIndex.build(blocks, metric, recipe, 6, sample)


@settings(max_examples=60, deadline=None)
@given(
    old=st.sets(st.integers(0, 3), min_size=1),
    alive=st.sets(st.integers(0, 3)),
    metric=st.sampled_from(["l2", "cosine"]),
    recipe=st.sampled_from([Recipe("Flat"), Recipe("IVF1,SQ8", 1, 1)]),
    among=st.none() | st.lists(st.integers(-5, 400), max_size=80),
    k=st.integers(1, 70),
)
def test_equals_brute_force_over_live_rows(
    old: set[int], alive: set[int], metric: Metric, recipe: Recipe, among: list[int] | None, k: int
) -> None:
    """Segments come (fresh tail) and go (dead rows) after the index was built."""
    indexed = [SEGMENTS[number] for number in sorted(old)]
    live = [SEGMENTS[number] for number in sorted(alive)]
    index = index_over(indexed, metric, recipe)
    joined = LiveIndex(live, metric, index, row_ranges([ids for ids, _ in indexed]), NEVER_EXACT)
    hits = joined.search(QUERIES, k, among)
    truth = brute_force(live, metric, QUERIES, k, among)
    assert hits.found.tolist() == truth.found.tolist()
    np.testing.assert_allclose(hits.distances, truth.distances, atol=1e-6)
    assert joined.search(QUERIES, k, among, exact=True).row_ids.tolist() == truth.row_ids.tolist()
    if among is not None:
        assert np.isin(hits.row_ids[hits.found], among).all()


def test_a_part_of_a_block_may_be_covered() -> None:
    """Compaction joins covered and fresh segments into one block."""
    joined = [(np.concatenate([ids for ids, _ in SEGMENTS]), np.concatenate([v for _, v in SEGMENTS]))]
    index = index_over(SEGMENTS[1:2], "l2", Recipe("Flat"))
    live = LiveIndex(joined, "l2", index, row_ranges([SEGMENTS[1][0]]))
    assert live.search(QUERIES, 9).row_ids.tolist() == brute_force(joined, "l2", QUERIES, 9).row_ids.tolist()


class Liar:
    """A FAISS index that ignores its filter and returns too little."""

    recipe = Recipe("Flat")

    def __len__(self) -> int:
        return 240

    def keep(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def search(self, queries: np.ndarray, k: int, among: object, enough: int) -> object:
        hits = ExactIndex(SEGMENTS, "l2").search(queries, k)
        hits.row_ids[:, 1:], hits.distances[:, 1:] = -1, np.inf
        return hits


def test_answers_are_checked_again() -> None:
    ranges = row_ranges([ids for ids, _ in SEGMENTS])
    live = LiveIndex(SEGMENTS, "l2", Liar(), ranges, NEVER_EXACT)  # type: ignore[arg-type]
    among = np.arange(95, 140)
    truth = brute_force(SEGMENTS, "l2", QUERIES, 5, among.tolist())
    assert live.search(QUERIES, 5, among).row_ids.tolist() == truth.row_ids.tolist()


MANY = np.random.default_rng(8).normal(size=(3_000, 6)).astype(np.float32)
MANY[:, :2] *= 8
LISTS = FaissIndex.build([(np.arange(2_000), MANY[:2_000])], "l2", Recipe("PCA3,IVF32,SQ8", 32, 1), 6, MANY)


@settings(max_examples=60, deadline=None)
@given(
    dead=st.sets(st.integers(0, 19), max_size=20),
    tail=st.integers(0, 1_000),
    kept=st.none() | st.tuples(st.sampled_from(["random", "side"]), st.integers(1, 3_000)),
    probes=st.integers(1, 32),
    reach=st.integers(0, 500),
    k=st.integers(1, 300),
    seed=st.integers(0, 9),
)
def test_lists_keep_to_the_filter_and_are_never_short(
    dead: set[int], tail: int, kept: tuple[str, int] | None, probes: int, reach: int, k: int, seed: int
) -> None:
    """Approximate: living rows that the filter keeps, once each, at true distances, and k where there are k."""
    rng = np.random.default_rng(seed)
    scans = [np.arange(100 * scan, 100 * scan + 100) for scan in range(20) if scan not in dead]
    scans += [np.arange(2_000, 2_000 + tail)] if tail else []
    blocks: list[Block] = [(rows, MANY[rows]) for rows in scans]
    order = rng.permutation(3_000) if kept is None or kept[0] == "random" else np.argsort(MANY[:, 0])
    among = None if kept is None else np.sort(order[: kept[1]])
    index = LISTS.with_recipe(probes=probes, reach=reach, fetch=1.0, deep=1.0)
    live = LiveIndex(blocks, "l2", index, ((0, 2_000),), NEVER_EXACT)
    queries = MANY[rng.choice(3_000, 3)] + np.float32(0.1)
    hits = live.search(queries, k, among)
    truth = brute_force(blocks, "l2", queries, k, None if among is None else among.tolist())
    assert hits.found.sum(axis=1).tolist() == truth.found.sum(axis=1).tolist()
    for query, row_ids, distances in zip(queries, hits.row_ids, hits.distances, strict=True):
        found = row_ids[row_ids >= 0]
        assert len(set(found.tolist())) == found.size
        assert among is None or np.isin(found, among).all()
        assert np.isin(found, np.concatenate(scans) if scans else []).all()
        away = np.linalg.norm(MANY[found].astype(np.float64) - query, axis=1)
        np.testing.assert_allclose(distances[: found.size], away, rtol=1e-5)
    again = live.search(queries, k, among, exact=True)
    assert again.row_ids.tolist() == truth.row_ids.tolist()


def test_many_queries_are_answered_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveIndex([(np.arange(2_000), MANY[:2_000])], "l2", LISTS.with_recipe(probes=4), ((0, 2_000),), NEVER_EXACT)
    among = np.arange(0, 2_000, 2)
    whole = [live.search(MANY[:50], 7, kept) for kept in (None, among)]
    monkeypatch.setattr("isimed_index.index.search._ROWS_AT_ONCE", 300)
    for before, kept in zip(whole, (None, among), strict=True):
        assert live.search(MANY[:50], 7, kept).row_ids.tolist() == before.row_ids.tolist()
    assert live.search(MANY[:0], 7).row_ids.shape == (0, 7)


def test_deleted_rows_do_not_crowd_out_living_ones() -> None:
    """The 1900 nearest of 2000 rows are dead: what lives is found by the index all the same, as by brute force."""
    order = np.argsort(np.linalg.norm(MANY[:2_000] - MANY[0], axis=1))
    alive = np.sort(order[1_900:])
    index = LISTS.with_recipe(probes=1, reach=0, deep=8.0)
    live = LiveIndex([(alive, MANY[alive])], "l2", index, ((0, 2_000),), NEVER_EXACT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExactIndex, "search", lambda *_: pytest.fail("searched exactly"))
        hits = live.search(MANY[:1], 10)
    assert hits.row_ids.tolist() == brute_force([(alive, MANY[alive])], "l2", MANY[:1], 10).row_ids.tolist()


@pytest.fixture
def broken_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("FAISS was asked")

    monkeypatch.setattr(FaissIndex, "search", refuse)


@pytest.mark.usefixtures("broken_search")
def test_few_rows_are_searched_exactly(tmp_path: Path) -> None:
    """Where that is cheaper, by the costs that were measured."""
    ten = Costs(exact_call=0, exact_row=1, exact_pair=0, index_call=10, index_row=0, index_query=0)
    build = LiveIndex(SEGMENTS, "l2", index_over(SEGMENTS, "l2", Recipe("Flat")), ((0, 360),), ten)
    assert build.search(QUERIES, 2, np.arange(10)).found.all()
    with pytest.raises(AssertionError, match="FAISS was asked"):
        build.search(QUERIES, 2, np.arange(11))
    assert build.search(QUERIES, 2, [3, 4]).found.all()
    assert build.search(QUERIES, 2, exact=True).found.all()
    with pytest.raises(AssertionError, match="FAISS was asked"):
        build.search(QUERIES, 2)


@pytest.mark.parametrize(
    "harm",
    ["index gone", "card gone", "all gone", "index flipped", "card flipped", "index cut", "other metric", "no faiss"],
)
def test_damage_costs_time_but_no_answer(tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "index"
    build_index(directory, SEGMENTS, "cosine" if harm == "other metric" else "l2")
    index, card = directory / "index.faiss", directory / "index.json"
    if harm in ("index gone", "all gone"):
        index.unlink()
    if harm in ("card gone", "all gone"):
        card.unlink()
    if harm.endswith("flipped"):
        path = index if harm.startswith("index") else card
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if harm == "index cut":
        index.write_bytes(index.read_bytes()[:-100])
    if harm == "no faiss":
        monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.warns(StoreWarning, match="searching exactly"):
        hits = search(SEGMENTS, "l2", directory, QUERIES, 5)
    assert hits.row_ids.tolist() == brute_force(SEGMENTS, "l2", QUERIES, 5).row_ids.tolist()


def test_an_index_of_other_dimensions_is_not_asked(tmp_path: Path) -> None:
    build_index(tmp_path, [(np.arange(9), np.eye(9, dtype=np.float32))], "l2")
    with pytest.warns(StoreWarning, match="9-d"):
        assert search(SEGMENTS, "l2", tmp_path, QUERIES, 5).found.all()


def test_a_file_of_another_generation_is_not_asked(tmp_path: Path) -> None:
    """The card of one index beside the file of another: told of, and the answer is right."""
    build_index(tmp_path / "old", SEGMENTS[:2], "l2")
    build_index(tmp_path / "new", SEGMENTS, "l2")
    (tmp_path / "old" / "index.faiss").replace(tmp_path / "new" / "index.faiss")
    with pytest.warns(StoreWarning, match="does not match its hash"):
        hits = search(SEGMENTS, "l2", tmp_path / "new", QUERIES, 5)
    assert hits.row_ids.tolist() == brute_force(SEGMENTS, "l2", QUERIES, 5).row_ids.tolist()


def test_without_an_index(tmp_path: Path) -> None:
    truth = brute_force(SEGMENTS, "l2", QUERIES, 5)
    assert search(SEGMENTS, "l2", None, QUERIES, 5).row_ids.tolist() == truth.row_ids.tolist()
    assert search(SEGMENTS, "l2", tmp_path / "absent", QUERIES, 5, exact=True).found.all()
    assert not LiveIndex([], "l2").search(QUERIES, 5).found.any()
