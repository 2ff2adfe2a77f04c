"""Propagation: the landmarks of one scan, found in many others, one file for 3D Slicer a scan and one table of all."""

from __future__ import annotations

import csv
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from isimed_index.errors import OutsideScan, UsageError
from isimed_index.exchange.folder import becoming
from isimed_index.in_order import in_order
from isimed_index.ingest.report import Refusal
from isimed_index.landmarks import Landmarks, markups_text
from isimed_index.lookup import Found, Lookup, Question, Sought, Source, expectation, finite
from isimed_index.progress import Progress, Silent

if TYPE_CHECKING:
    import pyarrow as pa

TABLE = "landmarks.csv"
_COLUMNS = (
    *("scan", "name", "x_mm", "y_mm", "z_mm", "error_mm", "error_95_mm", "confidence", "in_view"),
    *("distance", "residual_mm", "cycle_mm"),
)
_PLAIN = " ()[]+,=@"  # characters that a file of that name keeps, beside letters, digits and _.-~


@dataclass(frozen=True, slots=True)
class Propagated:
    """Landmarks in other scans: one row for each scan and landmark, by scan and in the order of the landmarks.

    `x_mm`, `y_mm`, `z_mm` are RAS+ mm of the scan. `refused` are landmarks that could not be asked for.
    """

    columns: dict[str, list[Any]]
    refused: tuple[Refusal, ...]

    @property
    def scans(self) -> list[str]:
        """The scans that answered."""
        return list(dict.fromkeys(self.columns["scan"]))

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        import pyarrow as pa

        text, truth = ("scan", "name"), ("in_view",)
        types = dict.fromkeys(_COLUMNS, pa.float64()) | dict.fromkeys(text, pa.string())
        types |= dict.fromkeys(truth, pa.bool_())
        return pa.table({name: pa.array(values, types[name]) for name, values in self.columns.items()})

    def write(self, out: Path) -> None:
        """Write a new folder: `landmarks.csv`, and `SCAN.mrk.json` for 3D Slicer of every scan.

        It appears whole or not at all; `UsageError` where something is there already. In the files of 3D Slicer a
        landmark that is not in view is missing, and the description of one that is says what it is off by, where that
        is known; a scan's name is percent-encoded where it is no name of a file.
        """
        with becoming(out) as draft:
            draft.mkdir()
            with (draft / TABLE).open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file, lineterminator="\n")
                table.writerow(self.columns)
                table.writerows(zip(*self.columns.values(), strict=True))
            placed: dict[str, dict[str, NDArray[np.float64] | None]] = {scan: {} for scan in self.scans}
            notes: dict[str, dict[str, str]] = {scan: {} for scan in self.scans}
            radii = ("error_mm", "error_95_mm")
            wanted = [self.columns[name] for name in ("scan", "name", "in_view", *radii, "x_mm", "y_mm", "z_mm")]
            for scan, name, seen, near, far, *at in zip(*wanted, strict=True):
                placed[scan][name] = np.array(at) if seen else None
                if near is not None:
                    notes[scan][name] = f"off by less than {near:.1f} mm (68 %), {far:.1f} mm (95 %)"
            for scan, points in placed.items():
                file_name = f"{quote(scan, safe=_PLAIN)}.mrk.json"
                (draft / file_name).write_text(markups_text(points, notes[scan]), encoding="utf-8")


def propagate(
    lookup: Lookup,
    source: Source,
    landmarks: Landmarks,
    question: Question,
    progress: Progress | None = None,
) -> Propagated:
    """Find every landmark of `source` in the scans that `question` lets answer; its k counts for nothing.

    A landmark outside the scan is refused by name and the rest goes on; `UsageError` when none is left, or no scan.
    """
    progress = progress or Silent()
    asked: dict[str, Sought] = {}
    step = "place it in 3D Slicer"
    refused = [Refusal(name, "usage", "the landmark has no position", step) for name in landmarks.unplaced]
    for name, point in landmarks.points.items():
        try:
            at = source.point_mm(point, landmarks.space)
        except OutsideScan as error:
            refused.append(Refusal.of(name, error))
        else:
            asked[name] = lookup.sought(source, at)
    if not asked:
        raise OutsideScan(
            f"none of {len(landmarks.points)} landmarks lies in the scan: {refused[0].name}: {refused[0].reason}",
            next_step="check that they belong to this scan, and their coordinate space",
        )
    lookup.warn_if_odd(source)
    scans = sorted(scan for scan, _ in lookup.targets(source, question))
    if not scans:
        raise UsageError("no scan is left to propagate to", next_step="widen --to, or isimed index with more scans")

    def found_in(scan: str) -> list[Found]:
        lattice = lookup.read(scan)
        return [lookup.find(source, sought, scan, lattice, cycle=question.cycle) for sought in asked.values()]

    rows: list[tuple[Any, ...]] = []
    progress.start("propagate", len(scans), "scans")
    with closing(in_order(found_in, scans)) as answers:
        for scan, all_found in zip(scans, answers, strict=True):
            rows += [_row(scan, name, found) for name, found in zip(asked, all_found, strict=True)]
            progress.advance(1)
    progress.finish()
    columns = {name: list(values) for name, values in zip(_COLUMNS, zip(*rows, strict=True), strict=True)}
    return Propagated(columns, tuple(refused))


def _row(scan: str, name: str, found: Found) -> tuple[Any, ...]:
    x, y, z = map(float, found.xyz_mm)
    known = found.in_view, finite(found.distance), finite(found.residual_mm), found.cycle_mm
    return scan, name, x, y, z, *expectation(found).values(), *known
