"""Which scans look like this one, or whose region of this name does: pooled vectors compared one by one, exactly.

    scan, label ─▶ its pooled vector ─▶ distance to that of every other scan, or of every region that is called the same

There are few vectors (scans times labels), so there is no index. Only stored vectors are read: no torch, no images.
"""

from __future__ import annotations

import difflib
import operator
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from isimed_index.encoders.card import EncoderCard, read_card
from isimed_index.errors import NotFound, StoreWarning, UsageError
from isimed_index.matches import SameSubject
from isimed_index.pooling import Pooled
from isimed_index.regions import LEAST_WEIGHT, standard_of
from isimed_index.store.regions import StoredRegions, described, living_regions
from isimed_index.store.segment import Segment
from isimed_index.store.snapshot import Snapshot
from isimed_index.store.sql.patches import label_rows, tells_labels

if TYPE_CHECKING:
    import pyarrow as pa

Pooling = Literal["mean", "mean_sd"]
_COLUMNS = ("scan", "subject", "label", "name", "distance", "patches")
_LISTED = 3  # names in an error
_WHOLE = re.compile(r"(?:label )?([+-]?\d+)", re.ASCII)
_LEAST_LENGTH = 1e-12  # of a pooled vector that points anywhere


@dataclass(frozen=True, slots=True)
class Likeness:
    """What is compared (a region by name or number, or whole scans), which scans may answer, and how many answers."""

    label: str | int | None = None
    k: int = 10
    where: str | None = None
    same_subject: SameSubject = "exclude"
    pooling: Pooling = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.label, str | int | np.integer | None) or isinstance(self.label, bool):
            raise UsageError(f"expected a label's name or its number, a whole one, found {self.label!r}")
        if self.k < 1:
            raise UsageError(f"expected k of at least 1, found {self.k}")
        if self.pooling not in get_args(Pooling):
            raise UsageError(f"expected the pooling mean or mean_sd, found {self.pooling!r}")
        if self.same_subject not in get_args(SameSubject):
            raise UsageError(f"expected same_subject include, exclude or only, found {self.same_subject!r}")


def similar(snapshot: Snapshot, scan: str, likeness: Likeness, encoder: str | None = None) -> pa.Table:
    """The `k` nearest, as the columns scan, subject, label, name, distance and patches.

    `NotFound` when the scan, the region or its pooled vector is not there.
    """
    subject = snapshot.scan_row(_scan_id(scan))["subject"]
    card = read_card(snapshot.encoder_path(encoder))
    segments = snapshot.segments_by_scan(card.id)
    regions = _regions(snapshot, card, segments, scan)
    rows = described(snapshot, card.id, regions.rows)
    asked = _asked(snapshot, rows, segments[scan], likeness.label)
    scans = snapshot.matching("scans", likeness.where)
    others = {
        other: whose
        for other, whose in zip(scans["scan"].to_pylist(), scans["subject"].to_pylist(), strict=True)
        if other != scan and _wanted(whose == subject, likeness.same_subject)
    }
    chosen = _alike(rows, asked, others)
    away = distances(regions, asked, chosen, likeness.pooling)
    found = rows.take(chosen)
    order = np.lexsort((found["scan"].to_numpy(), away))[: likeness.k]
    found = found.take(order)
    return _answer(found, [others[other] for other in found["scan"].to_pylist()], away[order])


def _scan_id(scan: object) -> str:
    if isinstance(scan, str):
        return scan
    found = f"the path {scan.name!r}" if isinstance(scan, Path) else repr(scan)
    raise UsageError(f"expected the id of a stored scan, found {found}", next_step="isimed ls")


def distances(regions: StoredRegions, asked: int, others: NDArray[np.int64], pooling: Pooling) -> NDArray[np.float64]:
    """Distances (m,) between one row and others.

    `mean`: the card's, of means that are put back on the unit sphere: 1 - cosine, or Euclidean in the encoder's units.
    `mean_sd`: 1 - cosine of mean ‖ sd. Where vectors cancel out or are zero the cosine is 0, as in lookups.
    """
    rows = np.concatenate([[asked], others])
    if pooling == "mean_sd":
        x = Pooled(regions.mean[rows], regions.sd[rows]).both.astype(np.float64)
    elif (standard := standard_of(regions.made)).metric == "l2":
        raw = standard.raw(regions.mean[rows]).astype(np.float64)
        return np.asarray(np.linalg.norm(raw[1:] - raw[0], axis=1))
    else:
        x = regions.mean[rows].astype(np.float64)
    length = np.linalg.norm(x, axis=1)
    points = length > _LEAST_LENGTH
    x /= np.where(points, length, 1)[:, None]
    away = ((x[1:] - x[0]) ** 2).sum(axis=1) / 2  # of unit vectors 1 - cosine, exact also where it is small
    return np.where(points[1:] & points[0], away, 1.0)


def _regions(snapshot: Snapshot, card: EncoderCard, segments: Mapping[str, Segment], scan: str) -> StoredRegions:
    """The encoder's regions that hold, if the scan's are among them."""
    step = f"isimed index --encoder {card.id}"  # by itself it takes the newest
    if scan not in segments or not segments[scan].rows:
        raise NotFound(f"scan {scan!r} is not encoded by {card.name!r}", next_step=step)
    regions = living_regions(snapshot, card.id)
    pooled = set() if regions is None else set(regions.rows["segment"].to_pylist())
    if regions is None or segments[scan].first_row_id not in pooled:
        raise NotFound(f"scan {scan!r} has no vector of the whole scan yet", next_step=step)
    lacking = sum(segment.rows > 0 and segment.first_row_id not in pooled for segment in segments.values())
    if lacking:
        warnings.warn(
            f"{_counted(lacking, 'encoded scan has', 'encoded scans have')} no vectors of whole scan and regions yet, "
            f"and cannot answer. Next: {step}",
            StoreWarning,
            stacklevel=4,
        )
    return regions


def _asked(snapshot: Snapshot, rows: pa.Table, segment: Segment, label: str | int | None) -> int:
    """The row of a segment's scan, or of its region of that name or number."""
    import pyarrow.compute as pc

    scan = snapshot.scan_of[segment.scan_artefact]
    mine = np.flatnonzero(pc.equal(rows["scan"], scan))
    own = dict(zip(rows["label"].take(mine).to_pylist(), mine.tolist(), strict=True))
    if label is None:
        return int(own[None])
    number = _number(snapshot, scan, label)
    if number not in own and not (tells_labels(segment) and label_rows([segment]).num_rows):
        raise NotFound(
            f"it is not stored which labels the patches of scan {scan!r} show, as where they were imported or encoded "
            "by an earlier version, so it has no regions",
            next_step="leave out --label to compare whole scans",
        )
    if number not in own:
        raise NotFound(
            f"the patches of scan {scan!r} show too little of label {label!r} for a vector of it: together less than "
            f"{LEAST_WEIGHT:g} of a patch",
            next_step=_listing("label, name, weight", "regions", scan),
        )
    return int(own[number])


def _number(snapshot: Snapshot, scan: str, label: str | int) -> int:
    """The number of a label of a scan; text that is no name of one may be a number."""
    import pyarrow.compute as pc

    table = snapshot.table("labels")
    mine = table.filter(pc.equal(table["scan"], scan))
    numbers, names = mine["label"].to_pylist(), mine["name"].to_pylist()
    if not numbers:
        raise NotFound(
            f"scan {scan!r} has no labels, so it has no regions", next_step="leave out --label to compare whole scans"
        )
    called = [number for number, name in zip(numbers, names, strict=True) if name is not None and name == label]
    if len(called) > 1:
        listed = " and ".join(map(str, called))
        raise UsageError(f"labels {listed} of scan {scan!r} are all called {label!r}", next_step="give the number")
    if called:
        return int(called[0])
    if (number := _as_number(label)) is not None and number in numbers:
        return number
    raise NotFound(
        f"scan {scan!r} has no label {label!r}{_nearest(label, numbers, names)}",
        next_step=_listing("label, name", "labels", scan),
    )


def _listing(columns: str, view: str, scan: str) -> str:
    quoted = scan.replace("'", "''")
    return f"isimed sql \"SELECT {columns} FROM {view} WHERE scan = '{quoted}'\""


def _as_number(label: str | int) -> int | None:
    """The number that a label is, also one of NumPy's, or that a text shows; None for a name.

    `label 87` is what lookups call a label without a name.
    """
    if isinstance(label, str):
        return int(shown[1]) if (shown := _WHOLE.fullmatch(label.strip())) else None
    return operator.index(label)


def _nearest(label: str | int, numbers: Sequence[int], names: Sequence[str | None]) -> str:
    """Which labels were perhaps meant."""
    if (asked := _as_number(label)) is not None:
        near = sorted(numbers, key=lambda number: (abs(number - asked), number))[:_LISTED]
        return f"; the nearest are {', '.join(map(str, near))}"
    folded = {name.casefold(): name for name in names if name is not None}
    text = str(label).casefold()
    close = [name for name in folded if _spelt(name) == _spelt(text)]
    close = close or difflib.get_close_matches(text, folded, n=_LISTED)
    close = close or [name for name in folded if text in name][:_LISTED]
    if close:
        return f"; did you mean {' or '.join(repr(folded[name]) for name in close)}?"
    return "" if folded else "; its labels have numbers and no names"


def _alike(rows: pa.Table, asked: int, others: Collection[str]) -> NDArray[np.int64]:
    """Rows (m,) of other scans that are of the same: whole scans, or regions of one name, or nameless of one number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    number, name = rows["label"][asked], rows["name"][asked]
    of_others = pc.is_in(rows["scan"], pa.array(others, pa.string()))
    if not number.is_valid:
        return np.flatnonzero(pc.and_(of_others, pc.is_null(rows["label"])))
    numbered = pc.and_(of_others, pc.fill_null(pc.equal(rows["label"], number), False))
    nameless = pc.is_null(rows["name"])
    unsure = int(np.count_nonzero(pc.and_(numbered, nameless if name.is_valid else pc.invert(nameless))))
    if unsure:
        warnings.warn(
            f"label {number} has a name in some scans and none in others, so it is not known to be the same region: "
            f"{_counted(unsure, 'region is', 'regions are')} left out. "
            "Next: isimed add all scans with --label-names to a new store",
            StoreWarning,
            stacklevel=4,
        )
    if not name.is_valid:
        return np.flatnonzero(pc.and_(numbered, nameless))
    names = pc.unique(rows["name"].filter(of_others)).drop_null().to_pylist()
    nearly = sorted(other for other in names if other != name.as_py() and _spelt(other) == _spelt(name.as_py()))
    if nearly:
        warnings.warn(
            f"what other scans call {nearly[0]!r} is not taken for {name.as_py()!r}, and left out. "
            "Next: isimed add all scans with --label-names to a new store",
            StoreWarning,
            stacklevel=4,
        )
    return np.flatnonzero(pc.and_(of_others, pc.fill_null(pc.equal(rows["name"], name), False)))


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _spelt(name: str) -> str:
    """A name without what two tables spell differently: case, blanks, punctuation."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _wanted(same: bool, same_subject: SameSubject) -> bool:
    return {"include": True, "exclude": not same, "only": same}[same_subject]


def _answer(found: pa.Table, subjects: Sequence[str], away: NDArray[np.float64]) -> pa.Table:
    import pyarrow as pa

    columns: dict[str, Any] = {name: found[name] for name in ("scan", "label", "name", "patches")}
    columns |= {"subject": pa.array(subjects, pa.string()), "distance": pa.array(away, pa.float64())}
    return pa.table([columns[name] for name in _COLUMNS], names=list(_COLUMNS))
