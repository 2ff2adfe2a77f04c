"""Landmark files: every form says the same points, and what does not say its coordinate system is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isimed_index.errors import UsageError
from isimed_index.landmarks import markups_text, read_landmarks

# One point right, front and above of the origin, another left, behind and below, in RAS mm.
RAS = {"tip": (10.0, 20.0, 30.0), "base": (-1.5, -2.5, -3.5)}

FCSV = """# Markups fiducial file version = 5.4
# CoordinateSystem = {system}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
1,{a},0,0,0,1,1,1,0,tip,,,2,0
2,{b},0,0,0,1,1,1,0,"base","said, twice",,2,0
3,5,6,7,0,0,0,1,1,1,0,gone,,,3,0
4,5,6,7,0,0,0,1,1,1,0,begun,,,0,0
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def markup(**changed: object) -> str:
    controls = [
        {"label": "tip", "position": [-10.0, -20.0, 30.0], "positionStatus": "defined"},
        {"label": "base", "position": [1.5, 2.5, -3.5]},
        {"label": "gone", "position": "", "positionStatus": "missing"},
    ]
    one = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": controls}
    return json.dumps({"markups": [{**one, **changed}]})


@pytest.mark.parametrize(
    ("system", "space", "a", "b"),
    [
        ("LPS", "lps", "-10,-20,30", "1.5,2.5,-3.5"),
        ("1", "lps", "-10,-20,30", "1.5,2.5,-3.5"),
        ("RAS", "ras", "10,20,30", "-1.5,-2.5,-3.5"),
        ("0", "ras", "10,20,30", "-1.5,-2.5,-3.5"),
    ],
)
def test_a_fiducial_csv_says_its_coordinate_system(tmp_path: Path, system: str, space: str, a: str, b: str) -> None:
    found = read_landmarks(write(tmp_path / "f.fcsv", FCSV.format(system=system, a=a, b=b)))
    sign = np.array([-1, -1, 1]) if space == "lps" else 1
    assert found.space == space
    assert {name: tuple(np.array(at) * sign) for name, at in found.points.items()} == RAS
    assert found.unplaced == ("gone", "begun")


def test_a_fiducial_csv_with_columns_in_another_order(tmp_path: Path) -> None:
    text = "# coordinateSystem = 0\n# columns = label,z,y,x\ntip,30,20,10\n"
    assert read_landmarks(write(tmp_path / "f.fcsv", text)).points == {"tip": RAS["tip"]}


def test_markups_of_slicer(tmp_path: Path) -> None:
    found = read_landmarks(write(tmp_path / "f.mrk.json", markup()))
    assert (found.space, found.unplaced) == ("lps", ("gone",))
    assert found.points == {"tip": (-10.0, -20.0, 30.0), "base": (1.5, 2.5, -3.5)}
    assert read_landmarks(write(tmp_path / "r.mrk.json", markup(coordinateSystem="RAS"))).space == "ras"


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_is_in_the_space_that_is_named(tmp_path: Path, suffix: str) -> None:
    text = "Name,X,Y,Z,who\ntip,10,20,30,me\nbase,-1.5,-2.5,-3.5,me\n,1,2,3,\n"
    path = write(tmp_path / f"f.{suffix}", text.replace(",", "\t") if suffix == "tsv" else "\ufeff" + text)
    found = read_landmarks(path)
    assert (found.space, found.points) == ("ras", {**RAS, "point 3": (1.0, 2.0, 3.0)})
    assert read_landmarks(path, "voxel").space == "voxel"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("f.fcsv", "1,1,2,3,0,0,0,1,1,1,0,tip,,\n", "does not say whether it counts in RAS or LPS"),
        ("f.fcsv", "# CoordinateSystem = IJK\n1,1,2,3\n", "expected the coordinate system RAS or LPS, found 'IJK'"),
        ("f.fcsv", "# CoordinateSystem = RAS\n1,1,two,3\n", "point 1 has no x, y, z"),
        ("f.mrk.json", "[]", "not a markups file"),
        ("f.mrk.json", "{", "not a markups file"),
        ("f.mrk.json", json.dumps({"markups": []}), "not a markups file"),
        ("f.mrk.json", markup(coordinateUnits="um"), "expected coordinates in mm, found 'um'"),
        ("f.mrk.json", markup(type="Plane"), "found 'Plane'"),
        ("f.mrk.json", markup(controlPoints=[{"label": "a", "position": [1, 2]}]), "control point 1"),
        ("f.mrk.json", markup(controlPoints=[]), "no point with a position"),
        ("f.csv", "name,x,y\ntip,1,2\n", "found no z"),
        ("f.csv", "name,x,y,z\ntip,1,2\n", "row 1 has no three numbers"),
        ("f.csv", "name,x,y,z\ntip,1,2,nan\n", "three finite numbers at 'tip'"),
        ("f.csv", "name,x,y,z\ntip,1,2,3\ntip,4,5,6\n", "two points are called 'tip'"),
        ("f.csv", "", "found no name, x, y, z"),
        ("f.txt", "name,x,y,z\n", "expected landmarks as"),
        ("f.csv", "\x00\x01", "found no name"),
    ],
)
def test_what_is_no_landmark_file_is_refused_by_name(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        read_landmarks(write(tmp_path / name, text))
    assert name in str(refused.value)
    assert refused.value.next_step


def test_a_file_that_is_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("f.csv", "missing.csv"):
        with pytest.raises(UsageError, match=f"{name} cannot be read"):
            read_landmarks(tmp_path / name)


def test_a_space_beside_a_file_that_says_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in LPS mm, found --space ras"):
        read_landmarks(write(tmp_path / "f.mrk.json", markup()), "ras")


names = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), min_size=1, max_size=20)
points = st.tuples(*[st.floats(-1e4, 1e4)] * 3)


@given(st.dictionaries(names, points, min_size=1, max_size=5), st.sets(names, max_size=2))
def test_markups_come_back_as_they_were_written(tmp_path_factory, placed, missing) -> None:
    missing = sorted(missing - placed.keys())
    path = tmp_path_factory.mktemp("round") / "f.mrk.json"
    text = markups_text({**{name: np.array(at) for name, at in placed.items()}, **dict.fromkeys(missing)})
    back = read_landmarks(write(path, text))
    assert (back.space, list(back.unplaced), list(back.points)) == ("lps", missing, list(placed))
    for name, (x, y, z) in placed.items():
        np.testing.assert_allclose(back.points[name], (-x, -y, z), atol=1e-4)


@given(st.dictionaries(names, points, min_size=1, max_size=5))
def test_tables_come_back_as_they_were_written(tmp_path_factory, placed) -> None:
    path = tmp_path_factory.mktemp("round") / "f.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("name", "x", "y", "z"))
        rows.writerows((name, *at) for name, at in placed.items())
    assert read_landmarks(path).points == placed
