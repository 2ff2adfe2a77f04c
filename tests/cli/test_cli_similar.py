"""`isimed similar` on a real store: rows as other commands give them, and errors that say how to go on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cohorts import COPIES, CROPPED, Cohort

import isimed_index as isi
from isimed_cli.main import main

ASKED = COPIES[0].stem


def run(cohort: Cohort, *words: str) -> int:
    return main(["similar", "-s", str(cohort.store), *words])


def test_rows_are_those_of_the_library_and_go_to_a_file(cohort: Cohort, tmp_path: Path, capsys: Any):
    with isi.open(cohort.store, mode="r") as store:
        expected = store.similar(ASKED, "white matter", k=2).to_pylist()
    ask = ["--scan", ASKED, "--label", "white matter", "-k", "2"]
    assert run(cohort, *ask, "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected
    assert run(cohort, *ask, "--format", "csv", "--out", str(tmp_path / "similar.csv")) == 0
    with (tmp_path / "similar.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["scan"] for row in rows] == [row["scan"] for row in expected]
    assert list(rows[0]) == ["scan", "subject", "label", "name", "distance", "patches"]


def test_nothing_found_says_why(cohort: Cohort, capsys: Any):
    assert run(cohort, "--scan", ASKED, "--where", "false", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == []
    assert "widen --where" in said.err
    assert run(cohort, "--scan", CROPPED.stem, "--same-subject", "only") == 0
    assert "no other scan of this subject is indexed" in capsys.readouterr().err


def test_no_region_of_the_name_is_not_no_scan(cohort: Cohort, capsys: Any):
    """The scans are indexed, and meet the condition: what they lack is the region."""
    asked = ["--scan", CROPPED.stem, "--label", "white matter", "--same-subject"]
    assert run(cohort, *asked, "only") == 0
    said = capsys.readouterr().err
    assert "no other scan of this subject has a vector of that region" in said
    assert "is indexed" not in said
    assert run(cohort, *asked, "exclude", "--where", "scan = 'sub-99'") == 0
    said = capsys.readouterr().err
    assert "no scan of another subject meets --where and has a vector of that region" in said
    assert "widen --where" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--scan", ASKED, "--label", "white mater"], 1, "did you mean 'white matter'?"),
        (["--scan", ASKED, "--label", "99"], 1, "has no label '99'; the nearest are"),
        (["--scan", "sub-99"], 1, "no scan 'sub-99' in the store"),
        (["--scan", ASKED, "--encoder", "nobody"], 1, "no encoder 'nobody'"),
        (["--scan", ASKED, "--where", "bad sql ("], 1, "error[sql_refused]"),
        ([], 2, "--scan"),
        (["--scan", ASKED, "-k", "0"], 2, "1 or more"),
        (["--scan", ASKED, "--pooling", "max"], 2, "mean_sd"),
    ],
)
def test_errors_are_one_line_with_a_next_step(cohort: Cohort, words: list[str], code: int, said: str, capsys: Any):
    assert run(cohort, *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error[")
    assert "Next: isimed" in error
    assert error.count("\n") == 1
