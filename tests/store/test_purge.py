"""A subject that was purged is nowhere in the store, the others are as they were, and a purge can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_builders import (
    ENCODER,
    OTHER_ENCODER,
    add_encoder,
    add_frame,
    add_index,
    add_scan,
    add_segment,
    content,
    flip,
    scan_rows,
    stage_scan,
    whole_store,
)

from isimed_index.contracts import conform
from isimed_index.errors import NotFound, StoreDamaged, StoreLocked
from isimed_index.store.repository import Repository
from isimed_index.store.tags import set_tag, tag_names
from isimed_index.store.transaction import Proposal
from isimed_index.store.upkeep.absence import Words, search
from isimed_index.store.upkeep.audit import audit
from isimed_index.store.upkeep.collect import collect
from isimed_index.store.upkeep.compact import compact
from isimed_index.store.upkeep.delete import delete_patches, delete_scans
from isimed_index.store.upkeep.purge import purge
from isimed_index.store.upkeep.repair import repair
from isimed_index.store.upkeep.unfinished import Unfinished

GONE, KEPT = "sub-01", "sub-02"
SCAN, OTHER = "sub-01_T1w", "sub-02_ct"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return whole_store(tmp_path / "c")


def of_the_other(repository: Repository) -> dict:
    """What can be asked of the subject that stays."""
    found = content(repository.snapshot())
    return {
        "scans": {scan: row for scan, row in found["scans"].items() if scan == OTHER},
        "patches": {row: patch for row, patch in found["patches"].items() if patch[0] == OTHER},
    }


def assert_nowhere(repository: Repository, *words: str) -> None:
    """By another way than the purge's own: no file holds a word, in its bytes or in a decoded table."""
    for file in (found for found in repository.path.rglob("*") if found.is_file()):
        text = str(pq.read_table(file, partitioning=None).to_pylist()) if file.suffix == ".parquet" else ""
        for word in words:
            assert word.encode() not in file.read_bytes(), file.name
            assert word not in text, file.name


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_of_the_subject_is_left(repository: Repository, packed: bool):
    add_index(repository)
    if packed:
        compact(repository)
    delete_patches(repository, f"scan = '{OTHER}' AND i = 1")
    before = of_the_other(repository)
    paths = {
        made.path for line in range(repository.head() + 1) for made in repository.snapshot(line).manifest.artefacts
    }
    done = purge(repository, GONE)
    assert content(repository.snapshot()) == before
    assert_nowhere(repository, GONE, SCAN)
    assert (done.scans, done.patches, done.hits, done.rewritten) == (1, 3, 0, int(packed))
    assert set(done.artefacts) <= paths
    assert not any((repository.path / path).exists() for path in done.artefacts)
    assert done.index_again == (ENCODER,)
    assert [found for found in audit(repository, 1.0) if found.severity != "info"] == []
    assert done.files_searched > 5
    assert done.bytes_searched > 0
    assert [line.generation for line in repository.generations()] == [0, done.generation]
    with pytest.raises(NotFound):
        purge(repository, GONE)


def test_rows_that_a_packed_segment_hides_go_too(repository: Repository):
    compact(repository)
    delete_scans(repository, f"scan = '{SCAN}'")
    before = of_the_other(repository)
    assert before == content(repository.snapshot())
    assert purge(repository, GONE).rewritten == 1
    assert content(repository.snapshot()) == before
    assert_nowhere(repository, GONE, SCAN)


def test_the_report_names_nobody(repository: Repository):
    set_tag(repository.storage, f"before-{GONE}", 3)
    done = purge(repository, GONE)
    text = json.dumps(done.to_json())
    assert GONE not in text
    assert "encoders" in text
    assert tag_names(repository.storage) == []


def test_tags_quarantine_and_checkpoints_go(repository: Repository):
    set_tag(repository.storage, "v1", 3)
    set_tag(repository.storage, "empty", 0)
    flip(repository.path / repository.snapshot().artefacts("segment")[0].path)
    repair(repository)
    run = repository.path / "tmp" / "pretrain-0123"
    run.mkdir()
    (run / "checkpoint.safetensors").write_bytes(bytes(9))
    done = purge(repository, GONE)
    assert done.tags == ("v1",)
    assert tag_names(repository.storage) == ["empty"]
    assert set(done.leftovers) == {"quarantine", "tmp/pretrain-0123"}
    assert not run.exists()
    assert not (repository.path / "quarantine").exists()


def test_encoders_that_never_saw_the_subject_keep_what_is_theirs(repository: Repository):
    add_encoder(repository, OTHER_ENCODER, "other")
    add_segment(repository, OTHER, 2, OTHER_ENCODER)
    add_frame(repository, OTHER, OTHER_ENCODER)
    add_index(repository, OTHER_ENCODER)
    assert purge(repository, GONE).index_again == (ENCODER,)
    head = repository.snapshot()
    for kind in ("frame", "index"):
        assert [made.fields["encoder"] for made in head.artefacts(kind)] == [OTHER_ENCODER]


def test_a_reader_of_an_old_generation_is_waited_for(repository: Repository):
    before = of_the_other(repository)
    with repository.pin(5) as reader:
        with pytest.raises(StoreLocked, match="1 readers"):
            purge(repository, GONE)
        assert repository.snapshot().scan_ids() == [OTHER]  # done already
        assert reader.scan_ids() == [SCAN, OTHER]
        with pytest.raises(StoreLocked):
            purge(repository, GONE)
    done = purge(repository, GONE)
    assert (done.scans, done.patches) == (1, 3)
    assert content(repository.snapshot()) == before
    assert_nowhere(repository, GONE, SCAN)


def test_a_writer_at_work_is_waited_for(repository: Repository):
    with repository.transaction("add") as transaction:
        stage_scan(transaction)
        with pytest.raises(StoreLocked, match="1 writers"):
            purge(repository, GONE)
    purge(repository, GONE)
    assert_nowhere(repository, GONE, SCAN)


@pytest.mark.parametrize("at", ["_commit", "collect", "_clear", "prove", "Unfinished.forget"])
def test_a_purge_that_was_cut_short_is_resumed(repository: Repository, at: str, monkeypatch: pytest.MonkeyPatch):
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"isimed_index.store.upkeep.purge.{at}", die)
        with pytest.raises(KeyboardInterrupt):
            purge(repository, GONE)
    if at in ("prove", "Unfinished.forget"):  # all is gone but the proof, and its record names nobody
        assert_nowhere(repository, GONE, SCAN)
    done = purge(repository, GONE)
    assert (done.scans, done.patches, done.hits, len(done.generations), done.index_again) == (1, 3, 0, 7, (ENCODER,))
    with pytest.raises(NotFound):
        purge(repository, GONE)
    assert_nowhere(repository, GONE, SCAN)


def test_a_purge_that_died_while_it_collected_is_resumed(repository: Repository, monkeypatch: pytest.MonkeyPatch):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("isimed_index.store.upkeep.collect._remove", die)  # manifests have gone, artefacts are there
        with pytest.raises(KeyboardInterrupt):
            purge(repository, GONE)
    assert len(repository.generations()) == 2
    purge(repository, GONE)
    assert_nowhere(repository, GONE, SCAN)


def test_an_unknown_subject(repository: Repository):
    before = repository.head()
    with pytest.raises(NotFound, match="sub-9"):
        purge(repository, "sub-9")
    with pytest.raises(NotFound):
        purge(repository, "sub-0")  # the beginning of one
    assert repository.head() == before


def test_a_damaged_table_is_repaired_first(repository: Repository):
    flip(repository.path / repository.snapshot().artefacts("table")[0].path)
    with pytest.raises(StoreDamaged) as caught:
        purge(repository, GONE)
    assert "repair" in caught.value.next_step


def test_old_generations_that_cannot_be_read_go_too(repository: Repository):
    for copy in (repository.path / "manifests").glob(f"{4:020}*"):
        flip(copy)
    purge(repository, GONE)
    assert_nowhere(repository, GONE, SCAN)
    assert [line.generation for line in repository.generations()] == [0, 8]


def test_files_that_are_not_the_stores_are_searched(repository: Repository):
    (repository.path / "notes.txt").write_text(f"look at {SCAN}")
    with pytest.raises(StoreDamaged, match=r"notes\.txt") as caught:
        purge(repository, GONE)
    assert GONE not in str(caught.value)


def test_an_id_that_another_subject_has_now_stays(repository: Repository):
    delete_scans(repository, f"scan = '{SCAN}'")
    with repository.transaction("add") as transaction:
        artefact = stage_scan(transaction)
        rows = scan_rows(SCAN, artefact.path, subject="someone")
        transaction.commit(lambda head: Proposal([artefact], tables={"scans": rows}))
    add_segment(repository, SCAN, 4)
    before = content(repository.snapshot())
    purge(repository, GONE)
    assert content(repository.snapshot()) == before
    assert repository.snapshot().scan_row(SCAN)["subject"] == "someone"


def test_answers_that_only_ask_of_the_subject_go(tmp_path: Path):
    repository = Repository.create(tmp_path / "c")
    for scan in (SCAN, OTHER):
        add_scan(repository, scan)
    place = {f"{side}{axis}_mm": 1.0 for side in ("", "from_") for axis in "xyz"}
    said = {"question": "q", "rank": 1, "encoder": ENCODER, "generation": 1, "time": "2026-01-01T00:00:00Z"}
    delete_scans(repository, f"scan = '{SCAN}'")
    for asked in (SCAN, OTHER):  # the first is in a generation that knows nothing else of the subject
        row = {**said, **place, "from_scan": asked, "scan": OTHER, "subject": KEPT, "question": asked[:6]}
        rows = conform("matches", pa.Table.from_pylist([row]))
        with repository.transaction("keep") as transaction:
            transaction.commit(lambda head, rows=rows: Proposal(tables={"matches": rows}))
    done = purge(repository, GONE)
    assert_nowhere(repository, GONE, SCAN)
    assert done.hits == 0
    assert [row["from_scan"] for row in repository.snapshot().table("matches").to_pylist()] == [OTHER]


def test_ids_that_begin_alike_are_others(repository: Repository):
    for scan in ("sub-011_T1w", "xsub-01_T1w"):
        add_scan(repository, scan)
    purge(repository, GONE)
    assert repository.snapshot().scan_ids() == [OTHER, "sub-011_T1w", "xsub-01_T1w"]


def test_short_ids_are_not_found_by_chance(tmp_path: Path):
    repository = Repository.create(tmp_path / "c")
    for scan in ("1_a", "2_1", "12_a"):
        add_scan(repository, scan)
    purge(repository, "1")
    assert repository.snapshot().scan_ids() == ["2_1", "12_a"]


def collected(repository: Repository) -> None:
    """Delete the subject, and let a collector take every generation and table that knew it."""
    delete_scans(repository, f"subject = '{GONE}'")
    collect(repository, keep=1)
    assert len(repository.generations()) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_what_a_collector_made_nobodys_goes_too(repository: Repository, packed: bool):
    if packed:
        compact(repository)
    collected(repository)
    frame, index = (repository.snapshot().artefacts(kind)[0].path for kind in ("frame", "index"))
    segments = {made.path for made in repository.snapshot().artefacts("segment")}
    before = content(repository.snapshot())
    done = purge(repository, GONE)
    assert (done.scans, done.hits, done.rewritten, done.index_again) == (0, 0, int(packed), (ENCODER,))
    assert set(done.artefacts) == {frame, index, *(segments if packed else ())}
    assert content(repository.snapshot()) == before
    assert_nowhere(repository, GONE, SCAN)
    (segment,) = repository.snapshot().artefacts("segment")
    assert segment.fields["rows"] == 5
    with pytest.raises(NotFound):
        purge(repository, GONE)


def test_rows_of_nobody_go_with_any_subject(repository: Repository):
    add_scan(repository, "sub-03_T1w")
    add_segment(repository, "sub-03_T1w", 4)
    compact(repository)
    collected(repository)
    assert purge(repository, "sub-03").patches == 4
    assert_nowhere(repository, GONE, SCAN, "sub-03")
    assert repository.snapshot().artefacts("segment")[0].fields["rows"] == 5


def test_an_index_of_rows_that_nobody_has_goes(repository: Repository):
    (frame,) = repository.snapshot().artefacts("frame")
    with repository.transaction("index") as transaction:
        transaction.commit(lambda head: Proposal(drop=[frame.path]))
    collected(repository)
    (index,) = repository.snapshot().artefacts("index")
    with pytest.raises(NotFound, match="1 artefacts hold something of deleted scans"):
        purge(repository, GONE)  # nothing says that it is theirs: it may be a typing error
    assert purge(repository, GONE, unknown=True).artefacts == (index.path,)


def test_a_file_with_the_id_of_an_unknown_subject_is_told(repository: Repository):
    (repository.path / "tmp" / "notes.txt").write_text("sub-77 again")
    with pytest.raises(StoreDamaged, match=r"tmp/notes\.txt"):
        purge(repository, "sub-77")
    (repository.path / "tmp" / "notes.txt").unlink()
    assert purge(repository, "sub-77").scans == 0  # what it began is ended,
    with pytest.raises(NotFound):  # and then there is nothing
        purge(repository, "sub-77")


def test_an_erasure_that_was_not_proved_is_proved_by_the_next(repository: Repository):
    notes = repository.path / "notes.json"
    notes.write_text(json.dumps([f"look at {SCAN}"]))
    for _ in range(2):  # by its words, then by what is recorded of them
        with pytest.raises(StoreDamaged, match=r"notes\.json"):
            purge(repository, GONE)
    notes.unlink()
    assert_nowhere(repository, GONE, SCAN)
    assert (purge(repository, GONE).scans, list((repository.path / "tmp").glob("purge-*"))) == (1, [])


def test_words_that_are_known_by_hash_alone_are_found(repository: Repository):
    record = Unfinished.new("7").knowing(["visit-a"], Words(("visit-a",), frozenset({"visit-a", "7"})))
    words = Words((), frozenset(), record.sealed())
    assert words.in_text("see visit-a.")
    assert words.in_ids({"7"})
    assert not words.in_text("see visit-ab, 7")
    assert not words.in_ids({"77"})
    assert not Words((), frozenset(), record.sealed().but({"7", "visit-a"})).in_ids({"7", "visit-a"})


def test_the_record_of_one_subject_is_nothing_to_another(repository: Repository):
    with repository.pin(5):
        with pytest.raises(StoreLocked):
            purge(repository, GONE)
        with pytest.raises(NotFound):
            purge(repository, "sub-77")
    assert purge(repository, GONE).scans == 1


def test_a_template_outlives_no_chart(repository: Repository):
    add_scan(repository, "sub-03_T1w")
    with repository.transaction("index") as transaction:  # as `index` extends a frame: the charts change alone
        (old,) = repository.snapshot().artefacts("frame")
        path = transaction.stage("frame")
        pq.write_table(pa.table({"scan": [OTHER]}), path / "charts.parquet")
        made = transaction.add("frame", path, encoder=ENCODER)
        delete_scans(repository, f"scan = '{SCAN}'")
        transaction.commit(lambda head: Proposal([made], drop=[old.path]))
    assert made.path in purge(repository, GONE).artefacts


def test_a_template_that_others_made_stays(repository: Repository):
    purge(repository, GONE)
    add_frame(repository, OTHER)
    add_index(repository)
    add_scan(repository, "sub-03_T1w")
    kept = {made.path for kind in ("frame", "index") for made in repository.snapshot().artefacts(kind)}
    assert purge(repository, "sub-03").index_again == ()
    assert kept <= {made.path for made in repository.snapshot().manifest.artefacts}
    with pytest.raises(NotFound):
        purge(repository, GONE)


def test_metadata_that_only_the_subject_had_leaves_no_dictionary(repository: Repository):
    ward = pa.array(["orthopaedics"]).dictionary_encode()
    for scan in ("sub-03_a", "sub-04_a"):
        with repository.transaction("add") as transaction:
            artefact = stage_scan(transaction)
            rows = scan_rows(scan, artefact.path).append_column("ward", ward)
            if scan == "sub-04_a":
                rows = scan_rows(scan, artefact.path)
            transaction.commit(lambda head, made=artefact, rows=rows: Proposal([made], tables={"scans": rows}))
    purge(repository, "sub-03")
    assert_nowhere(repository, "sub-03", "orthopaedics")


@pytest.mark.parametrize("where", ["column", "nested", "metadata", "name", "json", "bytes", "file name"])
def test_the_search_finds_what_is_there(repository: Repository, where: str):
    words = Words.of({"patient-7"}, {OTHER})
    assert search(repository.storage, words).hits == ()
    tables = {
        "column": pa.table({"x": ["a", "see patient-7."] * 500}),
        "nested": pa.table({"x": [["a"], ["patient-7"]] * 500}),
        "metadata": pa.table({"x": [1]}).replace_schema_metadata({"made by": "patient-7"}),
        "name": pa.table({"patient-7": [1]}),
    }
    if where in tables:
        pq.write_table(tables[where], repository.path / "tmp" / "x.parquet", compression="zstd")
    elif where == "json":
        (repository.path / "tmp" / "x.json").write_text('{"a": ["patient\\u002d7"]}')
    elif where == "bytes":
        (repository.path / "tmp" / "x.bin").write_bytes(b"\0\1patient-7\0")
    else:
        (repository.path / "tmp" / "patient-7.txt").write_text("")
    (hit,) = search(repository.storage, words).hits
    assert hit.startswith("tmp/")
    assert "patient" not in hit
