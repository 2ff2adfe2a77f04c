"""Landmark files: named points from and to 3D Slicer markups (`.mrk.json`, `.fcsv`) and tables (`.csv`, `.tsv`).

A file of 3D Slicer says itself whether it counts in RAS or LPS mm; one that does not is refused. A table has the
columns `name, x, y, z`, and is in the space that the user names: RAS mm unless told otherwise.
Sources: Slicer's markups schema 1.0.3 and its fiducial CSV, versions 4.4 to 5.4.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import UsageError
from isimed_index.space import Space, flip_lps

Xyz = tuple[float, float, float]

_SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/markups-schema-v1.0.3.json#"
_POINTS = ("Fiducial", "Line", "Angle", "Curve", "ClosedCurve")  # markups that are their control points, and no more
_PLACED = ("defined", "preview")
_FCSV = ("id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc", "associatedNodeID")
_FCSV_PLACED = ("", "1", "2")  # of its position status, which stands after the named columns: preview, defined
_SYSTEMS: dict[str, Literal["ras", "lps"]] = {"RAS": "ras", "0": "ras", "LPS": "lps", "1": "lps"}
_HEADER = re.compile(r"#\s*coordinatesystem\s*=\s*(\S+)", re.IGNORECASE)
_COLUMNS = re.compile(r"#\s*columns\s*=\s*(\S+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Landmarks:
    """Named points, all in one space; `unplaced` are names that a file of 3D Slicer has without a position."""

    points: Mapping[str, Xyz]
    space: Space = "ras"
    unplaced: Sequence[str] = field(default_factory=tuple)


def read_landmarks(path: Path, space: Space | None = None) -> Landmarks:
    """Read a landmark file; `space` is that of a table, `UsageError` where a file says its own and for what is no such.

    A point without a name is called after its number, `point 3`. Two points of one name are refused.
    """
    name = path.name
    reader = _reader(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{name} cannot be read: {reason}", next_step="check the path") from error
    own, rows = reader(text, name)
    if own is not None and space is not None:
        raise UsageError(
            f"{name} says itself that its points are in {own.upper()} mm, found --space {space} beside it",
            next_step="leave out --space",
        )
    points: dict[str, Xyz] = {}
    unplaced: list[str] = []
    for number, (label, at) in enumerate(rows, start=1):
        called = label.strip() or f"point {number}"
        if called in points or called in unplaced:
            raise UsageError(f"{name}: two points are called {called!r}", next_step="give each point a name of its own")
        if at is None:
            unplaced.append(called)
        elif not all(map(math.isfinite, at)):
            raise UsageError(f"{name}: expected three finite numbers at {called!r}, found {at}", next_step=_TABLE)
        else:
            points[called] = at
    if not points:
        raise UsageError(f"{name} has no point with a position", next_step="place points, and save the file again")
    return Landmarks(points, own or space or "ras", tuple(unplaced))


def markups_text(points: Mapping[str, NDArray[np.float64] | None], notes: Mapping[str, str] | None = None) -> str:
    """The content of a `.mrk.json` for 3D Slicer, in LPS mm, of points (3,) in RAS+ mm; None: not in this image.

    `notes` become the descriptions of control points.
    """
    controls = []
    for number, (name, at) in enumerate(points.items(), start=1):
        position: Any = "" if at is None else [round(float(v), 4) for v in flip_lps(at)]
        controls.append(
            {
                "id": str(number),
                "label": name,
                "description": (notes or {}).get(name, ""),
                "associatedNodeID": "",
                "position": position,
                "orientation": [-1.0, -0.0, -0.0, -0.0, -1.0, -0.0, 0.0, 0.0, 1.0],
                "selected": True,
                "locked": False,
                "visibility": True,
                "positionStatus": "missing" if at is None else "defined",
            }
        )
    markup = {
        "type": "Fiducial",
        "coordinateSystem": "LPS",
        "coordinateUnits": "mm",
        "locked": False,
        "fixedNumberOfControlPoints": False,
        "labelFormat": "%N-%d",
        "lastUsedControlPointNumber": len(controls),
        "controlPoints": controls,
    }
    return json.dumps({"@schema": _SCHEMA, "markups": [markup]}, indent=1, ensure_ascii=False) + "\n"


_TABLE = "a table has the columns name,x,y,z and numbers in the last three"
_Rows = Iterator[tuple[str, Xyz | None]]  # names, and positions where there is one


def _reader(path: Path) -> Callable[[str, str], tuple[Literal["ras", "lps"] | None, _Rows]]:
    lower = path.name.lower()
    if lower.endswith((".mrk.json", ".json")):
        return _markups
    if lower.endswith(".fcsv"):
        return _fcsv
    if lower.endswith((".csv", ".tsv")):
        return _table
    raise UsageError(
        f"expected landmarks as .mrk.json, .fcsv, .csv or .tsv, found {path.name}",
        next_step="save them from 3D Slicer, or write a table name,x,y,z",
    )


def _markups(text: str, name: str) -> tuple[Literal["ras", "lps"], _Rows]:
    try:
        [markup] = json.loads(text)["markups"]
        kind, controls = markup["type"], list(markup["controlPoints"])
        system, units = str(markup["coordinateSystem"]), markup.get("coordinateUnits", "mm")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{name} is not a markups file with one list of points and its coordinate system",
            next_step="save one point list from 3D Slicer as .mrk.json",
        ) from error
    if kind not in _POINTS:
        raise UsageError(f"{name}: expected points ({', '.join(_POINTS)}), found {kind!r}", next_step="save points")
    if units != "mm":
        raise UsageError(f"{name}: expected coordinates in mm, found {units!r}", next_step="save it in mm")
    return _system(system, name), _controls(controls, name)


def _controls(controls: Sequence[Any], name: str) -> _Rows:
    for number, control in enumerate(controls, start=1):
        try:
            placed = control.get("positionStatus", "defined") in _PLACED
            at = _xyz(control["position"]) if placed else None
            label = str(control.get("label", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{name}: control point {number} has no position of three numbers", next_step="save it from 3D Slicer"
            ) from error
        yield label, at


def _fcsv(text: str, name: str) -> tuple[Literal["ras", "lps"], _Rows]:
    lines = text.splitlines()
    head = [line for line in lines if line.startswith("#")]
    systems = [found[1] for line in head if (found := _HEADER.match(line))]
    columns = [tuple(found[1].split(",")) for line in head if (found := _COLUMNS.match(line))]
    if not systems:
        raise UsageError(
            f"{name} does not say whether it counts in RAS or LPS mm",
            next_step="add the line '# CoordinateSystem = LPS' (or RAS), or save it again from 3D Slicer",
        )
    rows = csv.reader(line for line in lines if line.strip() and not line.startswith("#"))
    return _system(systems[0], name), _fiducials(rows, columns[0] if columns else _FCSV, name)


def _fiducials(rows: Iterator[list[str]], columns: Sequence[str], name: str) -> _Rows:
    for number, row in enumerate(rows, start=1):
        known = dict(zip(columns, row, strict=False))
        try:
            at = _xyz((known["x"], known["y"], known["z"]))
        except (KeyError, ValueError) as error:
            raise UsageError(f"{name}: point {number} has no x, y, z", next_step="save it from 3D Slicer") from error
        status = row[len(columns)] if len(row) > len(columns) else ""
        yield known.get("label", ""), at if status.strip() in _FCSV_PLACED else None


def _table(text: str, name: str) -> tuple[None, _Rows]:
    rows = csv.DictReader(text.splitlines(), delimiter="\t" if name.lower().endswith(".tsv") else ",")
    rows.fieldnames = [str(column).strip().lower() for column in rows.fieldnames or ()]
    missing = [column for column in ("name", "x", "y", "z") if column not in rows.fieldnames]
    if missing:
        raise UsageError(f"{name}: expected the columns name, x, y, z, found no {', '.join(missing)}", next_step=_TABLE)
    return None, _named(rows, name)


def _named(rows: csv.DictReader[str], name: str) -> _Rows:
    for number, row in enumerate(rows, start=1):
        try:
            at = _xyz((row["x"], row["y"], row["z"]))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name}: row {number} has no three numbers x, y, z", next_step=_TABLE) from error
        yield row["name"] or "", at


def _system(said: str, name: str) -> Literal["ras", "lps"]:
    if said.upper() not in _SYSTEMS:
        raise UsageError(
            f"{name}: expected the coordinate system RAS or LPS, found {said!r}", next_step="save it in RAS or LPS"
        )
    return _SYSTEMS[said.upper()]


def _xyz(values: Sequence[Any]) -> Xyz:
    x, y, z = (float(value) for value in values)
    return x, y, z
