"""Bad input through the real command line: one clear line each, the documented exit code, and the rest lands."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cohorts import COPIES, Cohort, tiny_scan, write_nifti

from isimed_cli.main import main

GRID = np.diag([2.0, 2.0, 2.0, 1.0])
NOISE = np.random.default_rng(0).integers(0, 900, (8, 8, 8)).astype(np.int16)


def truncated(path: Path) -> Path:
    whole = tiny_scan(path.with_name("whole.nii.gz")).read_bytes()
    path.with_name("whole.nii.gz").unlink()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def text(path: Path) -> Path:
    path.write_text("Patient: Jane Doe\n" * 100)
    return path


def two_dimensional(path: Path) -> Path:
    return write_nifti(path, NOISE[:, :, 0], GRID)


def series(path: Path) -> Path:
    return write_nifti(path, np.stack([NOISE, NOISE], axis=-1), GRID)


def all_nan(path: Path) -> Path:
    return write_nifti(path, np.full((8, 8, 8), np.nan, np.float32), GRID)


def singular(path: Path) -> Path:
    image = nib.Nifti1Image(NOISE, GRID)
    image.header["vox_offset"] = 352
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = [2, 0, 0, 0], [2, 0, 0, 0], [0, 0, 2, 0]
    path.write_bytes(image.header.binaryblock + b"\x00" * 4 + NOISE.tobytes(order="F"))
    return path


def no_offset(path: Path) -> Path:
    content = bytearray(write_nifti(path, NOISE, GRID).read_bytes())
    content[108:112] = np.float32(0).tobytes()  # vox_offset
    path.write_bytes(content)
    return path


def empty_file(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def empty_gzip(path: Path) -> Path:
    path.write_bytes(gzip.compress(b""))
    return path


def empty_folder(path: Path) -> Path:
    path.mkdir()
    return path


BAD = {
    "cut.nii.gz": (truncated, "truncated"),
    "text.nii": (text, "not a NIfTI file"),
    "slice.nii.gz": (two_dimensional, "2-D"),
    "series.nii.gz": (series, "4-D"),
    "nan.nii.gz": (all_nan, "NaN"),
    "singular.nii": (singular, "singular"),
    "offset.nii": (no_offset, "start at byte 0"),
    "nothing.nii": (empty_file, "not a NIfTI file"),
    "nothing.nii.gz": (empty_gzip, "not a NIfTI file"),
    "nowhere": (empty_folder, "no image file"),
}


def lines(capsys: pytest.CaptureFixture[str], root: Path) -> list[str]:
    """What went to stderr, which never is a traceback and names no folder of this machine."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert "error[internal]" not in errors
    assert str(root) not in errors
    assert str(root.parent) not in errors
    return [line for line in errors.splitlines() if not line.startswith("new store ")]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; options keep their defaults."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_alone_it_is_one_line_and_exit_1(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    make, reason = BAD[name]
    path = make(here / name)
    assert main(["add", str(path), "--no-progress"]) == 1
    (line,) = lines(capsys, here)
    assert line.startswith("error[scan_refused]: ")
    assert reason in line
    assert line.count(f" {name}") == 1
    assert ". Next: " in line


def test_in_a_batch_the_rest_lands_and_exit_is_3(here: Path, capsys: pytest.CaptureFixture[str]):
    for name, (make, _) in BAD.items():
        make(here / name)
    good = [tiny_scan(here / "good" / f"{seed}.nii.gz", seed) for seed in range(2)]
    paths = [*(str(here / name) for name in BAD), str(good[0].parent)]
    assert main(["add", *paths, "--report", "report.json", "--no-progress"]) == 3
    shown = lines(capsys, here)
    assert len(shown) == len(BAD)
    assert all(sum(f" {name}" in line for line in shown) == 1 for name in BAD if name != "nothing.nii")
    report = json.loads((here / "report.json").read_text())
    assert report["added"] == ["0", "1"]
    assert {refusal["name"] for refusal in report["refused"]} == set(BAD)
    assert str(here) not in json.dumps(report)
    assert main(["ls", "--json"]) == 0
    assert [row["scan"] for row in json.loads(capsys.readouterr().out)] == ["0", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["ls"],
        ["log"],
        ["sql", "SELECT 1"],
        ["index"],
        ["pretrain"],
        ["evaluate"],
        ["query", "--point", "1,2,3", "--scan", "x"],
        ["plot", "umap", "--out", "a.png"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_missing_store_is_exit_10(arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*arguments, "-s", str(here / "gone.isimed")]) == 10
    (line,) = lines(capsys, here)
    assert line.startswith("error[store_not_found]: there is no store at gone.isimed. Next: ")
    assert all(word in line for word in ("-s DIR", "ISIMED_STORE", "./cohort.isimed", "isimed add"))
    assert not (here / "gone.isimed").exists()


@pytest.mark.parametrize("point", ["1,2", "1,2,3,4", "a,b,c", "", "nan,0,0", "inf,0,0", "1;2;3", "1e9,0,0"])
def test_a_malformed_point_is_exit_2(
    point: str, cohort: Cohort, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(["query", f"--point={point}", "--scan", COPIES[0].stem, "-s", str(cohort.store)]) == 2
    (line,) = lines(capsys, cohort.store)
    assert line.startswith("error[usage]: ")
    assert "three" in line
    assert line.endswith("Next: isimed query --help")


class TestQuery:
    def ask(self, cohort: Cohort, *arguments: str, point: str = "10,20,30", scan: str = COPIES[0].stem) -> int:
        return main(["query", "--point", point, "--scan", scan, "-s", str(cohort.store), *arguments])

    def test_a_point_outside_of_the_scan(self, cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, point="900,0,0") == 1
        (line,) = lines(capsys, cohort.store)
        assert line.startswith("error[outside_scan]: the point (900.0, 0.0, 0.0) (RAS mm) lies outside the scan")
        assert "--space" in line

    def test_an_unknown_scan(self, cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, scan="sub-02_T1") == 1
        (line,) = lines(capsys, cohort.store)
        assert "did you mean 'sub-02_T1w'" in line

    @pytest.mark.parametrize("name", [name for name in BAD if name != "nowhere"])
    def test_a_bad_file(self, name: str, cohort: Cohort, here: Path, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, scan=str(BAD[name][0](here / name))) == 1
        (line,) = lines(capsys, here)
        assert line.startswith(f"error[scan_refused]: {name}: ")
        assert ". Next: " in line
        assert "leave it out" not in line

    def test_a_missing_file(self, cohort: Cohort, here: Path, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, scan=str(here / "gone.nii.gz")) == 2
        (line,) = lines(capsys, here)
        assert line.startswith("error[usage]: there is no file gone.nii.gz")

    @pytest.mark.parametrize(
        "where", ["no_such = 1", "1; DROP TABLE scans", "(", "scan IN (SELECT * FROM read_csv('/x'))"]
    )
    def test_a_bad_condition(self, where: str, cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, "--where", where) == 1
        (line,) = lines(capsys, cohort.store)
        assert line.startswith("error[sql_refused]: ")

    @pytest.mark.parametrize(
        "wrong", [["-k", "0"], ["--space", "mni"], ["--within", "-3"], ["--within", "0"], ["--patches", "--cycle"]]
    )
    def test_bad_options(self, wrong: list[str], cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, *wrong) == 2
        (line,) = lines(capsys, cohort.store)
        assert line.startswith("error[usage]: ")

    def test_a_file_that_is_stored_says_so(self, cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        file = cohort.file(COPIES[0])
        assert self.ask(cohort, "--json", scan=str(file)) == 0
        shown = capsys.readouterr()
        assert shown.err == f"{file.name} is in the store as {COPIES[0].stem}: its stored copy is asked\n"
        assert not {copy.stem for copy in COPIES[:2]} & {row["scan"] for row in json.loads(shown.out)}

    def test_an_unknown_file_has_no_subject(self, cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, "--same-subject", "only", scan=str(cohort.outside)) == 2
        (line,) = lines(capsys, cohort.store)
        assert "subject" in line

    def test_a_good_question_is_quiet(self, cohort: Cohort, capsys: pytest.CaptureFixture[str]):
        assert self.ask(cohort, "--json", "--space", "lps", point="-10,-20,30") == 0
        shown = capsys.readouterr()
        assert shown.err == ""
        rows = json.loads(shown.out)
        assert len(rows) == 4
        by_scan = {row["scan"]: row for row in rows}
        expected = COPIES[2].moved([10.0, 20.0, 30.0])
        assert [by_scan["sub-02_T1w"][f"{axis}_mm"] for axis in "xyz"] == pytest.approx(expected, abs=1.0)
        assert by_scan["sub-02_T1w"]["x"] == pytest.approx(-by_scan["sub-02_T1w"]["x_mm"])


def test_bad_tables(here: Path, capsys: pytest.CaptureFixture[str]):
    tiny_scan(here / "a.nii")
    (here / "t.csv").write_text("who,age\na,3\n")
    (here / "old.csv").write_text("scan,age\na,90+\n")
    for option, table in (("--metadata", "t.csv"), ("--metadata", "old.csv"), ("--label-names", "t.csv")):
        assert main(["add", "a.nii", "--no-progress", option, str(here / table)]) == 2
        (line,) = lines(capsys, here)
        assert line.startswith("error[usage]: ")
        assert table in line


def test_paths_that_do_not_exist_are_usage(here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["add", "gone.nii"]) == 2
    (line,) = lines(capsys, here)
    assert "gone.nii" in line


@pytest.mark.parametrize(
    "asked",
    [
        ["--labels", "seg.nii.gz"],
        ["--labels", "{stem}_seg.nii", "--spacing", "2"],
        ["--subject-from", "s(\\d"],
        ["--subject-from", "sub"],
        ["--layout", "nothing"],
        ["--analyze-axes", "RRR"],
        ["--metadata", "t.csv"],
        ["--label-names", "t.csv"],
    ],
)
def test_what_is_asked_wrongly_leaves_no_new_store(here: Path, capsys: pytest.CaptureFixture[str], asked: list[str]):
    tiny_scan(here / "a.nii")
    (here / "t.csv").write_text("who,age\na,3\n")
    before = sorted(here.iterdir())
    assert main(["add", "a.nii", "--no-progress", *asked]) == 2
    (line,) = lines(capsys, here)
    assert line.startswith("error[usage]: ")
    assert sorted(here.iterdir()) == before
    assert main(["add", "a.nii", "--no-progress", "--quiet"]) == 0
    assert len(list(here.iterdir())) == len(before) + 1  # and this is how one is made
