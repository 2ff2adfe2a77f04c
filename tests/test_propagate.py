"""Landmarks of one scan in all others: each where the lookup puts it, in files that say the same in LPS."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from cohorts import COPIES, CROPPED, Cohort
from typer.testing import CliRunner

import isimed_index as isi
from isimed_cli.main import app
from isimed_index.api import Store
from isimed_index.errors import OutsideScan, UsageError
from isimed_index.landmarks import markups_text, read_landmarks
from isimed_index.progress import Silent

PLACES = {"front": (0.0, 60.0, -8.0), "left": (-40.0, -30.0, 10.0), "low": (0.0, 0.0, -60.0)}
BY_SCAN = {copy.stem: copy for copy in (*COPIES, CROPPED)}
SOURCE = COPIES[3]  # rotated, and its axes in another order


@pytest.fixture(scope="module")
def store(cohort: Cohort) -> Store:
    return isi.open(cohort.store, mode="r")


def in_source() -> dict[str, tuple[float, ...]]:
    return {name: tuple(SOURCE.moved(at)) for name, at in PLACES.items()}


def test_landmarks_are_where_they_are_in_every_copy(store: Store) -> None:
    done = store.propagate(in_source(), SOURCE.stem)
    assert done.scans == sorted(set(BY_SCAN) - {SOURCE.stem})
    assert not done.refused
    for scan, name, x, y, z, seen in zip(
        *(done.columns[c] for c in ("scan", "name", "x_mm", "y_mm", "z_mm", "in_view")), strict=True
    ):
        np.testing.assert_allclose((x, y, z), BY_SCAN[scan].moved(PLACES[name]), atol=1.5)
        assert seen == (scan != CROPPED.stem or name != "low")


def test_a_landmark_is_where_the_lookup_puts_it(store: Store) -> None:
    done = store.propagate(in_source(), SOURCE.stem, cycle=True).to_arrow().to_pylist()
    for name, at in in_source().items():
        for match in store.lookup(at, SOURCE.stem, same_subject="include", cycle=True):
            [row] = [row for row in done if (row["scan"], row["name"]) == (match.scan, name)]
            assert (row["x_mm"], row["y_mm"], row["z_mm"]) == match.xyz_mm
            known = ("in_view", "distance", "residual_mm", "cycle_mm", "error_mm", "confidence")
            assert [row[key] for key in known] == [getattr(match, key) for key in known]


def test_every_scan_gets_a_file_that_says_the_same_in_lps(store: Store, tmp_path: Path) -> None:
    done = store.propagate(in_source(), SOURCE.stem)
    done.write(tmp_path / "out")
    with (tmp_path / "out" / "landmarks.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["scan"], row["name"]) for row in rows] == list(
        zip(done.columns["scan"], done.columns["name"], strict=True)
    )
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"landmarks.csv", *(f"{scan}.mrk.json" for scan in done.scans)}
    for row in rows:
        found = read_landmarks(tmp_path / "out" / f"{row['scan']}.mrk.json")
        assert found.space == "lps"
        if row["in_view"] == "True":
            expected = (-float(row["x_mm"]), -float(row["y_mm"]), float(row["z_mm"]))
            np.testing.assert_allclose(found.points[row["name"]], expected, atol=1e-4)
        else:
            assert row["name"] in found.unplaced
    with pytest.raises(UsageError, match="out"):
        done.write(tmp_path / "out")


@pytest.mark.parametrize("space", ["lps", "voxel", "canonical"])
def test_a_table_in_another_space_means_the_same_places(
    store: Store, cohort: Cohort, tmp_path: Path, space: str
) -> None:
    turned = {}
    for name, at in in_source().items():
        turned[name] = {
            "lps": np.array(at) * (-1, -1, 1),
            "voxel": cohort.voxel_of(SOURCE, at),
            "canonical": np.array(store.canonical(at, SOURCE.stem)),
        }[space]
    lines = [f"{name},{x:.6f},{y:.6f},{z:.6f}" for name, (x, y, z) in turned.items()]
    (tmp_path / "t.csv").write_text("\n".join(["name,x,y,z", *lines]), encoding="utf-8")
    found = store.propagate(tmp_path / "t.csv", SOURCE.stem, space=space).columns
    plain = store.propagate(in_source(), SOURCE.stem).columns
    for axis in ("x_mm", "y_mm", "z_mm"):
        np.testing.assert_allclose(found[axis], plain[axis], atol=1e-2)


def test_where_and_same_subject(store: Store) -> None:
    asked = {"front": COPIES[0].moved(PLACES["front"])}
    only = store.propagate(asked, COPIES[0].stem, same_subject="only")
    assert only.scans == [COPIES[1].stem]
    one = store.propagate(asked, COPIES[0].stem, where="subject = 'sub-02'")
    assert one.scans == [COPIES[2].stem]
    with pytest.raises(UsageError, match="no scan is left"):
        store.propagate(asked, COPIES[0].stem, where="subject = 'nobody'")


def test_a_landmark_outside_is_refused_by_name_and_the_rest_goes_on(store: Store) -> None:
    done = store.propagate({**in_source(), "far": (900.0, 0.0, 0.0)}, SOURCE.stem)
    [refused] = done.refused
    assert (refused.name, refused.kind) == ("far", "outside_scan")
    assert set(done.columns["name"]) == set(PLACES)
    with pytest.raises(OutsideScan, match="none of 1 landmarks"):
        store.propagate({"far": (900.0, 0.0, 0.0)}, SOURCE.stem)


def test_progress_counts_scans(store: Store) -> None:
    class Counted(Silent):
        told = 0

        def advance(self, n: int = 1, note: str = "") -> None:
            self.told += n

    counted = Counted()
    store.propagate(in_source(), SOURCE.stem, progress=counted)
    assert counted.told == len(BY_SCAN) - 1


def test_a_file_that_is_not_stored_gives_the_landmarks(store: Store, cohort: Cohort) -> None:
    at = COPIES[0].moved(PLACES["front"])
    done = store.propagate({"front": at}, cohort.outside).to_arrow().to_pylist()
    known = {match.scan: match.xyz_mm for match in store.lookup(at, cohort.outside)}
    assert {row["scan"]: (row["x_mm"], row["y_mm"], row["z_mm"]) for row in done} == known


def test_names_of_scans_that_are_no_names_of_files(store: Store, tmp_path: Path) -> None:
    done = store.propagate(in_source(), SOURCE.stem, where="subject = 'sub-02'")
    done.columns["scan"] = ["../a/b"] * len(done.columns["scan"])
    done.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"landmarks.csv", "..%2Fa%2Fb.mrk.json"}


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_on_the_command_line(cohort: Cohort, tmp_path: Path) -> None:
    points = {name: np.array(at) for name, at in in_source().items()}
    file = tmp_path / "asked.mrk.json"
    file.write_text(markups_text({**points, "unset": None}), encoding="utf-8")
    asked = ("propagate", "-s", cohort.store, "--landmarks", file, "--scan", SOURCE.stem)
    code, out, err = run(*asked, "--to", "subject = 'sub-02'", "--json")
    assert code == 3
    assert "unset" in err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == list(PLACES)
    for row in rows:
        at = (row["x_mm"], row["y_mm"], row["z_mm"])
        np.testing.assert_allclose(at, COPIES[2].moved(PLACES[row["name"]]), atol=1.5)
    code, out, err = run(*asked, "--out", tmp_path / "found", "--json")
    assert code == 3
    assert json.loads(out) == {
        "scans": 5, "landmarks": 3, "in_view": 14, "of": 15, "out": str(tmp_path / "found")
    }  # fmt: skip
    assert len(list((tmp_path / "found").iterdir())) == 6
