"""Answers that are kept: rows for SQL, gone with the scans that they name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cohorts import COPIES, Cohort

import isimed_index as isi
from isimed_cli.main import main
from isimed_index.api import Store
from isimed_index.errors import NotFound, UsageError
from isimed_index.matches import Asked, Matches

ASKED = COPIES[0].stem
POINT = [10.0, 20.0, 30.0]


@pytest.fixture
def store(cohort: Cohort, tmp_path: Path) -> Store:
    shutil.copytree(cohort.store, tmp_path / "c")
    return isi.open(tmp_path / "c")


def test_an_answer_is_read_back_by_sql_in_patient_mm(store: Store):
    answer = store.lookup([-10.0, -20.0, 30.0], ASKED, space="lps", cycle=True, k=3)
    assert store.keep(answer, "lesion") == 3
    rows = store.sql("SELECT * FROM matches ORDER BY rank").to_pylist()
    assert [row["rank"] for row in rows] == [1, 2, 3]
    for row, match in zip(rows, answer, strict=True):
        assert (row["from_x_mm"], row["from_y_mm"], row["from_z_mm"]) == (10.0, 20.0, 30.0)  # RAS+, asked in LPS
        assert (row["x_mm"], row["y_mm"], row["z_mm"]) == match.xyz_mm
        for name in ("scan", "subject", "distance", "in_view", "residual_mm", "cycle_mm", "label"):
            assert row[name] == getattr(match, name)
        assert (row["question"], row["from_scan"], row["error_mm"]) == ("lesion", ASKED, None)
    encoder = store.sql("SELECT encoder FROM encoders").to_pylist()[0]["encoder"]
    assert {(row["encoder"], row["generation"]) for row in rows} == {(encoder, answer.asked.generation)}


def test_raw_patches_keep_their_row_ids(store: Store):
    store.keep(store.search_patches(POINT, ASKED, k=4), "patches")
    query = "SELECT m.scan, m.x_mm, p.scan AS own, p.x_mm AS at FROM matches m JOIN patches p USING (patch)"
    rows = store.sql(query).to_pylist()
    assert len(rows) == 4
    assert all(row["scan"] == row["own"] and row["x_mm"] == pytest.approx(row["at"]) for row in rows)


@pytest.mark.parametrize("gone", [ASKED, COPIES[2].stem])
def test_rows_go_with_the_scans_they_name_and_come_back_with_them(store: Store, gone: str):
    store.keep(store.lookup(POINT, ASKED), "a")
    store.keep(store.lookup(POINT, COPIES[3].stem), "b")
    before = store.sql("SELECT * FROM matches")
    generation = store.snapshot.generation
    store.delete(f"scan = '{gone}'")
    left = store.sql("SELECT from_scan, scan FROM matches").to_pylist()
    assert left
    assert all(gone not in row.values() for row in left)
    store.restore(generation)
    assert store.sql("SELECT * FROM matches").equals(before)
    store.purge(store.sql("SELECT subject FROM scans WHERE scan = $scan", {"scan": gone}).to_pylist()[0]["subject"])
    assert (
        store.sql("SELECT count(*) AS n FROM matches WHERE scan = $s OR from_scan = $s", {"s": gone})["n"][0].as_py()
        == 0
    )
    assert {finding.severity for finding in isi.check(store.path, read=1.0)} <= {"info"}


def test_what_cannot_be_kept_is_refused_and_nothing_is_stored(store: Store, cohort: Cohort, tmp_path: Path):
    answer = store.lookup(POINT, ASKED)
    store.keep(answer, "taken")
    with pytest.raises(UsageError, match="kept under the name 'taken' already"):
        store.keep(answer, "taken")
    for name in ("", "a\nb", "x" * 201):
        with pytest.raises(UsageError, match="printable characters"):
            store.keep(answer, name)
    with pytest.raises(UsageError, match="no rows to keep"):
        store.keep(store.lookup(POINT, ASKED, where="false"), "empty")
    foreign = Matches(answer.columns, Asked(None, (0.0, 0.0, 0.0), "e", 1))
    with pytest.raises(UsageError, match="not in the store"):
        store.keep(foreign, "foreign")
    store.delete(f"scan = '{answer[0].scan}'")
    with pytest.raises(NotFound, match="has been deleted since"):
        store.keep(answer, "late")
    store.add(cohort.file(next(copy for copy in COPIES if copy.stem == answer[0].scan)))  # the same id, other voxels
    with pytest.raises(NotFound, match="has been deleted since"):
        store.keep(answer, "late")
    assert store.sql("SELECT DISTINCT question FROM matches").to_pylist() == [{"question": "taken"}]


def test_the_command_line_keeps_lists_and_deletes(store: Store, capsys: pytest.CaptureFixture[str]):
    where = ["-s", str(store.path)]
    asked = ["query", "--point", "10,20,30", "--scan", ASKED, "-k", "2", "--keep", "tip", "--json", *where]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(["sql", "SELECT scan, x_mm FROM matches WHERE question = 'tip' ORDER BY rank", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out) == [{"scan": row["scan"], "x_mm": row["x_mm"]} for row in told]
    assert main(asked) == 2
    assert "under the name 'tip' already" in capsys.readouterr().err
    assert main(["delete", "rank = 2", "--from", "matches", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out)["matches"] == 1
    assert isi.open(store.path).sql("SELECT rank FROM matches").to_pylist() == [{"rank": 1}]
