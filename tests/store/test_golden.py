"""A store that version 1 of the format wrote stays readable: by us, and by other tools without us."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

import isimed_index
from isimed_index.api import Store

FOLDER = Path(__file__).parents[1] / "data" / "golden-1"
POINT = (6.0, -14.0, 10.0)
QUESTIONS = {
    "scans": "SELECT * EXCLUDE (artefact) FROM scans ORDER BY scan",
    "subjects": "SELECT * FROM subjects ORDER BY subject",
    "labels": "SELECT scan, label, name, voxels, round(x_mm, 3) AS x FROM labels ORDER BY scan, label",
    "patches": "SELECT scan, count(*) AS n, min(patch) AS first, max(patch) AS last, round(sum(x_mm), 1) AS x, "
    "round(avg(cx_mm), 2) AS cx, round(avg(foreground), 3) AS f FROM patches GROUP BY scan ORDER BY scan",
    "dead": "SELECT count(*) AS n FROM patches WHERE patch % 11 = 0",
    "encoders": "SELECT encoder, name, method, dim, patch_vox FROM encoders",
    "indexes": "SELECT encoder, kind, rows, recall_at_10 FROM indexes",
    "generations": "SELECT generation, verb, rows FROM generations ORDER BY generation",
}


def answers(store: Store) -> dict[str, Any]:
    """What the store says, as JSON values."""
    said: dict[str, Any] = {name: store.sql(query).to_pylist() for name, query in QUESTIONS.items()}
    said["lookup"] = [
        {"scan": row["scan"], "xyz_mm": [round(row[f"{axis}_mm"], 2) for axis in "xyz"], "label": row["label"]}
        for row in store.lookup(POINT, "sub-01_ses-1_T1w").to_arrow().to_pylist()
    ]
    nearest = store.search_patches(POINT, "sub-01_ses-1_T1w", k=5).to_arrow()
    said["patch ids"] = nearest.column("patch").to_pylist()
    said["vectors"] = {
        segment.key: [segment.rows, round(float(np.abs(segment.vectors("descriptor").astype(float)).sum()), 2)]
        for segment in store.snapshot.segments()
    }
    said["tags"] = [[tag.name, tag.generation] for tag in store.tags()]
    return said


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the golden store, which must do without its empty folders: git keeps none, and other tools neither."""
    path = tmp_path / "golden.isimed"
    shutil.copytree(FOLDER / "cohort.isimed", path)
    for empty in ("intents", "leases", "tmp"):
        shutil.rmtree(path / empty, ignore_errors=True)
    return path


def test_it_answers_as_it_did(golden: Path) -> None:
    expected = json.loads((FOLDER / "answers.json").read_text(encoding="utf-8"))
    with isimed_index.open(golden, mode="r") as store:
        assert json.loads(json.dumps(answers(store))) == expected


def test_it_can_be_written_to(golden: Path) -> None:
    with isimed_index.open(golden) as store:
        left = store.delete("scan = 'sub-02_T1w'")
        assert left.scans == ("sub-02_T1w",)
        assert store.compact().segments == (1, 1)
        assert store.restore(tag="packed") == store.generation
        assert len(store.snapshot.scan_ids()) == 3


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2_000_000


def tree_digest(path: Path) -> str:
    """The digest of an artefact, as the specification says."""
    lines = []
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        relative = "" if file == path else file.relative_to(path).as_posix()
        lines.append(f"{relative}\0{file.stat().st_size}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def manifest_of(root: Path) -> dict[str, Any]:
    """The newest manifest, its seal and its artefacts checked by the specification alone."""
    document = json.loads(max((root / "manifests").iterdir()).read_text())
    seal = document.pop("sha256")
    assert hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest() == seal
    assert document["features"] == ["packed-segments", "tombstones"]
    for artefact in document["artefacts"]:
        assert tree_digest(root / artefact["path"]) == artefact["sha256"]
    return dict(document)


def test_duckdb_zarr_pyarrow_and_faiss_read_it_without_us() -> None:
    root = FOLDER / "cohort.isimed"
    expected = json.loads((FOLDER / "answers.json").read_text(encoding="utf-8"))
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for artefact in manifest_of(root)["artefacts"]:
        by_kind.setdefault(artefact["kind"], []).append(artefact)

    pieces = [str(root / piece["path"]) for piece in by_kind["table"] if piece["table"] == "scans"]
    query = "SELECT scan, artefact, nx, ny, nz FROM read_parquet($1, union_by_name = true) ORDER BY scan"
    scans = {row[1]: row for row in duckdb.execute(query, [pieces]).fetchall()}
    assert [row[0] for row in scans.values()] == [row["scan"] for row in expected["scans"]]
    for voxels in by_kind["scan"]:
        image = zarr.open_array(root / voxels["path"] / "0", mode="r")
        assert image.shape == scans[voxels["path"]][2:]
        assert np.asarray(image[...]).any()

    dead = {
        row for piece in by_kind["tombstone"] for row in pq.read_table(root / piece["path"]).column("patch").to_pylist()
    }
    live: dict[str, list[int]] = {}
    (segment,) = by_kind["segment"]
    row_ids = np.load(root / segment["path"] / "row_ids.npy", mmap_mode="r")
    vectors = np.load(root / segment["path"] / "descriptor.npy", mmap_mode="r")
    patches = pq.ParquetFile(root / segment["path"] / "patches.parquet")
    for part in segment["parts"]:
        rows = slice(part["start"], part["start"] + part["rows"])
        keep = ~np.isin(row_ids[rows], sorted(dead))
        scan = scans[part["scan_artefact"]][0]
        assert set(patches.read_row_group(part["part"]).column("scan").to_pylist()) == {scan}
        live[scan] = row_ids[rows][keep].tolist()
        stored = round(float(np.abs(vectors[rows][keep].astype(float)).sum()), 2)
        assert expected["vectors"][str(part["first_row_id"])] == [int(keep.sum()), stored]
    assert {row["scan"]: row["n"] for row in expected["patches"]} == {scan: len(rows) for scan, rows in live.items()}

    (indexed,) = by_kind["index"]
    index = faiss.read_index(str(root / indexed["path"] / "index.faiss"))
    assert index.ntotal == sum(stop - first for first, stop in indexed["covers"])
