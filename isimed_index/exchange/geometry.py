"""Where foreign embeddings lie: scans that are described but not stored, and the lattice that positions form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isimed_index.contracts import arrow_schema
from isimed_index.encoders.card import EncoderCard
from isimed_index.errors import ScanRefused, UsageError
from isimed_index.exchange.given import read_table
from isimed_index.exchange.incoming import IMPORTED
from isimed_index.lattice import ScanGeometry
from isimed_index.space import Affine, apply_affine, checked_affine, inverse, orientation, spacing_mm, to_ras
from isimed_index.store.snapshot import StoredTable

if TYPE_CHECKING:
    import pyarrow as pa

Points = NDArray[np.float64]  # (n, 3) RAS+ mm
_CELLS = tuple(f"a{row}{column}" for row in range(3) for column in range(4))
_SHAPE = ("nx", "ny", "nz")
_BY_GEOMETRY = (*_SHAPE, "dx_mm", "dy_mm", "dz_mm", "orientation", "format", "digest", "artefact")
_SUBJECT = ("sex", "age")
_SAME_MM = 1e-2  # coordinates that differ by less are one plane of the lattice: float32 rounds far below it
_OFF_STEP = 0.05  # share of a step that a position may lie beside its lattice point
_LEAST_FILL = 0.01  # share of a lattice's points that must be there: scattered points fill next to nothing


@dataclass(frozen=True, slots=True)
class Described:
    """Scans that a table describes: rows as the store has them, but for `artefact`, and where their voxels would be."""

    tables: Mapping[StoredTable, pa.Table]
    geometry: Mapping[str, ScanGeometry]

    @property
    def rows(self) -> pa.Table:
        """Rows of `scans`."""
        return self.tables["scans"]


@dataclass(frozen=True, slots=True)
class Regular:
    """A regular lattice along a scan's own axes."""

    ijk: NDArray[np.int64]  # (n, 3) lattice indices of the positions
    shape: tuple[int, int, int]
    affine: Affine  # lattice index → RAS+ mm
    stride_vox: int  # its smallest step in voxels of the encoder's working grid


def read_scans(file: Path | None) -> Described:
    """Read a table of scans: `scan`, `nx`, `ny`, `nz` and `a00` … `a23`, the affine voxel index → RAS+ mm of the file.

    Its other columns become columns of `scans`. None describes no scan.
    """
    import pyarrow as pa

    empty: dict[StoredTable, pa.Table] = {name: arrow_schema(name).empty_table() for name in IMPORTED}
    if file is None:
        return Described({**empty, "scans": empty["scans"].drop_columns("artefact")}, {})
    table = read_table(file)
    missing = [name for name in ("scan", *_SHAPE, *_CELLS) if name not in table.column_names]
    if missing:
        raise UsageError(f"{file.name} lacks the column {missing[0]!r}", next_step="isimed import --help")
    given = table.to_pylist()
    geometry = {row["scan"]: _described(row, file) for row in given}
    if len(geometry) < len(given) or None in geometry:
        raise UsageError(f"{file.name}: expected each scan once", next_step="leave out what stands there twice")
    rows = [_scan_row(row, geometry[row["scan"]]) for row in given]
    subjects = {row["subject"]: {name: row.get(name) for name in ("subject", *_SUBJECT)} for row in rows}
    tables: dict[StoredTable, pa.Table] = {
        "scans": pa.Table.from_pylist(rows),
        "subjects": pa.Table.from_pylist(list(subjects.values())),
        "labels": empty["labels"],
    }
    return Described(tables, geometry)


def _described(row: Mapping[str, Any], file: Path) -> ScanGeometry:
    """The geometry that a row gives, axes turned to RAS+ as those of stored voxels are."""
    try:
        x, y, z = (int(row[name]) for name in _SHAPE)
        affine = checked_affine([*np.array([float(row[name]) for name in _CELLS]).reshape(3, 4), [0, 0, 0, 1]])
        if min(x, y, z) < 1:
            raise ValueError
    except (TypeError, ValueError, ScanRefused):
        raise UsageError(
            f"{file.name}: scan {row['scan']} has no shape or no affine that maps voxels to millimetres",
            next_step="give nx, ny, nz and a00 to a23, voxel index to RAS mm",
        ) from None
    turned, ras = to_ras(np.broadcast_to(np.uint8(0), (x, y, z)), affine)
    nx, ny, nz = turned.shape
    return ScanGeometry((nx, ny, nz), ras, affine)


def _scan_row(row: Mapping[str, Any], at: ScanGeometry) -> dict[str, Any]:
    """A row of `scans`; the digest stands for a content that nobody has seen, so it is one that no file has."""
    text = json.dumps(["no voxels", row["scan"], list(at.shape), at.affine.tolist()])
    own = {key: value for key, value in row.items() if key not in (*_CELLS, *_BY_GEOMETRY)}
    return {
        **own,
        "subject": row.get("subject") or row["scan"],
        **dict(zip(_SHAPE, at.shape, strict=True)),
        **dict(zip(("dx_mm", "dy_mm", "dz_mm"), map(float, spacing_mm(at.affine)), strict=True)),
        "orientation": orientation(at.source_affine),
        "digest": row.get("digest") or hashlib.sha256(text.encode()).hexdigest(),
    }


def attributes_of(at: ScanGeometry) -> dict[str, str]:
    """What a scan without voxels says of the file that it stands for."""
    return {
        "source_orientation": orientation(at.source_affine),
        "source_affine": json.dumps(at.source_affine.tolist()),
    }


def count_outside(points: Points, at: ScanGeometry, slack_mm: float) -> int:
    """How many positions lie outside of a scan by more than `slack_mm`: the outermost patch centres may stick out."""
    voxel = apply_affine(inverse(at.affine), points)
    slack = 0.5 + slack_mm / spacing_mm(at.affine)
    return int(((voxel < -slack) | (voxel > np.array(at.shape) - 1 + slack)).any(axis=1).sum())


def regular(scan: str, points: Points, at: ScanGeometry, card: EncoderCard) -> Regular:
    """The lattice along the scan's axes on which all positions lie, each on a point of its own.

    `UsageError` when they form none.
    """
    spacing = spacing_mm(at.affine)
    along_mm = apply_affine(inverse(at.affine), points) * spacing  # (n, 3) mm from voxel 0 along the scan's own axes
    firsts, steps, columns = zip(*(_planes(along_mm[:, axis], card) for axis in range(3)), strict=True)
    ijk = np.stack(columns, axis=1)
    beside = np.abs(along_mm - (np.array(firsts) + ijk * np.array(steps))) / np.array(steps)
    x, y, z = (ijk.max(axis=0) + 1).tolist()
    if beside.max() > _OFF_STEP or len(ijk) < _LEAST_FILL * x * y * z:
        raise UsageError(
            f"the {len(points)} positions of scan {scan} form no regular lattice along its axes, "
            "which lookup needs to compare neighbours",
            next_step="embed the scan on a lattice with one step along each axis of its voxels",
        )
    if len(np.unique(ijk, axis=0)) < len(ijk):
        raise UsageError(f"two rows of scan {scan} have the same position", next_step="leave one of them out")
    local = np.diag([*(np.array(steps) / spacing), 1.0])
    local[:3, 3] = np.array(firsts) / spacing
    return Regular(ijk, (x, y, z), at.affine @ local, max(1, round(min(steps) / card.spacing_mm)))


def _planes(values: NDArray[np.float64], card: EncoderCard) -> tuple[float, float, NDArray[np.int64]]:
    """First plane, step (mm) and plane number (n,) of coordinates along one axis."""
    rising = np.sort(values)
    gaps = np.diff(rising)
    gaps = gaps[gaps > _SAME_MM]
    first, last = float(rising[0]), float(rising[-1])
    if not gaps.size:
        return first, card.stride_vox * card.spacing_mm, np.zeros(len(values), np.int64)
    step = (last - first) / max(1, round((last - first) / float(gaps.min())))  # over the whole length: errors even out
    return first, step, np.rint((values - first) / step).astype(np.int64)
