"""The view `patch_labels`: which labels a patch shows, against the label maps themselves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import SPACING_MM, Cohort, add_random_encoder, write_nifti
from numpy.typing import NDArray

import isimed_index as isi
from isimed_index.api import Store
from isimed_index.scans.chunks import open_chunks
from isimed_index.scans.prepare import resample_labels
from isimed_index.space import Affine, apply_affine, inverse
from isimed_index.store.sql import patches


@pytest.fixture
def store(cohort: Cohort, tmp_path: Path) -> Store:
    shutil.copytree(cohort.store, tmp_path / "c")
    return isi.open(tmp_path / "c")


def counted(store: Store) -> Iterator[tuple[int, int, float]]:
    """Every patch's labels, voxel by voxel in patient mm: the scans of this cohort have the encoder's spacing."""
    maps: dict[str, tuple[NDArray[Any] | None, Affine]] = {}
    for row in store.sql("SELECT patch, scan, x_mm, y_mm, z_mm FROM patches ORDER BY patch").to_pylist():
        if row["scan"] not in maps:
            stored = open_chunks(store.snapshot.chunks_path(row["scan"]))
            maps[row["scan"]] = stored.labels(), inverse(stored.affine)
        labels, to_voxel = maps[row["scan"]]
        if labels is None:
            continue
        centre = apply_affine(to_voxel, [row["x_mm"], row["y_mm"], row["z_mm"]])
        first = np.rint(centre - (32 - 1) / 2).astype(int)
        box = tuple(slice(max(0, start), max(0, start + 32)) for start in first)
        found, counts = np.unique(labels[box], return_counts=True)
        for label, count in zip(found.tolist(), counts.tolist(), strict=True):
            if label:
                yield row["patch"], label, float(np.float32(count / 32**3))


def told(store: Store) -> list[tuple[int, int, float]]:
    rows = store.sql("SELECT patch, label, fraction FROM patch_labels").to_pylist()
    return [tuple(row.values()) for row in rows]


def test_every_patch_tells_the_labels_that_its_voxels_have(store: Store, monkeypatch: pytest.MonkeyPatch):
    expected = list(counted(store))
    assert len({label for _, label, _ in expected}) > 2
    assert told(store) == expected
    monkeypatch.setattr(patches, "LARGE_ROWS", 1)
    assert told(store) == expected
    query = "SELECT DISTINCT scan, label FROM {} ORDER BY ALL"
    both = query.format("patch_labels JOIN patches USING (patch) JOIN labels USING (scan, label)")
    assert store.sql(both).equals(store.sql(query.format("patch_labels JOIN patches USING (patch)")))


def test_it_stays_true_whatever_is_done_to_the_store(store: Store, tmp_path: Path):
    scans = store.sql("SELECT scan FROM scans ORDER BY scan")["scan"].to_pylist()
    before = told(store)
    store.compact()
    assert told(store) == before
    store.delete("patch % 3 = 0", "patches")
    store.delete(f"scan = '{scans[1]}'")
    assert told(store) == list(counted(store))
    store.compact()
    store.purge(store.sql(f"SELECT subject FROM scans WHERE scan = '{scans[-1]}'")["subject"][0].as_py())
    left = told(store)
    assert 0 < len(left) < len(before)
    assert left == list(counted(store))
    assert not [finding for finding in isi.check(store.path, read=1.0) if finding.severity == "damage"]
    store.export(tmp_path / "out", "parquet")
    again = isi.create(tmp_path / "again")
    again.import_(tmp_path / "out")
    assert [row[1:] for row in told(again)] == [row[1:] for row in left]
    assert "label_shares" not in again.sql("SELECT * FROM patches").column_names


def test_a_scan_without_labels_has_no_rows_and_a_store_without_has_none(tmp_path: Path):
    store = isi.create(tmp_path / "c")
    assert store.sql("FROM patch_labels").num_rows == 0
    rng = np.random.default_rng(0)
    values = rng.integers(0, 900, (20, 20, 20)).astype(np.int16)
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    write_nifti(tmp_path / "in" / "bare.nii.gz", values, affine)
    store.add(tmp_path / "in")
    add_random_encoder(store.path)
    store.index()
    assert store.sql("FROM patches").num_rows
    assert store.sql("FROM patch_labels").num_rows == 0
    write_nifti(tmp_path / "more" / "own.nii.gz", values[::-1] + 1, affine)
    write_nifti(tmp_path / "more" / "own_seg.nii.gz", (values[::-1] > 450).astype(np.uint8), affine)
    store.add(tmp_path / "more", labels="{stem}_seg.nii.gz")
    store.index()
    assert store.sql("SELECT DISTINCT scan FROM patch_labels JOIN patches USING (patch)").to_pylist() == [
        {"scan": "own"}
    ]
    store.compact()
    assert told(store) == list(counted(store))


def test_labels_follow_the_values_to_the_working_grid():
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    labels = np.arange(12 * 6 * 4).reshape(12, 6, 4)
    nearest = resample_labels(labels, affine, 2.0)
    assert nearest.shape == (6, 6, 6)
    for index in np.ndindex(nearest.shape):
        # centres of the target's voxels, in mm from the centre of the extent, which both grids share
        at = (np.array(index) - 2.5) * 2.0 / [1.0, 2.0, 3.0] + (np.array(labels.shape) - 1) / 2
        sides = zip(np.ceil(at - 0.5).astype(int), np.floor(at + 0.5).astype(int), labels.shape, strict=True)
        near = product(*[{min(max(side, 0), n - 1) for side in (low, high)} for low, high, n in sides])
        allowed = {int(labels[corner]) for corner in near}
        assert int(nearest[index]) in allowed
    assert resample_labels(labels, affine, None) is labels
    assert resample_labels(labels, np.diag([2.0, 2.0, 2.0, 1.0]), 2.0) is labels
