"""A pinned generation answers by name, says what is close, and notices damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_builders import ENCODER, OTHER_ENCODER, add_encoder, add_segment, whole_store

from isimed_index.errors import NotFound, StoreDamaged, StoreWarning
from isimed_index.store.manifest import Artefact, Manifest
from isimed_index.store.repository import Repository
from isimed_index.store.snapshot import Snapshot


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return whole_store(tmp_path / "site=3" / "c")  # a folder that looks like a Hive partition must add no column


@pytest.fixture
def snapshot(repository: Repository) -> Snapshot:
    return repository.snapshot()


def flip_in(folder: Path) -> None:
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def test_pieces_of_a_table_are_united_by_name(snapshot: Snapshot) -> None:
    scans = snapshot.table("scans")
    assert scans.column_names[:5] == ["scan", "subject", "session", "modality", "split"]
    assert scans.column_names[-2:] == ["age", "weight_kg"]
    assert scans.select(["scan", "age", "weight_kg"]).to_pylist() == [
        {"scan": "sub-01_T1w", "age": 40, "weight_kg": None},
        {"scan": "sub-02_ct", "age": None, "weight_kg": 71.5},
    ]


def test_scans_by_id(snapshot: Snapshot) -> None:
    assert snapshot.scan_row("sub-02_ct")["modality"] == "CT"
    assert snapshot.chunks_path("sub-02_ct").suffix == ".zarr"
    assert snapshot.scan_of[snapshot.segments()[1].scan_artefact] == "sub-02_ct"


def test_an_unknown_scan_names_what_is_close(snapshot: Snapshot) -> None:
    with pytest.raises(NotFound, match="did you mean 'sub-01_T1w'"):
        snapshot.chunks_path("sub-01_T1W")
    for beginning in ("sub-02", "SUB-02", "s"):
        with pytest.raises(NotFound, match=r"did you mean .*'sub-02_ct'"):
            snapshot.scan_row(beginning)
    with pytest.raises(NotFound, match="did you mean 'sub-02_ct'"):
        snapshot.scan_row("sub-99")
    with pytest.raises(NotFound, match=r"^no scan 'zzz' in the store$"):
        snapshot.scan_row("zzz")


def test_encoders_by_id_beginning_and_name(repository: Repository) -> None:
    snapshot = add_encoder(repository, OTHER_ENCODER, "toy")
    first, second = (repository.path / artefact.path for artefact in snapshot.artefacts("encoder"))
    assert snapshot.encoder_path(ENCODER) == snapshot.encoder_path("3f2") == first
    assert snapshot.encoder_path(OTHER_ENCODER) == snapshot.encoder_path("toy") == snapshot.encoder_path() == second
    with pytest.raises(NotFound, match="beginning of 2"):
        snapshot.encoder_path("3f")
    with pytest.raises(NotFound, match="did you mean 'toy'"):
        snapshot.encoder_path("toi")
    with pytest.raises(NotFound, match=r"in the store$"):
        snapshot.encoder_path("")


def test_a_store_without_encoder_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        Repository.create(tmp_path / "c").snapshot().encoder_path()
    assert caught.value.next_step == "isimed pretrain"


def test_segments_of_one_encoder_in_row_order(repository: Repository) -> None:
    add_encoder(repository, OTHER_ENCODER, "other")
    snapshot = add_segment(repository, "sub-01_T1w", 2, OTHER_ENCODER)
    assert [segment.first_row_id for segment in snapshot.segments(ENCODER)] == [0, 3]
    assert [segment.first_row_id for segment in snapshot.segments(OTHER_ENCODER)] == [8]
    assert len(snapshot.segments()) == 3
    assert snapshot.frame_path(OTHER_ENCODER) is None
    assert snapshot.index_path(OTHER_ENCODER) is None


def test_more_segments_do_not_walk_the_manifest_oftener(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, walks = Manifest.find, []

    def noting(self: Manifest, kind: str) -> list[Artefact]:
        walks.append(kind)
        return find(self, kind)

    monkeypatch.setattr(Manifest, "find", noting)
    counts = []
    for _ in range(3):
        snapshot = add_segment(repository, "sub-01_T1w", 2)
        walks.clear()
        snapshot.segments()
        counts.append(len(walks))
    assert len(set(counts)) == 1


def test_a_damaged_index_is_left_aside_with_a_warning(snapshot: Snapshot) -> None:
    path = snapshot.index_path(ENCODER)
    assert path is not None
    fresh = Repository.open(snapshot.path).snapshot()
    (path / "index.faiss").unlink()
    with pytest.warns(StoreWarning, match="exact"):
        assert fresh.index_path(ENCODER) is None


@pytest.mark.parametrize("kind", ["scan", "encoder", "frame", "index", "segment"])
def test_a_flipped_bit_is_found_in_every_kind(snapshot: Snapshot, kind: str) -> None:
    artefact = snapshot.artefacts(kind)[0]
    flip_in(snapshot.path / artefact.path)
    with pytest.raises(StoreDamaged, match=f"the {kind} .* does not match its hash") as caught:
        snapshot.verified(artefact)
    assert str(snapshot.path) not in str(caught.value)


def test_a_damaged_table_is_an_error(snapshot: Snapshot) -> None:
    file = snapshot.path / snapshot.artefacts("table")[1].path
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(StoreDamaged, match="the table"):
        snapshot.table("scans")
    with pytest.raises(StoreDamaged, match="the table"):
        snapshot.sql("SELECT * FROM scans")
    file.unlink()
    with pytest.raises(StoreDamaged, match="is missing"):
        snapshot.scan_row("sub-01_T1w")
