"""FAISS behind row ids: lists, filters, files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from isimed_index.errors import Incompatible, MissingExtra, StoreDamaged
from isimed_index.index import faiss_index
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.recipe import Recipe

RNG = np.random.default_rng(11)
VECTORS = RNG.uniform(-100, 100, (4_000, 3)).astype(np.float32)
ROW_IDS = 10_000_000_000 + 3 * np.arange(4_000)
RECIPE = Recipe("IVF32,SQ8", 32, 1)


@pytest.fixture(scope="module")
def lists() -> FaissIndex:
    return FaissIndex.build([(ROW_IDS, VECTORS)], "l2", RECIPE, 3, VECTORS)


def test_row_ids_beyond_32_bits(lists: FaissIndex) -> None:
    hits = lists.search(VECTORS[:50], 1)
    assert np.mean(hits.row_ids[:, 0] == ROW_IDS[:50]) > 0.9


def test_a_short_answer_visits_every_list(lists: FaissIndex) -> None:
    hits = lists.search(VECTORS[:3], 1_000)
    assert hits.found.all()


def test_a_filter_far_from_the_query_is_filled() -> None:
    lists = FaissIndex.build([(ROW_IDS, VECTORS)], "l2", Recipe("IVF32,Flat", 32, 1), 3, VECTORS)
    among = ROW_IDS[np.argsort(VECTORS[:, 0])[:400]]
    hits = lists.search([[100.0, 0, 0]], 10, among)
    nearest = ROW_IDS[np.argsort(np.linalg.norm(VECTORS - [100, 0, 0], axis=1))]
    assert set(hits.row_ids[0]) == set(nearest[np.isin(nearest, among)][:10])


@pytest.mark.parametrize("first", [0, 10_000_000_000])
def test_filters_by_bitmap_and_by_set_agree(first: int) -> None:
    row_ids = first + np.arange(100)
    index = FaissIndex.build([(row_ids, VECTORS[:100])], "l2", Recipe("Flat"), 3)
    among = row_ids[[0, 7, 8, 63, 64, 99]]
    hits = index.search(VECTORS[:1], 10, among)
    assert sorted(hits.row_ids[0][hits.found[0]].tolist()) == among.tolist()


def test_more_probes_find_more(lists: FaissIndex) -> None:
    truth = FaissIndex.build([(ROW_IDS, VECTORS)], "l2", Recipe("Flat"), 3).search(VECTORS[:100], 10).row_ids

    def recall(index: FaissIndex) -> float:
        found = index.search(VECTORS[:100], 10).row_ids
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)]))

    assert recall(lists) < recall(lists.with_recipe(probes=8))
    assert recall(lists.with_recipe(probes=32)) > 0.9


def test_round_trip(lists: FaissIndex, tmp_path: Path) -> None:
    digest = lists.save(tmp_path)
    again = FaissIndex.load(tmp_path, "l2", RECIPE, digest)
    assert len(again) == 4_000
    assert again.search(VECTORS[:9], 5).row_ids.tolist() == lists.search(VECTORS[:9], 5).row_ids.tolist()


def test_axes_are_stored_though_another_library_names_the_types_of_vectors():
    build = """
import faiss, SimpleITK, numpy as np
from isimed_index.index.faiss_index import FaissIndex
from isimed_index.index.recipe import Recipe
assert "SimpleITK" in str(type(faiss.LinearTransform(4, 2, True).A))  # SWIG: the last module that was loaded
vectors = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
index = FaissIndex.build([(np.arange(3000), vectors)], "l2", Recipe("PCA4,IVF8,SQ8", 8, 8), 8, vectors)
assert (index.search(vectors[:50], 1).row_ids[:, 0] == np.arange(50)).mean() > .8
"""
    subprocess.run([sys.executable, "-c", build], check=True, timeout=120)


@pytest.mark.parametrize("factory", ["IVF32,SQ8", "PCA2,IVF32,SQ8", "PCAR2,IVF32,RaBitQfs", "PCAR2,IVF32,PQ1x4fs"])
def test_a_large_file_is_mapped_and_answers_the_same(
    tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(factory, 32, 4, reach=300)
    built = FaissIndex.build([(ROW_IDS, VECTORS)], "l2", recipe, 3, VECTORS)
    digest = built.save(tmp_path)
    monkeypatch.setattr(faiss_index, "MAPPED_FROM", 1)
    mapped = FaissIndex.load(tmp_path, "l2", recipe, digest)
    assert "index.faiss" in Path("/proc/self/maps").read_text()
    among = ROW_IDS[::3]
    for kept in (None, among):
        one, other = (index.search(VECTORS[:40], 20, kept) for index in (built, mapped))
        assert one.row_ids.tolist() == other.row_ids.tolist()
        assert one.distances.tolist() == other.distances.tolist()


def test_a_mapped_file_is_not_read_as_a_whole(
    lists: FaissIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = lists.save(tmp_path)
    monkeypatch.setattr(faiss_index, "MAPPED_FROM", 0)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read"))
    assert len(FaissIndex.load(tmp_path, "l2", RECIPE, digest)) == 4_000


@pytest.mark.parametrize("harm", ["delete", "truncate", "flip"])
def test_a_damaged_file_is_refused(lists: FaissIndex, tmp_path: Path, harm: str) -> None:
    digest = lists.save(tmp_path)
    path = tmp_path / "index.faiss"
    data = bytearray(path.read_bytes())
    path.unlink()
    if harm == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(StoreDamaged, match="missing" if harm == "delete" else "hash"):
        FaissIndex.load(tmp_path, "l2", RECIPE, digest)


def test_an_intact_file_of_another_faiss(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "index.faiss").write_bytes(b"IxZZ" + bytes(200))
    with pytest.raises(Incompatible, match="another FAISS"):
        FaissIndex.load(tmp_path, "l2", RECIPE, hashlib.sha256(b"IxZZ" + bytes(200)).hexdigest())


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtra) as caught:
        FaissIndex.build([], "l2", Recipe("Flat"), 3)
    assert "isimed-index[cpu]" in caught.value.next_step


@pytest.mark.parametrize(
    "rows",
    [
        np.arange(40, 90),
        np.array([63]),
        np.array([3, 15, 16, 17, 40, 47, 48, 99]),
        np.arange(0, 100, 3),
        np.array([7, 50, 10**9]),
    ],
    ids=["range", "one", "bitmap", "even", "set"],
)
def test_a_filter_of_any_kind_keeps_its_rows(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isimed_index.index.faiss_index._IDS_AT_ONCE", 16)
    vectors = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    index = FaissIndex.build([(np.arange(100), vectors)], "l2", Recipe("Flat"), 4)
    found = index.search(vectors[:1], 100, rows).row_ids
    assert np.sort(found[found >= 0]).tolist() == rows[rows < 100].tolist()
