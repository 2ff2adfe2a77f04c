"""From recall, memory and latency to a recipe that was measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from isimed_index.errors import Incompatible, RecallBelowTarget, StoreDamaged, UsageError
from isimed_index.index import trials
from isimed_index.index.candidates import candidates, is_small, lists_for
from isimed_index.index.card import IndexCard, covered, row_ranges
from isimed_index.index.exact import ExactIndex
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.goal import Goal, Samples
from isimed_index.index.plan import build_index
from isimed_index.index.protocol import Block, Hits
from isimed_index.index.recall import RecallTest, at_least
from isimed_index.index.recipe import Recipe, ram_bytes
from isimed_index.index.search import LiveIndex
from isimed_index.index.spectrum import Axes, measure_depths
from isimed_index.index.strata import SHARES, Filters

MIB = 2**20


def position_like(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    """A smooth image of points in a box, nearly of rank 3, with noise; the seed draws the points, not the map."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (n, 3)) @ np.random.default_rng(99).normal(size=(3, dim))
    return (np.tanh(points) + 0.02 * rng.normal(size=(n, dim))).astype(np.float32)


def blocks_of(vectors: np.ndarray, parts: int = 3) -> list[Block]:
    row_ids = np.arange(len(vectors)) + 100
    return list(zip(np.array_split(row_ids, parts), np.array_split(vectors, parts), strict=True))


def test_few_rows_are_compared_one_by_one() -> None:
    assert is_small(9_999, 1024)
    assert is_small(50_000, 16)
    assert not is_small(10_000, 1024)


@pytest.mark.parametrize("n", [10_000, 1_000_000, 100_000_000])
def test_many_rows_get_lists_that_can_be_trained(n: int) -> None:
    assert np.sqrt(n) < lists_for(n) < n / 39


def test_memory_rises_with_what_is_kept_of_a_vector() -> None:
    """Along the candidates of a low-rank embedding: a sixteenth of float32 flat, and less."""
    quick, whole = candidates(1_000_000, 1024, {4: 48, 2: 64, 16: 48})
    sizes = {recipe.code: ram_bytes(recipe, 1_000_000, 1024) for recipe in quick}
    assert sizes["PQ24x4fs"] < sizes["RaBitQfs"] < sizes["SQ4"] < sizes["SQ8"]
    assert 40 < ram_bytes(Recipe("Flat"), 1_000_000, 1024) / sizes["SQ8"] < 80
    assert [recipe.pca for recipe in whole] == [0, 0]
    assert candidates(20_000, 64, {4: 64, 2: 64, 16: 64})[0][0] == Recipe("IVF256,SQ8", 256, 1)


@pytest.mark.parametrize(
    "factory",
    [
        "Flat",
        "IVF64,Flat",
        "IVF64,SQ8",
        "PCA16,IVF64,SQ8",
        "PCA16,IVF64,SQ4",
        "PCAR16,IVF64,RaBitQfs",
        "PCAR16,IVF64,PQ8x4fs",
    ],
)
def test_memory_is_that_of_the_file(tmp_path: Path, factory: str) -> None:
    """What is predicted before anything is built, against what FAISS writes (which lacks our table of lists)."""
    lists = 64 if "IVF" in factory else 0
    vectors = position_like(20_000, 32)
    recipe = Recipe(factory, lists, 1)
    FaissIndex.build([(np.arange(20_000), vectors)], "l2", recipe, 32, vectors[:5_000]).save(tmp_path)
    ours = 4 * 20_000 + lists * (recipe.pca or 32) * 4 if lists else 0
    size = (tmp_path / "index.faiss").stat().st_size
    assert ram_bytes(recipe, 20_000, 32) - ours == pytest.approx(size, rel=0.1)


def test_builds_a_flat_index_that_proves_its_recall(tmp_path: Path) -> None:
    vectors = position_like(800)
    card = build_index(tmp_path, blocks_of(vectors), "cosine", min_recall=1.0)
    assert (card.recipe.factory, card.recall_at_10, card.recall_at_10_filtered) == ("Flat", 1.0, 1.0)
    assert (card.rows, card.dim, card.row_ranges, card.recall_queries) == (800, 24, ((100, 900),), 100)
    assert card.bytes == (tmp_path / "index.faiss").stat().st_size
    assert IndexCard.read(tmp_path) == card


@pytest.fixture
def lists_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isimed_index.index.candidates.FEW_ROWS", 5_000)
    monkeypatch.setattr("isimed_index.index.candidates.FEW_FLOATS", 1)


@pytest.mark.usefixtures("lists_for_few")
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_the_target_holds_for_rows_that_are_new_with_and_without_filters(
    tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = position_like(8_000)
    blocks = blocks_of(vectors)
    card = build_index(tmp_path, blocks, metric, min_recall=0.97)  # type: ignore[arg-type]
    assert card.recipe.lists == 128
    assert 3 <= card.recipe.pca <= 16
    assert IndexCard.read(tmp_path) == card
    assert card.resident_bytes < ram_bytes(Recipe("Flat"), 8_000, 24) / 2
    assert [one.name for one in card.strata[:2]] == ["all", "random 0.001"]
    assert {(one.shape, one.share) for one in card.strata[1:]} == {
        (shape, share) for shape in ("random", "side", "ball") for share in SHARES
    }
    assert min(one.recall for one in card.strata) >= 0.97
    assert [one.verdict for one in card.tried].count("taken") == 1

    fresh = position_like(200, seed=1)  # rows that neither training nor tuning saw
    live = LiveIndex.open(blocks, card.metric, tmp_path)
    for among in (None, np.arange(100, 8_100)[vectors[:, 0] > np.quantile(vectors[:, 0], 0.8)]):
        truth = ExactIndex(blocks, card.metric).search(fresh, 10, among)
        found = live.search(fresh, 10, among)
        assert np.mean(found.distances <= truth.distances[:, -1:]) >= 0.95


@pytest.mark.usefixtures("lists_for_few")
def test_the_plan_says_what_was_tried_and_why(tmp_path: Path) -> None:
    blocks = blocks_of(position_like(6_000))
    card = build_index(tmp_path, blocks, "l2", 0.9, max_latency_ms=1e6)
    told = card.explain()
    assert "recall@10 of 0.9 or more" in told
    for one in card.tried:
        assert one.factory in told
    assert "taken" in told
    assert "side 0.1" in told
    taken = next(one for one in card.tried if one.verdict == "taken")
    assert taken.ms == min(one.ms for one in card.tried if one.ms is not None)
    assert taken.at_least is not None
    assert taken.at_least >= 0.9
    tight = min(one.bytes for one in card.tried if one.ms is not None)
    small = build_index(tmp_path, blocks, "l2", 0.9, max_ram_bytes=tight)
    assert small.resident_bytes <= tight
    assert "more memory than allowed" in {one.verdict for one in small.tried}


@pytest.mark.usefixtures("lists_for_few")
def test_many_rows_are_tried_on_a_sample_and_judged_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "TRIAL_FLOATS", 6_000 * 24)
    card = build_index(tmp_path, blocks_of(position_like(9_000)), "l2", 0.95)
    assert [one.rows for one in card.tried if one.verdict == "taken"] == [9_000]
    assert {one.rows for one in card.tried if one.verdict == "slower"} == {6_000}
    assert (card.rows, card.recall_at_10 >= 0.95) == (9_000, True)


@pytest.mark.usefixtures("lists_for_few")
def test_says_what_would_reach_the_recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of few bytes miss a recall of 1; float32 flat, which does not, has to be allowed."""
    monkeypatch.setattr(RecallTest, "by_depth", lambda self, _, depths: [np.full(9, 0.9)] * len(depths))
    vectors = position_like(6_000)
    flat = ram_bytes(Recipe("Flat"), 6_000, 24)
    with pytest.raises(RecallBelowTarget) as caught:
        build_index(tmp_path / "i", blocks_of(vectors), "l2", 0.95, flat - 1)
    assert "0.9000" in str(caught.value)
    assert f"raise max_ram to {np.ceil(flat / MIB * 100) / 100} MiB" in caught.value.next_step
    assert not (tmp_path / "i").exists()
    with pytest.raises(RecallBelowTarget, match=r"0\.9000") as caught:
        build_index(tmp_path / "i", blocks_of(vectors[:50]), "l2", 0.95)
    assert "min_recall" in caught.value.next_step


def test_says_which_latency_would_do(tmp_path: Path) -> None:
    blocks = blocks_of(position_like(300))
    with pytest.raises(RecallBelowTarget, match=r"takes .* ms a query here, more than 1e-06 ms") as caught:
        build_index(tmp_path / "i", blocks, "l2", max_latency_ms=1e-6)
    assert "max_latency" in caught.value.next_step
    assert build_index(tmp_path, blocks, "l2", max_latency_ms=1e6).ms < 1e6
    with pytest.raises(UsageError, match="max_latency"):
        Goal(max_latency_ms=0.0)


@pytest.fixture
def refused_at_first(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Judges who refuse every layout once, and a clock that counts lists and rows; the recipes that were judged."""
    judged: list[Recipe] = []

    def recall(_: RecallTest, live: LiveIndex) -> float:
        assert live.index is not None
        seen = {recipe.factory for recipe in judged}
        judged.append(live.index.recipe)
        return float(live.index.recipe.factory in seen)

    monkeypatch.setattr(RecallTest, "recall", recall)
    monkeypatch.setattr("isimed_index.index.tune.best_ms", lambda ask, *_: counted_ms(ask.__self__.index.recipe))
    return judged


def counted_ms(recipe: Recipe) -> float:
    return recipe.probes * recipe.fetch / recipe.lists if recipe.lists else 99.0


@pytest.mark.usefixtures("lists_for_few")
def test_a_recipe_that_the_judges_had_made_stronger_is_told_so_and_has_to_be_in_time(
    tmp_path: Path, refused_at_first: list[Recipe]
) -> None:
    blocks = blocks_of(position_like(5_000))
    card = build_index(tmp_path, blocks, "l2", 0.9)
    (taken,) = [one for one in card.tried if one.verdict == "taken"]
    assert (taken.probes, taken.fetch) == (card.recipe.probes, card.recipe.fetch)
    assert card.recipe.fetch > refused_at_first[0].fetch
    assert card.ms == taken.ms == counted_ms(card.recipe)
    assert taken.ms == min(one.ms for one in card.tried if one.verdict in ("taken", "slower"))

    limit = counted_ms(refused_at_first[0])  # as the quickest was tuned, which the judges refuse
    refused_at_first.clear()
    with pytest.raises(RecallBelowTarget, match=f"more than {limit:g} ms"):
        build_index(tmp_path / "i", blocks, "l2", 0.9, max_latency_ms=limit)


def test_who_judges_neither_tunes_nor_trains() -> None:
    exact = ExactIndex(blocks_of(np.zeros((12_000, 200), np.float16)), "l2")
    parts = Samples.draw(exact, 0, small=False)
    every = np.concatenate([parts.judges, parts.tuners, parts.training])
    assert len(set(every.tolist())) == every.size
    assert (parts.judges.size, parts.tuners.size) == (500, 400)
    assert parts.training.size >= 39 * lists_for(12_000)


def test_the_dimension_comes_from_neighbours_and_not_from_variance() -> None:
    """Neighbours differ in an axis that holds a millionth of the variance: it is the one that is needed."""
    rng = np.random.default_rng(0)
    rows = np.zeros((2_000, 6), np.float32)
    rows[:, 0] = 1000 * rng.integers(0, 5, 2_000)
    rows[:, 1] = 100 * rng.integers(0, 5, 2_000)
    rows[:, 2:] = rng.uniform(0, 1, (2_000, 4)) * [1, 0.9, 1e-4, 1e-4]
    axes = Axes.of(rows)
    assert axes.variance[:2].sum() / axes.variance.sum() > 0.999
    queries = rows[:50]
    near = np.argsort(np.linalg.norm(rows[None] - queries[:, None], axis=2), axis=1)[:, 1:6]
    found = measure_depths(axes, rows, 2_000, queries, rows[near], np.array([10, 40]))
    assert found.least(10, 0.99) == 4


def test_filters_keep_what_they_say() -> None:
    vectors = position_like(2_000)
    exact = ExactIndex(blocks_of(vectors), "l2")
    asked = Filters(exact, np.arange(100, 160), 0)
    made = {(one.shape, one.share): one.test for one in asked}
    assert len(made) == len(asked) == 12
    for one in asked:
        before = made[one.shape, one.share]
        assert (one.test.among is before.among, one.test.among.tolist()) == (False, before.among.tolist())
        assert one.test.near is before.near  # the truth is found once
    for (shape, share), test in made.items():
        kept = test.among - 100
        assert kept.size == share * 2_000
        if shape == "side":
            axis = np.linalg.svd(vectors[:60] - vectors[:60].mean(0), full_matrices=False)[2][0]
            height = vectors @ axis
            assert height[kept].max() <= np.delete(height, kept).min() + 1e-5
        if shape == "ball" and share == 0.1:
            assert vectors[kept].var(axis=0).sum() < 0.5 * vectors.var(axis=0).sum()


def test_filters_cut_regions_out_of_the_centres_where_these_are_known(tmp_path: Path) -> None:
    """The vectors know nothing of where the patches are, so that regions of the two have nothing in common."""
    blocks = blocks_of(position_like(2_000))
    centres = np.random.default_rng(1).uniform(-80, 80, (2_000, 3)).astype(np.float32)
    made = list(Filters(ExactIndex(blocks, "l2"), np.arange(100, 160), 0, centres))
    along = dict(zip(("left", "posterior", "inferior"), centres.T, strict=True))
    shapes = ("random", *along, "ball")
    assert [(one.shape, one.share) for one in made] == [(shape, share) for shape in shapes for share in SHARES]
    for one in made:
        kept = one.test.among - 100
        if one.shape in along:
            assert set(np.argsort(along[one.shape])[: kept.size]) == set(kept)
        if one.shape == "ball":
            away = [np.linalg.norm(centres - middle, axis=1) for middle in centres[kept]]
            assert any(np.sort(each)[kept.size - 1] >= each[kept].max() for each in away)
    with pytest.raises(UsageError, match=r"expected centres of shape \(2000, 3\), found \(1999, 3\)"):
        build_index(tmp_path, blocks, "l2", centres=centres[1:])


def test_the_bound_is_below_the_mean_by_what_few_queries_may_err() -> None:
    """Of 2000 tests with 400 queries each, the bound is above the true mean in about 5 of 100."""
    rng = np.random.default_rng(4)
    drawn = rng.binomial(10, 0.97, (2_000, 400)) / 10
    wrong = np.mean([at_least(shares) > 0.97 for shares in drawn])
    assert 0.03 < wrong < 0.07
    assert at_least(np.ones(9)) == 1.0


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


def test_a_newer_card_is_refused(tmp_path: Path) -> None:
    build_index(tmp_path, blocks_of(position_like(50)), "l2")
    write_fields(tmp_path, {"format_version": 3})
    with pytest.raises(Incompatible, match="format 3"):
        IndexCard.read(tmp_path)


def test_a_card_of_format_1_still_answers(tmp_path: Path) -> None:
    blocks = blocks_of(position_like(50))
    build_index(tmp_path, blocks, "l2")
    new = ("resident_bytes", "ms", "strata", "costs", "tried", "max_ram_bytes", "max_latency_ms")
    recipe = {"factory": "Flat", "lists": 0, "probes": 0}
    write_fields(tmp_path, {"format_version": 1, "recipe": recipe}, new)
    card = IndexCard.read(tmp_path)
    assert (card.format_version, card.recipe.factory, card.strata) == (1, "Flat", ())
    hits = LiveIndex.open(blocks, "l2", tmp_path).search(blocks[0][1][:3], 1)
    assert hits.row_ids[:, 0].tolist() == [100, 101, 102]
    assert "of 24 dimensions" in card.explain()


def write_fields(directory: Path, changes: dict[str, object], without: tuple[str, ...] = ()) -> None:
    """Change `index.json`, with a hash that fits."""
    path = directory / "index.json"
    fields = {**json.loads(path.read_text()), **changes}
    fields = {name: value for name, value in fields.items() if name not in (*without, "card_sha256")}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps({**fields, "card_sha256": digest}))
