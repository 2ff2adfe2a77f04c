"""What an audit finds: bytes, counts and references that are not as committed, now and in old generations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from store_builders import add_scan, flip, forge, whole_store

from isimed_index.errors import Incompatible, UsageError
from isimed_index.store.files import FORMAT, HEAD, MANIFESTS, new_id
from isimed_index.store.manifest import Artefact, manifest_name, seal
from isimed_index.store.repository import Repository
from isimed_index.store.tags import set_tag
from isimed_index.store.upkeep.audit import audit
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.findings import Finding


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return whole_store(tmp_path / "c")


def kinds(repository: Repository, read: float = 1.0, severity: str = "") -> list[str]:
    return sorted({found.kind for found in audit(repository, read) if severity in ("", found.severity)})


def only(repository: Repository, read: float = 1.0) -> Finding:
    (found,) = audit(repository, read)
    return found


def of_kind(repository: Repository, kind: str) -> list[Artefact]:
    return repository.snapshot().artefacts(kind)


@pytest.mark.parametrize("read", [0.0, 0.5, 1.0])
def test_nothing_is_found_in_a_sound_store(repository: Repository, read: float):
    assert audit(repository, read) == []


def test_a_changed_byte_is_found_by_reading(repository: Repository):
    segment = of_kind(repository, "segment")[1]
    repository.snapshot().verified(segment)  # this process has seen it whole
    flip(repository.path / segment.path / "descriptor.npy")
    assert audit(repository) == []
    found = only(repository)
    assert (found.kind, found.artefact, found.severity) == ("artefact_hash", segment.path, "damage")
    assert found.scans == ("sub-02_ct",)
    assert found.generations == (7, 6, 5)
    assert "isimed index" in found.repair


def test_a_share_of_the_bytes_is_drawn_by_seed(repository: Repository):
    flip(repository.path / of_kind(repository, "scan")[0].path)
    drawn = [len(audit(repository, 0.5, seed)) for seed in range(20)]
    assert drawn == [len(audit(repository, 0.5, seed)) for seed in range(20)]
    assert 0 < sum(drawn) < 20


@pytest.mark.parametrize("read", [-0.1, 1.1])
def test_a_share_is_between_none_and_all(repository: Repository, read: float):
    with pytest.raises(UsageError):
        audit(repository, read)


@pytest.mark.parametrize("kind", ["scan", "encoder", "segment", "table", "frame", "index"])
def test_sizes_and_missing_artefacts_are_found_without_reading(repository: Repository, kind: str):
    path = repository.path / of_kind(repository, kind)[0].path
    file = path if path.is_file() else min(found for found in path.rglob("*") if found.is_file())
    file.write_bytes(file.read_bytes() + b"\0")
    assert "artefact_size" in kinds(repository, 0.0)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "artefact_missing" in kinds(repository, 0.0)


def test_what_only_old_generations_name_is_a_warning(repository: Repository):
    voxels = of_kind(repository, "scan")[0].path
    delete_scans(repository, "scan = 'sub-01_T1w'")
    assert kinds(repository) == ["chart_of_unknown_scan"]
    flip(repository.path / voxels)
    (found,) = (found for found in audit(repository, 1.0) if found.severity != "info")
    assert (found.kind, found.severity, found.generations) == ("artefact_hash", "warning", (7, 6, 5, 4, 3, 2, 1))


def test_a_chart_of_a_scan_that_is_gone_harms_nobody(repository: Repository):
    delete_scans(repository, "scan = 'sub-01_T1w'")
    found = only(repository)
    assert (found.kind, found.severity, found.scans) == ("chart_of_unknown_scan", "info", ("sub-01_T1w",))


@pytest.mark.parametrize("content", [None, b"", b"{}\n", b"\xff\xfe"])
def test_documents_that_cannot_be_read(repository: Repository, content: bytes | None):
    for name, kind in ((FORMAT, "format_damaged"), (HEAD, "head_missing" if content is None else "head_damaged")):
        path = repository.path / name
        kept = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        assert kinds(Repository.unchecked(repository.path)) == [kind]
        path.write_bytes(kept)


def test_a_damaged_head_is_told_beside_all_that_the_last_good_generation_says(repository: Repository):
    (repository.path / manifest_name(7)).write_bytes(b"")
    flip(repository.path / of_kind_at(repository, 6, "frame").path)
    assert kinds(repository) == ["artefact_hash", "manifest_damaged", "orphan"]
    (repository.path / manifest_name(7)).unlink()
    assert kinds(repository) == ["artefact_hash", "manifest_missing", "orphan"]


def of_kind_at(repository: Repository, generation: int, kind: str) -> Artefact:
    return repository.snapshot(generation).artefacts(kind)[0]


def test_a_damaged_manifest_of_the_past(repository: Repository):
    flip(repository.path / manifest_name(3))
    found = only(repository)
    assert (found.kind, found.generations) == ("manifest_damaged", (3,))
    (repository.path / manifest_name(3)).unlink()
    assert (only(repository).kind, only(repository).severity) == ("history_gap", "info")


def test_a_manifest_that_was_replaced(repository: Repository):
    manifest = repository.snapshot(3).manifest
    (repository.path / manifest_name(3)).write_bytes(replace(manifest, verb="other").to_bytes())
    assert kinds(repository) == ["manifest_replaced"]


def test_a_store_without_any_good_generation(repository: Repository):
    for file in (repository.path / MANIFESTS).iterdir():
        file.write_bytes(b"")
    assert kinds(repository, severity="damage") == ["manifest_damaged", "no_generation"]
    shutil.rmtree(repository.path / MANIFESTS)
    assert kinds(repository, severity="damage") == ["no_generation"]


def test_a_newer_store_is_not_damaged(repository: Repository):
    (repository.path / FORMAT).write_bytes(seal({"format_version": 99}))
    with pytest.raises(Incompatible):
        audit(repository)


def dropped(kind: str, which: int = 0, table: str = "") -> Callable[[Artefact], Artefact | None]:
    """Leaves out the which-th artefact of a kind."""
    seen = []

    def change(artefact: Artefact) -> Artefact | None:
        if artefact.kind == kind and artefact.fields.get("table", "") == table:
            seen.append(artefact)
            return None if len(seen) == which + 1 else artefact
        return artefact

    return change


def with_fields(kind: str, **fields: object) -> Callable[[Artefact], Artefact]:
    """Gives artefacts of a kind other fields."""
    return lambda artefact: (
        replace(artefact, fields={**artefact.fields, **fields}) if artefact.kind == kind else artefact
    )


FORGED = {
    "scan_without_voxels": (dropped("scan"), {}),
    "segment_without_scan": (dropped("scan"), {}),
    "voxels_without_scan": (dropped("table", 1, "scans"), {}),
    "encoder_unknown": (dropped("encoder"), {}),
    "row_ids_overlap": (with_fields("segment", first_row_id=0), {}),
    "row_ids_beyond": (lambda artefact: artefact, {"next_row_id": 4}),
    "index_coverage": (with_fields("index", covers=[[0, 99]]), {}),
    "table_rows": (with_fields("table", rows=7), {}),
    "segment_form": (with_fields("segment", rows=4), {}),
    "encoder_mismatch": (with_fields("encoder", encoder="0000"), {}),
}


@pytest.mark.parametrize("kind", FORGED)
def test_references_that_do_not_hold(repository: Repository, kind: str):
    change, fields = FORGED[kind]
    forge(repository, change, **fields)
    for read in (0.0, 1.0):
        assert kind in kinds(repository, read, "damage")


def test_a_row_that_is_there_twice(repository: Repository):
    (piece, _) = of_kind(repository, "table")
    copy = f"tables/{new_id()}.parquet"
    shutil.copyfile(repository.path / piece.path, repository.path / copy)
    head = repository.snapshot().manifest
    twice = replace(head, generation=8, parent=None, artefacts=(*head.artefacts, replace(piece, path=copy)))
    repository.storage.publish(manifest_name(8), twice.to_bytes())
    assert kinds(repository) == ["key_repeated"]


def test_a_tombstone_that_names_other_rows(repository: Repository):
    delete_patches(repository, "scan = 'sub-01_T1w' AND i = 1")
    assert kinds(repository) == []
    forge(repository, with_fields("tombstone", dead={"0": 2}))
    assert kinds(repository) == ["tombstone_damaged"]


def test_tags(repository: Repository):
    set_tag(repository.storage, "v1", 3)
    assert audit(repository, 1.0) == []
    path = repository.path / "tags" / "v1.json"
    manifest = repository.snapshot(3).manifest
    (repository.path / manifest_name(3)).write_bytes(replace(manifest, verb="other").to_bytes())
    assert "tag_missing_generation" in kinds(repository, severity="damage")
    (repository.path / manifest_name(3)).write_bytes(manifest.to_bytes())
    flip(path)
    assert kinds(repository) == ["tag_damaged"]


def test_leftovers_of_dead_writers(repository: Repository):
    path = repository.path / "segments" / new_id()
    path.mkdir()
    (path / "x.npy").write_bytes(bytes(10))
    (repository.path / "intents" / f"{new_id()}.jsonl").write_text('{"verb": "add"}\n')
    found = {finding.kind: finding for finding in audit(repository, 1.0)}
    assert set(found) == {"orphan", "stale_intent"}
    assert {finding.severity for finding in found.values()} == {"info"}
    assert found["orphan"].message.startswith("1 artefacts of 10 bytes")


def test_what_a_living_writer_has_staged_is_no_orphan(repository: Repository):
    with repository.transaction("index") as transaction:
        transaction.stage("segment")
        assert audit(repository, 1.0) == []


def test_a_store_may_be_read_only(repository: Repository):
    add_scan(repository, "sub-03")
    shutil.rmtree(repository.path / "leases")
    (repository.path / "leases").write_text("")  # no claim can be taken there
    assert audit(repository, 1.0) == []


def test_findings_are_json_and_name_no_scan_in_messages(repository: Repository):
    forge(repository, dropped("scan"))
    for found in audit(repository, 1.0):
        assert found.to_json()["kind"] == found.kind
        assert "sub-0" not in found.message + found.artefact + found.repair
