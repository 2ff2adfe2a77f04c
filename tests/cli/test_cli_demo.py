"""The demo's parts: its error table is right, it types what a user would type, and it destroys nothing."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

import isimed_index
from isimed_cli import demo
from isimed_cli.main import main
from isimed_index.testing import phantoms
from isimed_index.testing.phantoms import CohortOptions, DeformedCohort, deformed_cohort, ellipsoid_head

SMALL = CohortOptions(spacing_mm=(4.0, 6.0), max_voxels=120_000, test_fraction=0.5)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> DeformedCohort:
    return deformed_cohort(ellipsoid_head(6.0), 6, 2, tmp_path_factory.mktemp("demo"), options=SMALL)


def test_a_perfect_lookup_has_no_error_and_guesses_have(cohort: DeformedCohort):
    landmarks = ellipsoid_head(6.0).landmarks_mm(12)

    def oracle(scan: str, point: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
        home = cohort.map_back(scan, point)
        off = np.array([3.0, 0.0, 4.0])
        return {other.scan: tuple(cohort.map_point(other.scan, home) + off) for other in cohort.split("test")}

    rows = demo.measure(cohort, landmarks, oracle)
    assert rows["predictor"] == ["isimed", "same world point", "centre of mass"]
    assert rows["mean_mm"][0] == pytest.approx(5.0, abs=1e-3)
    assert rows["p95_mm"][0] == pytest.approx(5.0, abs=1e-3)
    assert rows["missing"] == [0, 0, 0]
    assert rows["pairs"] == [6, 6, 6]
    assert len(set(rows["points"])) == 1
    members = cohort.split("test")
    apart = [
        np.linalg.norm(cohort.map_point(a.id, mark) - cohort.map_point(b.id, mark))
        for a in members
        for b in members
        for mark in landmarks
        if a is not b and cohort.in_view(a.id, mark) and cohort.in_view(b.id, mark)
    ]
    assert rows["mean_mm"][1] == pytest.approx(np.mean(apart))
    assert rows["median_mm"][1] == pytest.approx(np.median(apart))
    assert rows["mean_mm"][2] > 1


def test_places_that_are_not_given_are_counted(cohort: DeformedCohort):
    rows = demo.measure(cohort, ellipsoid_head(6.0).landmarks_mm(5), lambda scan, point: {})
    assert rows["missing"][0] == rows["points"][1] > 0
    assert rows["points"][0] == 0
    assert rows["mean_mm"][0] is None


def test_the_centre_of_mass_is_that_of_the_head_in_mm(tmp_path: Path):
    head = ellipsoid_head(6.0)
    tilted = np.array([[0, -2.0, 0, 50], [3.0, 0, 0, -20], [0, 0, 6.0, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(head.values, tilted), tmp_path / "head.nii.gz")
    middle = tilted @ [*((np.asarray(head.values.shape) - 1) / 2), 1]
    centre = demo.centre_of_mass_mm(tmp_path / "head.nii.gz")
    np.testing.assert_allclose(centre, middle[:3], atol=0.3)  # the head lies centred in its box


def test_minutes_scale_the_training(cohort: DeformedCohort):
    def epochs(minutes: float) -> int:
        train = next(line for line in demo.command_lines(cohort, minutes) if line[0] == "pretrain")
        return int(train[train.index("--epochs") + 1])

    assert epochs(100.0) == round(100 * demo.EPOCHS_PER_MINUTE) > epochs(10.0) > 1
    assert epochs(0.01) == 1


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The demo on a small head, with commands that are recorded instead of run."""
    typed: list[list[str]] = []

    def made(*arguments: object, **keywords: object) -> DeformedCohort:
        return deformed_cohort(*arguments, **keywords, options=SMALL)  # type: ignore[misc]

    def ran(command: list[str], *, cwd: Path, check: bool) -> SimpleNamespace:
        assert command[:3] == [sys.executable, "-m", "isimed_cli.main"]
        typed.append(command[3:])
        (cwd / demo.STORE).mkdir(exist_ok=True)
        return SimpleNamespace(returncode=12 if command[3] == "index" and "FAIL" in str(cwd) else 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SUBJECTS", 4)
    monkeypatch.setattr(demo, "LANDMARKS", 6)
    monkeypatch.setattr(phantoms, "mni152_template", lambda: ellipsoid_head(6.0))
    monkeypatch.setattr(phantoms, "deformed_cohort", made)
    monkeypatch.setattr(demo.subprocess, "run", ran)
    no_matches = SimpleNamespace(columns={"scan": [], "x_mm": [], "y_mm": [], "z_mm": []})
    monkeypatch.setitem(vars(isimed_index), "open", lambda path: SimpleNamespace(lookup=lambda **_: no_matches))
    return typed


def test_the_demo_types_the_whole_path(small_demo: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--out", "here", "--no-progress"]) == 0
    assert [line[0] for line in small_demo] == ["add", "pretrain", "index", "query", "sql", "plot", "plot"]
    assert all(line[-1] == "--no-progress" for line in small_demo)
    printed = capsys.readouterr().out
    assert "$ isimed add images --metadata images/participants.tsv" in printed
    assert "same world point" in printed
    with (tmp_path / "here" / "errors.csv").open() as file:
        assert [row["predictor"] for row in csv.DictReader(file)] == ["isimed", "same world point", "centre of mass"]
    assert main(["demo", "--out", "here", "--quiet"]) == 0  # again, over its own leftovers


def test_a_failing_command_ends_the_demo_with_its_exit_code(small_demo: list[list[str]]):
    assert main(["demo", "--out", "FAIL", "--quiet"]) == 12
    assert [line[0] for line in small_demo] == ["add", "pretrain", "index"]


def test_the_demo_leaves_other_people_s_folders_alone(small_demo: list[list[str]], tmp_path: Path):
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "head.nii.gz").write_bytes(b"precious")
    assert main(["demo", "--out", "mine"]) == 2
    assert (tmp_path / "mine" / "images" / "head.nii.gz").read_bytes() == b"precious"
    assert small_demo == []
