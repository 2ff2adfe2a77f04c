"""Pooled vectors as an artefact: what holds of them after each verb of the store, and what is left on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import store_builders
from store_builders import (
    ENCODER,
    OTHER_ENCODER,
    add_encoder,
    add_frame,
    add_regions,
    add_scan,
    add_segment,
    encode_again,
    flip,
    orphans,
    patch_rows,
    whole_store,
)

from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import EncoderMismatch, StoreDamaged, UsageError
from isimed_index.lattice import Standard
from isimed_index.regions import pool_segment
from isimed_index.store import integrity
from isimed_index.store.regions import MADE, MEAN, ROWS, StoredRegions, living_regions, read_regions, write_regions
from isimed_index.store.repository import Repository
from isimed_index.store.tags import set_tag
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.audit import audit
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_encoder, delete_patches, delete_scans
from isimed_index.store.upkeep.purge import purge
from isimed_index.store.upkeep.repair import repair
from isimed_index.store.upkeep.restore import restore

FIRST, SECOND = "sub-01_T1w", "sub-02_ct"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Two scans, encoded, and the vectors of each scan and its label 7."""
    found = whole_store(tmp_path / "c")
    add_regions(found)
    return found


def shown(repository: Repository) -> list[tuple[str, int | None]]:
    """What the newest generation tells of, as SQL and as the arrays do."""
    head = repository.snapshot()
    rows = [(row["scan"], row["label"]) for row in head.sql("FROM regions").to_pylist()]
    living = living_regions(head, ENCODER)
    assert len(rows) == (0 if living is None else len(living.mean))
    return rows


def both(*scans: str) -> list[tuple[str, int | None]]:
    return [(scan, label) for scan in scans for label in (None, 7)]


def file_of(repository: Repository) -> Path:
    [artefact] = repository.snapshot().artefacts("region")
    return repository.path / artefact.path


def test_a_deleted_scan_takes_its_vectors_along(repository: Repository):
    assert shown(repository) == both(FIRST, SECOND)
    delete_scans(repository, f"scan = '{FIRST}'")
    assert shown(repository) == both(SECOND)
    living = living_regions(repository.snapshot(), ENCODER)
    assert living is not None
    np.testing.assert_array_equal(living.mean, read_regions(file_of(repository)).mean[2:])
    assert [finding.severity for finding in audit(repository, read=1.0) if finding.severity == "damage"] == []


def test_vectors_of_patches_that_are_gone_hold_no_more(repository: Repository):
    set_tag(repository.storage, "before", repository.snapshot().generation)
    delete_patches(repository, f"scan = '{SECOND}' AND i = 1")
    assert shown(repository) == both(FIRST)
    compact(repository)
    assert shown(repository) == both(FIRST)
    restore(repository, tag="before")
    assert shown(repository) == both(FIRST, SECOND)


def test_regions_none_of_which_holds_are_no_damage(repository: Repository):
    delete_patches(repository, "i = 1")
    assert shown(repository) == []
    assert [finding for finding in audit(repository, read=1.0) if finding.severity == "damage"] == []


def test_compaction_and_collection_change_nothing(repository: Repository):
    compact(repository)
    assert shown(repository) == both(FIRST, SECOND)
    collect(repository, keep=1)
    assert shown(repository) == both(FIRST, SECOND)
    before = file_of(repository)
    add_regions(repository)
    collect(repository, keep=1)
    assert not before.exists()
    assert file_of(repository).exists()
    assert orphans(repository) == set()


def test_a_scan_that_is_encoded_again_has_none_until_it_is_pooled(repository: Repository):
    encode_again(repository, SECOND, 5, seed=3)  # as many patches as before
    assert shown(repository) == both(FIRST)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -3.0])
def test_patches_without_a_share_of_foreground_do_not_count(
    repository: Repository, odd: float, monkeypatch: pytest.MonkeyPatch
):
    """Stores of earlier versions may hold what another program gave for it."""
    shares = pa.array([odd, 0.5, 0.5, 0.25, odd], pa.float32())
    rows = patch_rows(SECOND, 5)
    rows = rows.set_column(rows.column_names.index("foreground"), "foreground", shares)
    monkeypatch.setattr(store_builders, "patch_rows", lambda *_: rows)
    encode_again(repository, SECOND, 5, seed=3)
    head = repository.snapshot()
    segment = head.segments_by_scan(ENCODER)[SECOND]
    card = EncoderCard("toy", "toy", {}, "", 4, 2, 2.0, {"descriptor": 4}, "descriptor", "cosine", training={})
    standard = Standard("cosine", np.zeros(4, np.float32), 1.0)
    found = pool_segment(segment, card, standard)
    unit = standard.unit(segment.vectors("descriptor"))
    np.testing.assert_allclose(found.mean[0], np.array([0, 0.5, 0.5, 0.25, 0]) / 1.25 @ unit, atol=1e-6)
    assert found.rows["weight"][0].as_py() == 1.25
    assert found.rows["foreground"].to_pylist() == pytest.approx([0.45, 0.25, 0.25])


def test_a_deleted_encoder_takes_its_vectors_along(repository: Repository):
    delete_encoder(repository, ENCODER)
    assert repository.snapshot().artefacts("region") == []
    assert shown(repository) == []


@pytest.mark.parametrize("deleted", [False, True])
def test_a_purge_takes_the_file(repository: Repository, deleted: bool):
    before = file_of(repository)
    if deleted:
        delete_scans(repository, f"scan = '{FIRST}'")
    done = purge(repository, "sub-01")
    assert not before.exists()
    assert done.index_again == (ENCODER,)
    assert f"regions/{before.name}" in done.artefacts
    assert shown(repository) == []


def test_a_purge_takes_what_the_subjects_standard_measured(repository: Repository):
    """Pooled without them, but by the standard of a frame that was fitted with them."""
    delete_scans(repository, f"scan = '{FIRST}'")
    add_regions(repository)
    before = file_of(repository)
    assert shown(repository) == both(SECOND)
    purge(repository, "sub-01")
    assert not before.exists()


def test_a_purge_takes_what_covers_the_subject_beside_a_frame_without_them(tmp_path: Path):
    """Deleted before, so that no segment of theirs tells: what the regions cover does."""
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, SECOND)
    add_encoder(repository)
    add_segment(repository, SECOND, 5)
    add_frame(repository, SECOND)
    add_scan(repository, FIRST)
    add_segment(repository, FIRST, 3)
    add_regions(repository)
    delete_scans(repository, f"scan = '{FIRST}'")
    before = file_of(repository)
    purge(repository, "sub-01")
    assert not before.exists()
    assert len(repository.snapshot().artefacts("frame")) == 1


def test_a_purge_takes_regions_whose_frame_is_not_known_any_more(repository: Repository):
    """By what standard they were made cannot be told: its frame was dropped, and the history that named it taken."""
    delete_scans(repository, f"scan = '{FIRST}'")
    add_regions(repository)
    frames = [made.path for made in repository.snapshot().artefacts("frame")]
    with repository.transaction("repair") as transaction:
        transaction.commit(lambda _: Proposal(drop=frames))
    collect(repository, keep=1)
    before = file_of(repository)
    purge(repository, "sub-01", unknown=True)
    assert not before.exists()


def test_a_purge_leaves_what_has_nothing_of_the_subject(tmp_path: Path):
    repository = Repository.create(tmp_path / "c")
    add_scan(repository, SECOND)
    add_encoder(repository)
    add_segment(repository, SECOND, 5)
    add_frame(repository, SECOND)
    add_regions(repository)
    add_scan(repository, FIRST)
    before = file_of(repository)
    assert purge(repository, "sub-01").index_again == ()
    assert file_of(repository) == before
    assert shown(repository) == both(SECOND)


@pytest.mark.parametrize("name", [ROWS, MEAN, MADE])
def test_damage_is_found_and_a_repair_drops_them(repository: Repository, name: str):
    flip(file_of(repository) / name)
    integrity._verify_hash.cache_clear()
    with pytest.raises(StoreDamaged, match="region") as caught:
        living_regions(repository.snapshot(), ENCODER)
    assert caught.value.next_step == "isimed index"
    [finding] = [finding for finding in audit(repository, read=1.0) if finding.severity == "damage"]
    assert finding.artefact == f"regions/{file_of(repository).name}"
    assert "isimed index pools them again" in finding.repair
    done = repair(repository)
    assert done.index_again == (ENCODER,)
    assert repository.snapshot().artefacts("region") == []


def test_files_that_do_not_belong_together_are_refused(repository: Repository, tmp_path: Path):
    stored = read_regions(file_of(repository))
    (tmp_path / "short").mkdir()
    write_regions(tmp_path / "short", StoredRegions(stored.rows, stored.mean[:-1], stored.sd[:-1], stored.made))
    with pytest.raises(StoreDamaged, match="not one vector a row"):
        read_regions(tmp_path / "short")


def test_regions_name_an_encoder_of_the_store_and_rows_of_its_own(repository: Repository):
    add_encoder(repository, OTHER_ENCODER, "other")
    stored = read_regions(file_of(repository))
    for encoder, covers, error in (
        ("c0ffee", [[0, 8]], EncoderMismatch),
        (OTHER_ENCODER, [[0, 8]], EncoderMismatch),
        (ENCODER, [[0, 9]], UsageError),
    ):
        with repository.transaction("index") as transaction:
            path = transaction.stage("region")
            write_regions(path, stored)
            artefact = transaction.add("region", path, encoder=encoder, covers=covers)
            with pytest.raises(error, match="region"):
                transaction.commit(lambda _, made=artefact: Proposal([made]))


def test_an_older_version_is_told_that_it_does_not_know_them(repository: Repository):
    assert "regions" in repository.snapshot().manifest.features
    delete_encoder(repository, ENCODER)
    assert "regions" not in repository.snapshot().manifest.features
