"""Which rows may answer: SQL over `patches`, and where their centres lie, as row ids that are kept for later.

    where   ─ DuckDB over the pinned views ───────────────┐
    within  ─ Ball, Cuboid: arithmetic on stored centres ─┼─ all of them ─▶ row ids, rising
              Label: label maps, read once at the centres ┘

A pinned generation does not change, so a filter that was evaluated once holds for all later questions. Any number of
threads may ask.
"""

from __future__ import annotations

import difflib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import NotFound, OutsideScan, StoreWarning, UsageError
from isimed_index.frame import read_frame
from isimed_index.lattice import ScanGeometry, read_geometry
from isimed_index.places import Places
from isimed_index.scans.chunks import open_chunks
from isimed_index.space import Affine, apply_affine, from_ras_mm, inverse, to_ras_mm
from isimed_index.store.snapshot import Snapshot
from isimed_index.within import LABELS, Ball, Cuboid, Label, Part, Within, parts

if TYPE_CHECKING:
    from isimed_index.index.protocol import RowIds

_KEPT_BYTES = 1 << 27  # of the row ids that kept filters hold together
_LABEL_BYTES = 1 << 26  # of the labels at the centres of patches
Mask = NDArray[np.bool_]


class Remembered:
    """Arrays by key, those that were asked for last, of so many bytes together; the last one however large it is."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self._bytes = 0
        self._guard = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of a key, made if need be; threads that ask for it at once may each make it."""
        with self._guard:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        made = make()
        with self._guard:
            if key not in self._held:
                self._held[key] = made
                self._bytes += made.nbytes
            while len(self._held) > 1 and self._bytes > self._most_bytes:
                self._bytes -= self._held.popitem(last=False)[1].nbytes
        return made


class Filters:
    """Filters over the living rows of one encoder in a pinned generation."""

    def __init__(self, snapshot: Snapshot, card: EncoderCard, places: Places, scans: Sequence[str]) -> None:
        self.snapshot = snapshot
        self.card = card
        self.places = places
        self.scans = scans  # scan id by number of segment
        self._kept = Remembered(_KEPT_BYTES)  # by condition
        self._labels = Remembered(_LABEL_BYTES)  # by number of segment

    def rows(self, where: str | None, within: Within | None = None) -> RowIds | None:
        """Row ids, rising, of the patches that satisfy all of it; None where nothing is asked."""
        asked: list[str | Part] = [*([] if where is None else [where]), *parts(within)]
        if not asked:
            return None
        rows, *others = sorted(map(self._satisfy, asked), key=len)
        for other in others:
            rows = np.intersect1d(rows, other, assume_unique=True)
        if any(isinstance(part, Ball | Cuboid) and part.scan is None for part in asked):
            self._tell_of_charts(self.scans, stacklevel=5)
        return rows

    def near(self, ball: Ball, scans: Collection[str]) -> RowIds:
        """Row ids, rising, of the patches of some scans that lie in a canonical ball; only these scans are read."""
        self._tell_of_charts(scans, stacklevel=6)
        return self._ids(self._canonical(ball, _in_ball, (n for n, scan in enumerate(self.scans) if scan in scans)))

    def _satisfy(self, key: str | Part) -> RowIds:
        """Row ids, rising, of the patches that satisfy one condition: SQL, or a place."""
        return self._kept.get(key, lambda: self._matching(key) if isinstance(key, str) else self._inside(key))

    def _matching(self, where: str) -> RowIds:
        chosen = self.snapshot.matching("patches", where, ["patch"]).column("patch").to_numpy()  # of every encoder
        return np.intersect1d(chosen, self.places.row_ids)

    def _inside(self, part: Part) -> RowIds:
        if isinstance(part, Label):
            return self._ids(self._in_label(part))
        inside = _in_ball if isinstance(part, Ball) else _in_cuboid
        if part.space != "canonical":
            return self._ids(self._in_scan(part, inside))
        numbers = range(len(self.scans)) if part.scan is None else [self._number(part.scan)]
        if part.scan is not None and part.scan not in self._charts:
            raise NotFound(
                f"scan {part.scan!r} has no chart that holds, so its patches have no canonical coordinates",
                next_step="ask in its patient mm, or run isimed index",
            )
        return self._ids(self._canonical(part, inside, numbers))

    def _ids(self, found: Iterable[tuple[int, Mask]]) -> RowIds:
        """Row ids of the patches that masks keep, by rising number of segment."""
        return np.concatenate([np.empty(0, np.int64), *(self.places.ids_of(n)[mask] for n, mask in found)])

    def _in_scan(self, part: Ball | Cuboid, inside: Callable[..., Mask]) -> list[tuple[int, Mask]]:
        number = self._number(str(part.scan))
        geometry = read_geometry(self.places.segments[number])
        mask = inside(part, self.places.centres_of(number), geometry.source_affine)
        _check_meets(part, geometry, found=bool(mask.any()))
        return [(number, mask)]

    def _canonical(
        self, part: Ball | Cuboid, inside: Callable[..., Mask], numbers: Iterable[int]
    ) -> list[tuple[int, Mask]]:
        charted = [number for number in numbers if self.scans[number] in self._charts]
        # A chart is an affine map, and so canonical centres are those of `patches`: cx_mm, cy_mm, cz_mm.
        return [
            (number, inside(part, apply_affine(self._charts[self.scans[number]], self.places.centres_of(number))))
            for number in charted
        ]

    def _tell_of_charts(self, scans: Collection[str], stacklevel: int) -> None:
        """Warn of scans that are in no canonical place; with every question, for the answer lacks them every time."""
        lacking = sum(scan not in self._charts for scan in scans)
        if lacking:
            warnings.warn(
                f"{lacking} of {len(scans)} encoded scans have no chart that holds, so none of their patches is "
                "within canonical coordinates. Next: isimed index",
                StoreWarning,
                stacklevel=stacklevel,
            )

    @cached_property
    def _charts(self) -> Mapping[str, Affine]:
        """Patient RAS+ mm → canonical mm of the scans whose charts hold."""
        found = charts_that_hold(self.snapshot, self.card.id)
        if found is None:
            raise NotFound(
                f"encoder {self.card.name!r} has no canonical frame in this store", next_step="run isimed index first"
            )
        return found

    def _number(self, scan: str) -> int:
        """Number of the segment of a scan."""
        self.snapshot.scan_row(scan)  # raises NotFound, with the ids that look like it
        if scan not in self.scans:
            raise NotFound(f"scan {scan!r} is not encoded by {self.card.name!r}", next_step="run isimed index")
        return self.scans.index(scan)

    def _in_label(self, part: Label) -> list[tuple[int, Mask]]:
        numbers = self._label_numbers(part)
        if part.scan is not None:
            chosen = [self._number(part.scan)]
        else:
            chosen = [number for number, scan in enumerate(self.scans) if scan in numbers]
        return [(number, np.isin(self._labels_at(number), numbers[self.scans[number]])) for number in chosen]

    def _label_numbers(self, part: Label) -> dict[str, list[int]]:
        """By scan, the numbers of its labels that are meant; `NotFound` where none is, `UsageError` if two might be."""
        rows = self.snapshot.table("labels").select(["scan", "label", "name"]).to_pylist()
        rows = [row for row in rows if part.scan in (None, row["scan"])]
        by = "name" if isinstance(part.label, str) else "label"
        meant = [row for row in rows if row[by] == part.label]
        if not meant:
            raise _no_label(part, rows)
        names = sorted({row["name"] for row in meant} - {None})
        if len(names) > 1 or (names and any(row["name"] is None for row in meant)):
            called = " and ".join(map(repr, names)) + (" and by no name" if len(names) == 1 else "")
            raise UsageError(
                f"label {part.label} is called {called} in different scans", next_step="give the name, or one scan"
            )
        found: dict[str, list[int]] = {}
        for row in meant:
            found.setdefault(row["scan"], []).append(row["label"])
        return found

    def _labels_at(self, number: int) -> NDArray[Any]:
        """The label (m,) at the centre of each patch of a segment; 0 outside of all, and outside of the volume."""
        return self._labels.get(number, lambda: self._read_labels(number))

    def _read_labels(self, number: int) -> NDArray[Any]:
        scan = self.scans[number]
        stored = open_chunks(self.snapshot.chunks_path(scan), scan)
        labels = stored.labels()
        if labels is None:
            return np.zeros(len(self.places.ids_of(number)), np.uint8)
        at = np.rint(apply_affine(inverse(stored.affine), self.places.centres_of(number))).astype(np.int64)
        found = np.zeros(len(at), labels.dtype)
        held = ((at >= 0) & (at < labels.shape)).all(axis=1)
        found[held] = labels[tuple(at[held].T)]
        return found


# Centres are stored as float32: one on the border, as whole voxels and strides put it there, is inside.
_BORDER_MM = 1e-3


def charts_that_hold(snapshot: Snapshot, encoder_id: str) -> dict[str, Affine] | None:
    """By scan, patient RAS+ mm → canonical mm; None where the encoder has no frame."""
    path = snapshot.frame_path(encoder_id)
    if path is None:
        return None
    charts = read_frame(path, snapshot.voxels_of).charts
    return {scan: chart.affine for scan, chart in charts.items() if chart.holds}


def _in_ball(ball: Ball, centres: NDArray[Any], source_affine: Affine | None = None) -> Mask:
    """Which centres (m, 3) lie in a ball; they are RAS+ mm where the affine of the source's voxels is given."""
    middle = np.array(ball.centre) if source_affine is None else to_ras_mm(ball.centre, ball.space, source_affine)
    mask: Mask = np.asarray(((centres - middle) ** 2).sum(axis=1) <= (ball.radius_mm + _BORDER_MM) ** 2)
    return mask


def _in_cuboid(cuboid: Cuboid, centres: NDArray[Any], source_affine: Affine | None = None) -> Mask:
    """Which centres (m, 3) lie in a cuboid, along the axes of its own space."""
    own = centres if source_affine is None else from_ras_mm(centres, cuboid.space, source_affine)
    border = _BORDER_MM
    if source_affine is not None and cuboid.space == "voxel":
        border = _BORDER_MM / np.linalg.norm(source_affine[:3, :3], axis=0)
    low, high = np.array(cuboid.low) - border, np.array(cuboid.high) + border
    mask: Mask = np.asarray(((own >= low) & (own <= high)).all(axis=1))
    return mask


def _check_meets(part: Ball | Cuboid, geometry: ScanGeometry, *, found: bool) -> None:
    """`OutsideScan` for a ball whose centre, or a cuboid of which all, lies outside of the volume.

    Either most often was given in another space than it says.
    """
    corners = from_ras_mm(geometry.corners_mm(), part.space, geometry.source_affine)
    low, high = corners.min(axis=0), corners.max(axis=0)
    if isinstance(part, Ball):
        outside = not geometry.holds(to_ras_mm(part.centre, part.space, geometry.source_affine))
        what = f"the centre {_text(part.centre)} of the ball"
    else:
        apart = (np.array(part.high) < low) | (np.array(part.low) > high)
        outside = bool(apart.any()) and not found
        what = f"the cuboid {_text(part.low)} to {_text(part.high)}"
    if outside:
        unit = {"ras": "RAS mm", "lps": "LPS mm", "voxel": "voxel"}[part.space]
        raise OutsideScan(
            f"{what} ({unit}) lies outside scan {part.scan!r}, which spans {_text(low)} to {_text(high)}",
            next_step="check the space: ras, lps and voxel are different numbers for the same place",
        )


def _no_label(part: Label, rows: Sequence[Mapping[str, Any]]) -> NotFound:
    where = "of the store" if part.scan is None else f"of scan {part.scan!r}"
    known = sorted({str(row["name"]) for row in rows if row["name"] is not None})
    close = difflib.get_close_matches(str(part.label), known, n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    what = repr(part.label) if isinstance(part.label, str) else str(part.label)
    return NotFound(f"no label map {where} has label {what}{hint}", next_step=LABELS)


def _text(values: Sequence[float] | NDArray[np.float64]) -> str:
    return "(" + ", ".join(f"{round(float(value), 1) + 0.0:.1f}" for value in values) + ")"
