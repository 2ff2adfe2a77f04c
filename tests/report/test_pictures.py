"""What `isimed plot` draws: the right panels, the right points, and a refusal where there is nothing to draw."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import COPIES, CROPPED, Cohort

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.errors import NotFound, UsageError
from isimed_index.report import pictures

POINT = [0.0, -26.0, -60.0]


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


def seen_by(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of one figure function, which still draws."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    draw = getattr(pictures, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return draw(*args, **kwargs)

    monkeypatch.setattr(pictures, name, spy)
    return calls


def test_match_shows_the_query_and_what_is_in_view(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = seen_by(monkeypatch, "match_figure")
    store.plot("match", tmp_path / "match.png", point=POINT, scan=COPIES[0].stem, k=10)
    (query, found), _ = calls[0]
    np.testing.assert_allclose(query.point_mm, POINT)
    titles = [panel.scan for panel in found]
    assert CROPPED.stem not in titles
    assert len(titles) == 3
    assert (tmp_path / "match.png").stat().st_size > 5000


def test_match_needs_a_point_and_a_stored_scan(store: Store, cohort: Cohort, tmp_path: Path):
    with pytest.raises(UsageError):
        store.plot("match", tmp_path / "a.png")
    with pytest.raises(NotFound, match="stored query scan"):
        store.plot("match", tmp_path / "a.png", point=POINT, scan=cohort.outside)
    with pytest.raises(UsageError, match="expected the figure"):
        store.plot("pie", tmp_path / "a.png")  # type: ignore[arg-type]
    assert not (tmp_path / "a.png").exists()


def test_umap_draws_embeddings_beside_their_canonical_places(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[np.ndarray] = []

    def flat(vectors: np.ndarray, seed: int) -> np.ndarray:
        seen.append(vectors)
        return vectors[:, :2].astype(np.float64)

    monkeypatch.setattr("isimed_index.project.umap", flat)
    monkeypatch.setattr("isimed_index.api._UMAP_PATCHES", 300)
    calls = seen_by(monkeypatch, "embedding_figure")
    store.plot("umap", tmp_path / "umap.png", where="subject IN ('sub-01', 'sub-03')", seed=4)
    centres = calls[0][0][1]
    assert seen[0].shape == (300, 8)
    assert centres.shape == (300, 3)
    rows = store.sql("SELECT patch, cx_mm, cy_mm, cz_mm FROM patches WHERE scan[:6] IN ('sub-01', 'sub-03')")
    places = np.stack([rows.column(f"c{axis}_mm").to_numpy() for axis in "xyz"], axis=1)
    segments = {segment.first_row_id: segment for segment in store.snapshot.segments()}
    for vector, centre in zip(seen[0][::30], centres[::30], strict=True):
        there = rows.column("patch").to_numpy()[np.abs(places - centre).max(axis=1) < 1e-3]  # of every copy
        firsts = [max(row for row in segments if row <= patch) for patch in there]
        stored = [
            segments[first].vectors("embedding")[patch - first] for first, patch in zip(firsts, there, strict=True)
        ]
        assert any(np.array_equal(vector, own.astype(np.float32)) for own in stored)


def test_umap_leaves_out_patches_that_have_no_canonical_place(cohort: Cohort, tmp_path: Path, monkeypatch):
    store = isi.open(shutil.copytree(cohort.store, tmp_path / "store"))
    monkeypatch.setattr("isimed_index.project.umap", lambda vectors, seed: vectors[:, :2].astype(np.float64))
    # As if killed before it.
    monkeypatch.setattr("isimed_index.indexing._commit_frame_and_regions", lambda *_, **__: None)
    from cohorts import Copy, head, rigid, write_copy

    store.add(write_copy(tmp_path / "new", Copy("sub-09", "RAS", rigid(shift=(1, 1, 1))), head()))
    store.index()
    calls = seen_by(monkeypatch, "embedding_figure")
    store.plot("umap", tmp_path / "umap.png")
    assert np.isfinite(calls[0][0][1]).all()


def test_a_wrong_suffix_is_refused_before_any_work(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def worked(*_: object) -> None:
        raise AssertionError("it was drawn first")

    for name in ("embedding_figure", "match_figure", "training_figure"):
        monkeypatch.setattr(f"isimed_index.report.pictures.{name}", worked)
    monkeypatch.setattr("isimed_index.project.umap", worked)
    for figure, options in (("umap", {}), ("training", {}), ("match", {"point": (10, 20, 30), "scan": COPIES[0].stem})):
        with pytest.raises(UsageError, match=r"found \.webp"):
            store.plot(figure, tmp_path / "figure.webp", **options)


def test_the_match_of_a_stored_scans_file_can_be_drawn(store: Store, cohort: Cohort, tmp_path: Path):
    store.plot("match", tmp_path / "match.png", point=(10, 20, 30), scan=cohort.file(COPIES[0]), k=1)
    assert (tmp_path / "match.png").stat().st_size > 5000


def test_nothing_to_draw(store: Store, tmp_path: Path):
    with pytest.raises(NotFound, match="no patch"):
        store.plot("umap", tmp_path / "umap.png", where="false")
    with pytest.raises(NotFound, match="no training record"):
        store.plot("training", tmp_path / "training.png")
