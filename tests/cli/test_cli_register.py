"""`isimed register` on real files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cohorts import Copy, head, rigid, write_copy, write_nifti

import isimed_index as isi
from isimed_cli.main import main
from isimed_index.register import images


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(images, "_VOXELS", 60_000)


def test_register_says_what_it_did_and_ends_with_3_when_some_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    atlas = write_copy(tmp_path, Copy("atlas", "RAS", rigid()), head())
    turned = Copy("sub-01_T1w", "LPS", rigid((5, 0, 8), (20, 0, 0)))
    noise = np.random.default_rng(0).integers(0, 900, (40, 42, 44)).astype(np.int16)
    store = isi.create(tmp_path / "s.isimed")
    store.add(
        [
            write_copy(tmp_path / "in", turned, head()),
            write_nifti(tmp_path / "noise.nii", noise, np.diag([4.0, 4.0, 4.0, 1.0])),
        ]
    )
    report = tmp_path / "report.json"
    ask = ["register", "--to", str(atlas), "-s", str(store.path)]
    assert main([*ask, "--report", str(report)]) == 3
    shown = capsys.readouterr()
    assert "error[scan_refused]: noise: it does not look like the reference" in shown.err
    assert "registered  1" in " ".join(shown.out.split("\n"))
    written = json.loads(report.read_text())
    assert (written["registered"], written["refused"][0]["name"]) == (["sub-01_T1w"], "noise")
    assert main([*ask, "--where", "scan = 'sub-01_T1w'", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["registered"], again["skipped"], again["kind"]) == ([], ["sub-01_T1w"], "rigid")
    assert main(["sql", "SELECT scan, kind FROM transforms", "-s", str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"scan": "sub-01_T1w", "kind": "rigid"}]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--type", "elastic"], 2), (["--rounds", "0"], 2), (["--to", "nowhere.nii"], 2), ([], 1)]
)
def test_bad_arguments_and_an_empty_store(tmp_path: Path, arguments, code, capsys: pytest.CaptureFixture[str]):
    isi.create(tmp_path / "s.isimed")
    assert main(["register", *arguments, "-s", str(tmp_path / "s.isimed")]) == code
    assert capsys.readouterr().err.startswith("error[")
