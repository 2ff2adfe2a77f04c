"""Nearest anatomy: a point of one scan → the same anatomy in every other scan, in patient millimetres.

    point (patient mm of A) ─ chart of A ─▶ canonical mm ─ chart of B, inverted ─▶ patient mm of B
                                                                 └─ local consensus of descriptors around it ─▶ match

Charts put the point within a few millimetres; the descriptors of its neighbourhood then vote for the exact place.
A stored scan is looked up from stored vectors alone: no torch, no images.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.calibration import Around, Expected
from isimed_index.charting import some_of
from isimed_index.consensus import local_affine
from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.errors import NotFound, OutsideScan, StoreWarning, UsageError
from isimed_index.frame import Chart, Frame, fit_chart, read_frame
from isimed_index.lattice import Lattice, ScanGeometry, Vectors, read_geometry, read_lattice
from isimed_index.matches import Asked, Matches, SameSubject
from isimed_index.space import Affine, Space, apply_affine, from_ras_mm, inverse, to_ras_mm
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.within import Ball

if TYPE_CHECKING:
    from isimed_index.neighbours import Neighbours
    from isimed_index.scans.chunks import StoredScan
    from isimed_index.scans.scan import Scan

MAX_SHIFT_MM = 30.0  # a local fit that leaves the chart by more than this is not believed
Point = NDArray[np.float64]  # (3,) RAS+ mm

_PLACE_COLUMNS = ("scan", "subject", "x_mm", "y_mm", "z_mm", "voxel", "distance")
_MATCH_COLUMNS = (
    *_PLACE_COLUMNS,
    "error_mm",
    "error_95_mm",
    "confidence",
    "in_view",
    "residual_mm",
    "cycle_mm",
    "label",
)
_PATCH_COLUMNS = ("patch", *_PLACE_COLUMNS, "label")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for: which scans may answer, how many answers, how far from the expected place."""

    k: int = 10
    where: str | None = None
    within_mm: float | None = None
    same_subject: SameSubject = "exclude"
    cycle: bool = False
    min_confidence: float | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"expected k of at least 1, found {self.k}")
        if self.within_mm is not None and not self.within_mm > 0:
            raise UsageError(f"expected --within above 0 mm, found {self.within_mm:g}")
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise UsageError(f"expected --min-confidence of 0 to 1, found {self.min_confidence:g}")

    def keeps(self, found: Found) -> bool:
        """Whether an answer is near and sure enough."""
        near = self.within_mm is None or found.away_mm <= self.within_mm
        if self.min_confidence is None:
            return near
        return near and found.expected is not None and found.expected.confidence >= self.min_confidence


@dataclass(frozen=True, slots=True)
class Source:
    """The scan that a point is given in: stored, or a file that was encoded for this question."""

    scan: str | None  # None for a file whose content is not stored
    subject: str | None
    geometry: ScanGeometry
    lattice: Lattice
    chart: Chart

    def point_mm(self, point: Sequence[float], space: Space) -> Point:
        """A point in `space` → RAS+ mm of this scan; `OutsideScan` when it lies outside the volume."""
        if space == "canonical":
            at = apply_affine(inverse(self.chart.affine), point)
        else:
            at = to_ras_mm(point, space, self.geometry.source_affine)
        if not self.geometry.holds(at):
            raise self._outside(np.asarray(point, dtype=np.float64), space, at)
        return at

    def canonical(self, at: Point) -> Point:
        """RAS+ mm of this scan → canonical mm; `NotFound` when its chart does not hold."""
        if not self.chart.holds:
            raise NotFound(
                f"the scan's chart does not hold (agreement {self.chart.agreement:.2f}), so it is not known where the "
                "point lies in canonical mm",
                next_step="ask without --within, or run isimed index with scans of its kind",
            )
        return apply_affine(self.chart.affine, at)

    def _outside(self, point: Point, space: Space, at: Point) -> OutsideScan:
        """The error that names the place and the scan's extent in the space asked in, and in RAS mm beside it."""
        corners = self.geometry.corners_mm()
        if space == "canonical":
            own = apply_affine(self.chart.affine, corners)
        else:
            own = from_ras_mm(corners, space, self.geometry.source_affine)
        unit = {"ras": "RAS mm", "lps": "LPS mm", "voxel": "voxel", "canonical": "canonical mm"}[space]
        said = f"the point {_text(point)} ({unit}) lies outside the scan, which spans {_span(own)}"
        if space != "ras":
            said += f"; in RAS mm it is {_text(at)} and the scan spans {_span(corners)}"
        step = "check --space: ras, lps and voxel are different numbers for the same place"
        return OutsideScan(said, next_step=step)


@dataclass(frozen=True, slots=True)
class Found:
    """Where a point lies in one scan, and what speaks for it.

    `distance` is that of the descriptors, infinite where none is stored; `residual_mm` how far the matches around it
    are from the local fit; `away_mm` how far it is from where the charts alone put it, in canonical mm.
    """

    xyz_mm: Point
    distance: float
    residual_mm: float
    away_mm: float
    in_view: bool
    expected: Expected | None = None  # what it is off by, where that is known
    cycle_mm: float | None = None


@dataclass(frozen=True, slots=True)
class Sought:
    """A point of a scan, RAS+ mm, the descriptor (d,) there, and what answers are off by around that place."""

    at: Point
    vector: Vectors
    around: Around | None


class Lookup:
    """Answers questions over one pinned generation and one encoder; keeps what it has read for the next question."""

    def __init__(self, snapshot: Snapshot, encoder: str | None = None, trust: tuple[str, ...] = ()) -> None:
        self.snapshot = snapshot
        self.trust = trust  # code outside of this library that the encoder may run
        self.card: EncoderCard = read_card(snapshot.encoder_path(encoder))
        self._lattices: dict[str, Lattice] = {}
        self._stored: dict[str, StoredScan] = {}
        self._geometries: dict[str, ScanGeometry] = {}

    @cached_property
    def frame(self) -> Frame:
        """The encoder's canonical frame; `NotFound` when nothing is indexed yet."""
        path = self.snapshot.frame_path(self.card.id)
        if path is None:
            raise NotFound(
                f"encoder {self.card.name!r} has no canonical frame in this store", next_step="run isimed index first"
            )
        frame = read_frame(path, self.snapshot.voxels_of)
        if frame.awaited:
            encoded = self._encoded_scans
            lacking = sorted(scan for scan in encoded if scan not in frame.charts)
            warnings.warn(
                f"{len(lacking)} of {len(encoded)} encoded scans have no chart yet, and cannot answer "
                f"({some_of(lacking)}): isimed index was interrupted, or is at work. Next: isimed index",
                StoreWarning,
                stacklevel=4,
            )
        return frame

    @cached_property
    def _encoded_scans(self) -> dict[str, Segment]:
        """The segment of each scan with living patches."""
        return {scan: found for scan, found in self.snapshot.segments_by_scan(self.card.id).items() if found.rows}

    @cached_property
    def segments(self) -> dict[str, Segment]:
        """The segment of each scan that has a chart and living patches."""
        return {scan: segment for scan, segment in self._encoded_scans.items() if scan in self.frame.charts}

    @cached_property
    def neighbours(self) -> Neighbours:
        """The search among raw patches."""
        from isimed_index.neighbours import Neighbours

        return Neighbours(self.snapshot, self.card.id)

    def lattice(self, scan: str) -> Lattice:
        """A stored scan's vectors on their lattice."""
        if scan not in self._lattices:
            self._lattices[scan] = self.read(scan)
        return self._lattices[scan]

    def read(self, scan: str) -> Lattice:
        """The same, which is not kept: for work on all scans of a store, whose vectors may not fit into memory."""
        return read_lattice(self.segments[scan], self.card.match_output, self.frame.standard)

    def stored(self, scan: str) -> StoredScan:
        """A stored scan's voxels, labels and affine, read when they are asked for."""
        from isimed_index.scans.chunks import open_chunks

        if scan not in self._stored:
            self._stored[scan] = open_chunks(self.snapshot.chunks_path(scan), scan)
        return self._stored[scan]

    def geometry(self, scan: str) -> ScanGeometry:
        """Where an encoded scan's voxels lie; the scan itself is not opened."""
        if scan not in self._geometries:
            self._geometries[scan] = read_geometry(self.segments[scan])
        return self._geometries[scan]

    def source(self, scan: str, lattice: Lattice | None = None) -> Source:
        """A stored scan as the place of a question, with its lattice where that was read already."""
        row = self.snapshot.scan_row(scan)
        if scan not in self.segments:
            lacks = "has no chart in the frame of" if scan in self._encoded_scans else "is not encoded by"
            raise NotFound(f"scan {scan!r} {lacks} {self.card.name!r}", next_step="run isimed index")
        lattice = self.lattice(scan) if lattice is None else lattice
        return Source(scan, row["subject"], self.geometry(scan), lattice, self.frame.charts[scan])

    def source_of_file(self, path: Path, device: str = "auto") -> Source:
        """A file as the place of a question: its stored copy, or read, encoded and charted afresh (needs torch).

        A copy is known by its content. It answers as what it is stored as; voxels are those of the file given.
        """
        from isimed_index.copies import stored_copy
        from isimed_index.scans.read import read_scan

        scan = read_scan(path, "query")
        geometry = ScanGeometry.of(scan.shape, scan.affine, scan.attributes)
        copy = stored_copy(self.snapshot, scan)
        subject = None if copy is None else self.snapshot.scan_row(copy)["subject"]
        if copy is not None and copy in self.segments:
            return Source(copy, subject, geometry, self.lattice(copy), self.frame.charts[copy])
        lattice = self._encoded(scan, device)
        return Source(copy, subject, geometry, lattice, fit_chart(lattice, self.frame.template))

    def _encoded(self, scan: Scan, device: str) -> Lattice:
        from isimed_index.encode import prepared, volume_lattice
        from isimed_index.encoders.runtime import load_encoder

        encoder = load_encoder(self.snapshot.encoder_path(self.card.id), device, self.trust)
        volume = prepared(scan.values(), scan.affine, self.card)
        return volume_lattice(encoder, volume, self.card.stride_vox, self.frame.standard)

    def nearest(self, source: Source, point: Sequence[float], space: Space, question: Question) -> Matches:
        """One best match per scan, ranked by descriptor distance; scans that do not show the place come last."""
        at = source.point_mm(point, space)
        sought = self.sought(source, at)
        self.warn_if_odd(source)
        if question.min_confidence is not None and self.frame.calibration is None:
            raise UsageError(
                "there is no confidence to choose by: answers of this encoder are not calibrated",
                next_step="isimed add --labels for subjects that it was not trained on, then isimed index",
            )
        rows: list[tuple[str, str, Found]] = []
        for scan, subject in self.targets(source, question):
            found = self.find(source, sought, scan, self.lattice(scan), cycle=question.cycle)
            if question.keeps(found):
                rows.append((scan, subject, found))
        rows.sort(key=lambda row: (not row[2].in_view, row[2].distance, row[0]))
        return Matches(self._columns(rows[: question.k], space), self._asked(source, at))

    def nearest_patches(
        self, source: Source, point: Sequence[float], space: Space, question: Question, *, exact: bool = False
    ) -> Matches:
        """The raw nearest stored patches, several of which may be in one scan."""
        at = source.point_mm(point, space)
        asked = self.frame.standard.raw(self._descriptor(source, at)[None])
        targets = dict(self.targets(source, question))
        among = self._rows_within(source, at, targets, question.within_mm)
        hits = self.neighbours.index.search(asked, question.k, among, exact=exact)
        return Matches(self._patch_columns(hits.row_ids[0], hits.distances[0], targets, space), self._asked(source, at))

    def warn_if_odd(self, source: Source) -> None:
        """Warn when a scan's chart does not hold, so that nothing asked from it can be in view."""
        if not source.chart.holds:
            warnings.warn(
                f"the scan does not look like the cohort that {self.card.name!r} was indexed on (agreement "
                f"{source.chart.agreement:.2f}): no answer is in view. Next: isimed index with scans of its kind",
                StoreWarning,
                stacklevel=4,
            )

    def sought(self, source: Source, at: Point) -> Sought:
        """A point of `source`, RAS+ mm, as it is looked for in others."""
        calibration = self.frame.calibration
        around = None
        if calibration is not None and source.chart.holds:
            around = calibration.around(apply_affine(source.chart.affine, at))
        return Sought(at, self._descriptor(source, at), around)

    def find(self, source: Source, sought: Sought, scan: str, lattice: Lattice, *, cycle: bool = False) -> Found:
        """Where a point of `source` lies in a scan, whose lattice is given."""
        chart, at = self.frame.charts[scan], sought.at
        there, residual = follow(at, source.lattice, source.chart, lattice, chart)
        vectors, weight = lattice.sample(there[None])
        distance = float("inf")
        if weight[0] > 0:
            distance = float(self.frame.standard.distance(sought.vector[None], vectors)[0])
        away = apply_affine(chart.affine, there) - apply_affine(source.chart.affine, at)
        seen = source.chart.holds and chart.holds and self.geometry(scan).holds(there)
        expected = sought.around.expected(residual) if seen and sought.around is not None else None
        came_back = None
        if cycle:
            back, _ = follow(there, lattice, chart, source.lattice, source.chart)
            came_back = float(np.linalg.norm(back - at))
        return Found(there, distance, residual, float(np.linalg.norm(away)), seen, expected, came_back)

    def targets(self, source: Source, question: Question) -> list[tuple[str, str]]:
        """Scans that may answer, with their subjects."""
        if question.same_subject == "only" and source.subject is None:
            raise UsageError(
                "the file is not in the store, so nothing is known of its subject's other scans",
                next_step="leave out --same-subject only, or give a stored scan",
            )
        table = self.snapshot.matching("scans", question.where)
        pairs = zip(table.column("scan").to_pylist(), table.column("subject").to_pylist(), strict=True)
        chosen = []
        for scan, subject in pairs:
            same = source.subject is not None and subject == source.subject
            wanted = {"include": True, "exclude": not same, "only": same}[question.same_subject]
            if wanted and scan != source.scan and scan in self.segments:
                chosen.append((scan, subject))
        return chosen

    def _descriptor(self, source: Source, at: Point) -> Vectors:
        """The unit vector (d,) at a point, between the stored patches, or of the nearest one."""
        vectors, weight = source.lattice.sample(at[None])
        if weight[0] > 0:
            return np.asarray(vectors[0], dtype=np.float32)
        places, stored = source.lattice.stored()
        if not len(places):
            raise NotFound(
                "no patch of the scan is there: it shows no foreground, or its patches were deleted",
                next_step="ask from another scan",
            )
        return np.asarray(stored[np.linalg.norm(places - at, axis=1).argmin()], dtype=np.float32)

    def _asked(self, source: Source, at: Point) -> Asked:
        x, y, z = map(float, at)
        return Asked(source.scan, (x, y, z), self.card.id, self.snapshot.generation)

    def _columns(self, rows: Sequence[tuple[str, str, Found]], space: Space) -> dict[str, list[Any]]:
        columns = _empty_columns(_MATCH_COLUMNS, space)
        for scan, subject, found in rows:
            row = self._place_columns(scan, found.xyz_mm, space)
            row |= {"scan": scan, "subject": subject, "distance": finite(found.distance), "in_view": found.in_view}
            row |= expectation(found)
            row |= {"residual_mm": finite(found.residual_mm), "cycle_mm": found.cycle_mm}
            for name, values in columns.items():
                values.append(row[name])
        return columns

    def _place_columns(self, scan: str, at: Point, space: Space) -> dict[str, Any]:
        own = self.geometry(scan).source_affine
        voxel = apply_affine(inverse(own), at)
        columns: dict[str, Any] = dict(zip(("x_mm", "y_mm", "z_mm"), map(float, at), strict=True))
        columns |= {"voxel": [round(float(v), 2) for v in voxel], "label": self._label(scan, at)}
        if space != "ras":
            if space == "canonical":
                asked = apply_affine(self.frame.charts[scan].affine, at)
            else:
                asked = from_ras_mm(at, space, own)
            columns |= dict(zip("xyz", map(float, asked), strict=True)) | {"space": space}
        return columns

    @cached_property
    def _labelled(self) -> set[str]:
        return set(self.snapshot.table("labels").column("scan").to_pylist())

    def _label(self, scan: str, at: Point) -> str | None:
        """Name of the label at a place (`label 87` without one), None outside of all or where there is no label map."""
        if scan not in self._labelled:
            return None
        stored = self.stored(scan)
        i, j, k = np.rint(apply_affine(inverse(stored.affine), at)).astype(int).tolist()
        label = stored.label_at((i, j, k))
        return None if not label else stored.label_names.get(label, f"label {label}")

    def _rows_within(
        self, source: Source, at: Point, targets: Mapping[str, str], within_mm: float | None
    ) -> NDArray[np.int64]:
        """Row ids of the target scans' patches, only such as lie within a canonical distance where one is given."""
        if within_mm is not None:
            x, y, z = source.canonical(at).tolist()
            return self.neighbours.filters.near(Ball((x, y, z), within_mm, "canonical"), targets)
        places, scans = self.neighbours.places, self.neighbours.scans
        ids = [places.ids_of(number) for number, scan in enumerate(scans) if scan in targets]
        return np.concatenate([np.empty(0, dtype=np.int64), *ids])

    def _patch_columns(
        self, row_ids: NDArray[np.int64], distances: NDArray[np.float32], subjects: Mapping[str, str], space: Space
    ) -> dict[str, list[Any]]:
        columns = _empty_columns(_PATCH_COLUMNS, space)
        places, scans = self.neighbours.places, self.neighbours.scans
        known = row_ids >= 0
        positions = places.positions(row_ids[known])
        owners = places.owners(positions)
        centres = places.centres_mm(positions, owners).astype(np.float64)
        for row, number, at, distance in zip(row_ids[known], owners, centres, distances[known], strict=True):
            scan = scans[number]
            found = self._place_columns(scan, at, space)
            found |= {"patch": int(row), "scan": scan, "subject": subjects[scan], "distance": float(distance)}
            for name, values in columns.items():
                values.append(found[name])
        return columns


def between(a: Chart, b: Chart) -> Affine:
    """Patient mm of one scan → patient mm of another, by their charts alone."""
    return inverse(b.affine) @ a.affine


def follow(at: Point, a: Lattice, chart_a: Chart, b: Lattice, chart_b: Chart) -> tuple[Point, float]:
    """Where a point of a lies in b, both RAS+ mm: through the charts, then by the consensus around it; residual in mm.

    A consensus that leaves the charts by more than `MAX_SHIFT_MM` is not believed: then the charts answer, and the
    residual is infinite.
    """
    start = between(chart_a, chart_b)
    affine, residual = local_affine(a, b, at, start)
    expected, found = apply_affine(start, at), apply_affine(affine, at)
    if np.linalg.norm(found - expected) > MAX_SHIFT_MM:
        return expected, float("inf")
    return found, residual


def _empty_columns(names: Sequence[str], space: Space) -> dict[str, list[Any]]:
    """No rows yet; the coordinates in a space other than RAS stand right after the subject, with its name."""
    place = names.index("subject") + 1
    asked = () if space == "ras" else ("x", "y", "z", "space")
    return {name: [] for name in (*names[:place], *asked, *names[place:])}


def _span(corners: NDArray[np.float64]) -> str:
    return f"{_text(corners.min(axis=0))} to {_text(corners.max(axis=0))}"


def _text(at: Point) -> str:
    return "(" + ", ".join(f"{round(v, 1) + 0.0:.1f}" for v in at) + ")"


def expectation(found: Found) -> dict[str, float | None]:
    """The columns that say what an answer is off by: calibrated on held-out subjects, or empty."""
    known = found.expected
    names = ("error_mm", "error_95_mm", "confidence")
    return {name: None if known is None else float(getattr(known, name)) for name in names}


def finite(value: float) -> float | None:
    """A number, or None where there is none."""
    return value if np.isfinite(value) else None
