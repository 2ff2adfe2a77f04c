"""Segments give back what was written, or say that they cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_builders import ENCODER, patch_rows, vectors, whole_store

from isimed_index.errors import NotFound, StoreDamaged, UsageError
from isimed_index.store.repository import Repository
from isimed_index.store.segment import Segment, check_segment, write_segment


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    return whole_store(tmp_path / "c").snapshot().segments(ENCODER)[1]


def folder(segment: Segment) -> Path:
    return segment.storage.root / segment.path


def test_round_trip(segment: Segment) -> None:
    assert segment.row_ids.tolist() == [3, 4, 5, 6, 7]
    assert segment.patches().equals(patch_rows("sub-02_ct", 5).cast(segment.patches().schema))
    for name, expected in vectors(5).items():
        found = segment.vectors(name)
        assert isinstance(found, np.memmap)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        assert not found.flags.writeable


def test_an_unknown_output_is_not_found(segment: Segment) -> None:
    with pytest.raises(NotFound, match="descriptor, position"):
        segment.vectors("logits")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def zero_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, zero_page, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["descriptor.npy", "position.npy", "patches.parquet"])
def test_a_damaged_file_is_an_error_and_never_an_answer(
    segment: Segment, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder(segment) / name)
    for read in (lambda: segment.vectors("descriptor"), segment.patches):
        with pytest.raises(StoreDamaged, match="the segment"):
            read()


def test_a_missing_or_crowded_segment_is_damage(segment: Segment) -> None:
    (folder(segment) / "more.npy").write_bytes(b"")
    with pytest.raises(StoreDamaged, match=r"in 5 files, expected .* in 4 files"):
        segment.patches()
    folder(segment).rename(segment.storage.root / "gone")
    with pytest.raises(StoreDamaged, match="is missing"):
        segment.patches()


def test_truncation_is_found_after_the_first_read_too(segment: Segment) -> None:
    segment.patches()
    truncate(folder(segment) / "position.npy")
    with pytest.raises(StoreDamaged):
        segment.vectors("position")


def test_damage_of_one_segment_leaves_the_others(segment: Segment) -> None:
    flip(folder(segment) / "position.npy")
    other = Repository.open(segment.storage.root).snapshot().segments(ENCODER)[0]
    assert other.vectors("position").shape == (3, 3)


def test_an_empty_segment_is_a_segment(tmp_path: Path) -> None:
    fields = write_segment(tmp_path, patch_rows("s", 0), {"embedding": np.empty((0, 4), np.float32)})
    assert fields == {"rows": 0, "outputs": {"embedding": {"dim": 4, "dtype": "float32"}}}
    check_segment(tmp_path, fields)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("embedding", np.zeros((3, 4), np.float64), "float16 or float32"),
        ("embedding", np.zeros((2, 4), np.float32), r"shape \(3, d\)"),
        ("embedding", np.zeros(3, np.float32), r"shape \(3, d\)"),
        ("embedding", np.full((3, 4), np.nan, np.float32), "NaN"),
        ("../embedding", np.zeros((3, 4), np.float32), "name"),
        ("embedding", np.array([[None], [1], [2]]), "float16 or float32"),
    ],
)
def test_what_is_not_an_embedding_is_refused(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_segment(tmp_path, patch_rows("s", 3), {name: array})


def test_counts_are_checked_before_a_commit(tmp_path: Path) -> None:
    fields = write_segment(tmp_path, patch_rows("s", 3), vectors(3))
    with pytest.raises(StoreDamaged, match="3 rows, expected 4"):
        check_segment(tmp_path, {**fields, "rows": 4})
    np.save(tmp_path / "position.npy", np.zeros((3, 2), np.float32))
    with pytest.raises(StoreDamaged, match=r"position\.npy"):
        check_segment(tmp_path, fields)


def test_a_pickled_array_is_never_loaded(tmp_path: Path) -> None:
    fields = write_segment(tmp_path, patch_rows("s", 1), {"embedding": np.zeros((1, 1), np.float32)})
    np.save(tmp_path / "embedding.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(StoreDamaged):
        check_segment(tmp_path, fields)
